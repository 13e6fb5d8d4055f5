"""What settings of a contract bring in accuracy at the same ε, on published sets: a Markdown table.

    CONSILIUM_DATA=FOLDER python tests/bench/dp_accuracy.py copies average rates clipping [--sets heart-disease …]
        [--seeds 3] [--epsilon 1 3 8] [--prepared FOLDER] [--json FILE]

``copies``: ``training.augment`` and ``augment_multiplicity``. ``average``: ``aggregation.weight_average``. ``rates``:
``training.optimizer.lr`` and ``expected_batch``, over a grid. ``clipping``: ``privacy.clipping_norm``, fixed and as the
first of ``training.adaptive_clipping``. Every row costs every site the same ε, all of it in the
noise, which is calibrated anew for each row. Rows of one seed share initial weights, noise draws and, where the
sampling rate is the same, the patients of each step, so that the gain over a table's first row, in points of AUROC
with its standard error, is of the setting and less of chance. Sites and server are computed in one process
(``one_process.py``). The figures kept: ``docs/results/accuracy.md``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from consilium_client.data import Dataset
from consilium_deploy.real_data import POOLED
from consilium_shared.averaging import averaged
from consilium_shared.models import build
from consilium_shared.models.vector import pack, unpack
from consilium_shared.study import Study
from one_process import contract, hospitals, plans, records, rounds, values

Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """A published set under a contract with privacy.

    A study as small as this machine trains it in seconds: fewer rounds, smaller models than the samples.

    Attributes:
        file: the sample study that ``changes`` start from.
        delta: δ, below 1 / patients of the largest site.
        changes: dotted paths in the contract, and what stands there; the first row of every table.
        rates, batches: the grid.
        images: whether there is anything to augment.
    """

    file: str
    delta: float
    changes: Changes
    rates: Sequence[float]
    batches: Sequence[int]
    images: bool = False


SETS = {
    "heart-disease": Setting("study-dp.yaml", 1e-3, {}, (0.1, 0.3, 1.0, 3.0), (200, 64, 16)),
    "pneumoniamnist": Setting(
        "study.yaml",
        1e-4,
        {
            "model.hidden": 16,
            "training.rounds": 8,
            "training.steps_per_round": 8,
            "training.optimizer": {"name": "sgd", "lr": 0.5},
            "training.augment": "none",
        },
        (0.5, 1.0, 2.0),
        (64, 128),
        images=True,
    ),
    "physionet2012": Setting(
        "study.yaml",
        1e-4,
        {
            "model.hidden": 16,
            "training.rounds": 6,
            "training.steps_per_round": 8,
            "training.optimizer": {"name": "sgd", "lr": 1.0},
        },
        (1.0, 2.0, 4.0),
        (64, 128),
    ),
}

DECAYS = (0.5, 0.8)
NORMS, QUANTILES = (0.1, 1.0, 10.0), (0.2, 0.5, 0.8)


def arms(setting: Setting, options: argparse.Namespace) -> dict[str, Changes]:
    """Rows by name. The average needs no training of its own: it has columns."""
    found: dict[str, Changes] = {"as it is": {}}
    if "copies" in options.features and setting.images:
        found["augment: light"] = {"training.augment": "light"}
        for copies in options.copies:
            changes = {"training.augment": "light", "training.augment_multiplicity": copies}
            found[f"augment: light, augment_multiplicity: {copies}"] = changes
    if "rates" in options.features:
        for batch, rate in itertools.product(options.batches or setting.batches, options.rates or setting.rates):
            changes = {"training.optimizer": {"name": "sgd", "lr": rate}, "training.expected_batch": batch}
            found[f"expected_batch: {batch}, lr: {rate:g}"] = changes
    if "clipping" in options.features:
        for norm, quantile in itertools.product(NORMS, (None, *QUANTILES)):
            adaptive = None if quantile is None else {"quantile": quantile}
            name = "fixed" if quantile is None else f"adaptive_clipping: {{quantile: {quantile:g}}}"
            changes = {"privacy.clipping_norm": norm, "training.adaptive_clipping": adaptive}
            found[f"clipping_norm: {norm:g}, {name}"] = changes
    return found


def changed(study: Study, changes: Changes) -> Study:
    """The study with other values at these dotted paths."""
    content = study.contract
    for path, value in changes.items():
        *way, last = path.split(".")
        place = content
        for step in way:
            place = place[step]
        place[last] = value
    return Study.model_validate(content)


class Bench:
    """One set, prepared once."""

    def __init__(self, name: str, source: Path, folder: Path) -> None:
        self.name, self.setting = name, SETS[name]
        self.data: dict[str, Dataset] = records(name, self.study(1.0, 0, {}), source, folder)
        self.sites = hospitals(self.data)

    def study(self, epsilon: float, seed: int, changes: Changes) -> Study:
        """The set's contract at an ε. With noise of 10 patients their number alone would cost more than a small ε."""
        privacy = {"mode": "dp", "epsilon": epsilon, "delta": self.setting.delta, "clipping_norm": 1.0}
        study = contract(self.name, self.setting.file, seed, **privacy, count_noise=max(10.0, 10.0 / epsilon))
        return changed(study, {**self.setting.changes, **changes})

    def row(self, epsilon: float, seeds: int, changes: Changes, decays: Sequence[float]) -> dict[str, list[float]]:
        """By column, one AUROC for each seed."""
        found: dict[str, list[float]] = {}
        for seed in range(seeds):
            study = self.study(epsilon, seed, changes)
            models = list(rounds(study, self.sites, plans(self.name, study, self.sites, seed), seed))
            last = values(study, models[-1], self.data, "auroc")
            pooled = {"all": last.pop(POOLED), "mean": statistics.fmean(last.values())}
            for decay in decays:
                average = _averaged(study, models, decay)
                pooled[f"{decay:g}"] = values(study, average, {POOLED: self.data[POOLED]}, "auroc")[POOLED]
            for column, value in pooled.items():
                found.setdefault(column, []).append(value)
        return found


