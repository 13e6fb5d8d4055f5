"""Studies of every model of the product, each published at a coordinator with weights that nobody trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tests.support import studies

from consilium_server import registry
from consilium_server.commands.provision import provision
from consilium_server.export.bundle import contents
from consilium_server.federation import Home
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.study import Study

IMAGE = {"image": {"size": 16}}
SERIES = {
    "series": {
        "variables": [
            {"name": "hr", "center": 80.0, "scale": 20.0, "low": 10.0, "high": 300.0},
            {"name": "sbp", "center": 120.0, "scale": 25.0, "low": 30.0, "high": 300.0},
        ],
        "bins": 6,
        "step_minutes": 60,
        "statics": [{"name": "age", "center": 60.0, "scale": 15.0}, {"name": "sex", "categories": ["f", "m"]}],
    }
}
TABLE = {
    "features": [
        {"name": "age", "center": 54.0, "scale": 9.0, "low": 18.0, "high": 110.0},
        {"name": "pain", "categories": ["1", "2", "3"]},
        {"name": "chol", "center": 240.0, "scale": 50.0},
    ]
}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("small-cnn", IMAGE),
    ("resnet18-gn", IMAGE),
    ("lstm", SERIES),
    ("gru", SERIES),
    ("logistic", TABLE),
    ("mlp", TABLE),
]


def study(model: str, data: dict[str, Any], *, missing: str = "refuse", **changes: Any) -> Study:
    return studies.study(
        {"name": model, "hidden": 8, **changes},
        {"label": {"column": "disease", "classes": ["no", "yes"]}, "missing": missing, **data},
        name=f"a-{model}",
        privacy={"epsilon": 3.0, "delta": 1e-3, "clipping_norm": 1.0},
    )


def weights(given: Study, seed: int = 0) -> bytes:
    vector = to_vector(build(given))
    return pack((vector + np.random.default_rng(seed).normal(0, 0.3, vector.shape)).astype(np.float32), given)


def coordinator(folder: Path) -> Home:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "federation.yaml").write_text("federation: test\naddress: 127.0.0.1\nsites: [north, south]\n")
    home = Home(folder / "server")
    provision(home, folder / "federation.yaml")
    return home


def publish(home: Home, given: Study, seed: int = 0, **metrics: Any) -> registry.Model:
    """``metrics``: of the last round, beside those that every card here has."""
    made = record()
    made["metrics"] |= metrics
    return registry.publish(home, given, home.roster(), weights(given, seed), [made], {})


def record() -> dict[str, Any]:
    return {
        "round": 1,
        "participants": ["north", "south"],
        "away": {},
        "refused": {},
        "seconds": 1.5,
        "model_after": "0" * 64,
        "epsilon": {"north": 2.75, "south": 1.5},
        "metrics": {"auroc": 0.75, "accuracy": None, "interval": {"auroc": [0.7, 0.8]}},
    }


def files(home: Home, given: Study, seed: int = 0) -> dict[str, bytes]:
    return contents(publish(home, given, seed), home.coordinator())
