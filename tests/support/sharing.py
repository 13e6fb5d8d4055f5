"""Studies whose sites share the noise, as small as they come."""

from __future__ import annotations

from typing import Any

from tests.support import studies
from tests.support.training import DATA

from consilium_shared.study import Study

CLIPPING_NORM = 0.5
SIGMA = 4.0
EMPTY = 256


def shared_study(honest: int = 3, colluding: int = 2, **changes: Any) -> Study:
    """A study of three sums, each with the noise of ``honest`` sites beside ``colluding``; ``changes`` of its parts."""
    training = {"rounds": 3, "steps_per_round": 1, "expected_batch": 40, "optimizer": {"lr": 0.7}}
    sums = {"honest_sites": honest, "empty_coordinates": EMPTY, **changes.pop("sums", {})}
    privacy = {"mode": "dp", "epsilon": 3.0, "delta": 1e-3, "clipping_norm": CLIPPING_NORM, "noise_multiplier": SIGMA}
    rules = {"min_sites": honest + colluding, "corrupt_sites": colluding, **changes.pop("aggregation", {})}
    return studies.study(
        {"name": "mlp", "hidden": 4},
        DATA["mlp"],
        training={**training, **changes.pop("training", {})},
        privacy={**privacy, "sums": sums, **changes.pop("privacy", {})},
        aggregation=rules,
        **changes,
    )