def _averaged(study: Study, models: list[bytes], decay: float) -> bytes:
    """What the study with this ``weight_average`` would have published: its rounds are the same."""
    average = None
    for number, model in enumerate(models, start=1):
        average = averaged(average, unpack(model, build(study), study), decay, number)
    assert average is not None  # a study has a round
    return pack(average.astype(np.float32), study)


def line(name: str, found: dict[str, list[float]], first: dict[str, list[float]]) -> str:
    """A row of the table; what is gained is gained over the table's first model of the same seed."""
    cells = [name, _spread(found["all"]), _gain(found["all"], first["all"]), _spread(found["mean"])]
    cells += [_gain(found[column], first["all"]) for column in found if column not in ("all", "mean")]
    return f"| {' | '.join(cells)} |"


def _spread(found: list[float]) -> str:
    return f"{statistics.fmean(found):.3f} ± {_deviation(found):.3f}"


def _gain(found: list[float], first: list[float]) -> str:
    points = [100 * (one - base) for one, base in zip(found, first, strict=True)]
    return f"{statistics.fmean(points):+.1f} ± {_deviation(points) / math.sqrt(len(points)):.1f}"


def _deviation(found: list[float]) -> float:
    return statistics.stdev(found) if len(found) > 1 else math.nan


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", nargs="+", choices=["copies", "average", "rates", "clipping"])
    parser.add_argument("--sets", nargs="+", choices=sorted(SETS), default=sorted(SETS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each row")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 3.0, 8.0])
    parser.add_argument("--copies", type=int, nargs="*", default=[4], help="values of augment_multiplicity")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates, in place of the set's")
    parser.add_argument("--batches", type=int, nargs="+", help="values of expected_batch, in place of the set's")
    parser.add_argument("--prepared", type=Path, help="keep the prepared files in this folder, one folder a set")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args(arguments)
    source = os.environ.get("CONSILIUM_DATA")
    if not source:
        parser.error("CONSILIUM_DATA does not name the folder of published sets (docs/results/published-data.md)")
    found: list[dict[str, Any]] = []
    decays = DECAYS if "average" in options.features else ()
    with tempfile.TemporaryDirectory(prefix="consilium-bench-") as temporary:
        for name in options.sets:
            folder = (options.prepared or Path(temporary)) / name
            folder.mkdir(parents=True, exist_ok=True)
            bench = Bench(name, Path(source), folder)
            for epsilon in options.epsilon:
                print(f"\n{name}, ε {epsilon:g}, δ {bench.setting.delta:g}, {options.seeds} seeds\n")
                heads = ["", "AUROC, all held back", "gain", "mean of the sites"]
                heads += [f"gain, weight_average: {decay:g}" for decay in decays]
                print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
                first, seen = None, set[str]()
                for row, changes in arms(bench.setting, options).items():
                    digest = bench.study(epsilon, 0, changes).digest
                    if digest in seen:  # the point of the grid at which the first row stands
                        continue
                    seen.add(digest)
                    scores = bench.row(epsilon, options.seeds, changes, decays)
                    first = first or scores
                    print(line(row, scores, first), flush=True)
                    found.append({"set": name, "epsilon": epsilon, "row": row, "auroc": scores})
    if options.json:
        options.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
