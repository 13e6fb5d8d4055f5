"""Whole private studies by our engine and by Opacus's gradients, from the same draws: a Markdown table.

    CONSILIUM_DATA=FOLDER python tests/bench/dp_studies.py [--studies heart-disease …] [--seeds 2] [--quick]
        [--prepared FOLDER] [--json FILE]

Sites and server are computed in one process (``one_process.py``), on one thread. The two engines (``engines.Engine``)
of one seed have the same initial weights, draw the same patients, add the same noise and share clipping, lattice and
server. Only where per-sample gradients come from differs, so the final weights differ by what rounding grew to; beside
that stands what it grows to between our own run and ours from weights that are one rounding away. The engines run in
turns, the first changing with the seed. Timed are all rounds: the sites' training and the server's mean, without
reading data, calibrating noise and testing the model. Beside wall time stands the processor's, which other work on the
machine moves less. ε is the plans' cost, the largest of any site, with all that the study asks for: training, the
number of patients, evaluations; AUROC is that of the last model on all held-back patients, without noise. ``--quick``:
one seed. The figures kept: ``docs/results/private-training.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from consilium_deploy.real_data import POOLED
from consilium_shared.models import build
from consilium_shared.models.vector import Vector, to_vector, unpack
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.study import Study
from dp_accuracy import SETS, changed
from dpsgd.engines import Engine
from one_process import contract, federated, hospitals, is_demonstration, plans, records, rounds, values

ENGINES: tuple[Engine, Engine] = ("book-keeping", "opacus")
EPSILON = 3.0
"""Of the sets whose sample study is without privacy; their settings are the best in ``docs/results/accuracy.md``."""
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "pneumoniamnist": SETS["pneumoniamnist"].changes,
    "physionet2012": {**SETS["physionet2012"].changes, "training.optimizer": {"name": "sgd", "lr": 2.0}},
}
STUDIES = ("heart-disease", *CHANGES, "demo-xray", "demo-vitals")


@dataclass
class Runs:
    """One engine's runs of a study: a number for each seed. Seconds are of all rounds."""

    auroc: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)


@dataclass
class Row:
    """One study by both ways.

    Attributes:
        epsilon: largest cost of any site's plan, at ``delta``.
        difference: of the two final models of one seed, the largest of any weight; one for each seed.
        rounding: of our final model and ours from weights that are one rounding away; one for each seed.
        largest: magnitude of the largest weight; one for each seed.
    """

    study: str
    model: str
    epsilon: float = 0.0
    delta: float = 0.0
    runs: dict[Engine, Runs] = field(default_factory=lambda: {engine: Runs() for engine in ENGINES})
    difference: list[float] = field(default_factory=list)
    rounding: list[float] = field(default_factory=list)
    largest: list[float] = field(default_factory=list)


def study_of(name: str, seed: int) -> Study:
    """The sample study with privacy, from these initial weights."""
    if name in CHANGES:
        privacy = {"mode": "dp", "epsilon": EPSILON, "delta": SETS[name].delta, "clipping_norm": 1.0}
        return changed(contract(name, SETS[name].file, seed, **privacy), CHANGES[name])
    return contract(name, "study.yaml" if is_demonstration(name) else "study-dp.yaml", seed)


def measure(name: str, seeds: int, source: Path, folder: Path) -> Row:
    """Every seed by both ways. A first round by each is not counted: kernels and checks come to be in it."""
    study = study_of(name, 0)
    with contextlib.redirect_stdout(sys.stderr):  # what it says of the sites is no row of the table
        data = records(name, study, source, folder)
    sites = hospitals(data)
    row = Row(name, study.model.name)
    for seed in range(seeds):
        study = study_of(name, seed)
        planned = plans(name, study, sites, seed)
        for plan in planned.values():
            assert isinstance(plan, PrivacyPlan)  # every study here is private
            row.epsilon, row.delta = max(row.epsilon, plan.cost()), plan.delta
        for engine in ENGINES:
            next(rounds(study, sites, planned, seed, engine=engine))
        vectors = {}
        for engine in ENGINES if seed % 2 == 0 else reversed(ENGINES):
            wall, processor = time.perf_counter(), time.process_time()
            model = federated(study, sites, planned, seed, engine=engine)
            row.runs[engine].wall_s.append(time.perf_counter() - wall)
            row.runs[engine].processor_s.append(time.process_time() - processor)
            row.runs[engine].auroc.append(values(study, model, {POOLED: data[POOLED]}, "auroc")[POOLED])
            vectors[engine] = unpack(model, build(study), study)
        ours, reference = (vectors[engine] for engine in ENGINES)
        beside = federated(study, sites, planned, seed, start=one_rounding_away(to_vector(build(study)), seed))
        row.difference.append(_distance(ours, reference))
        row.rounding.append(_distance(ours, unpack(beside, build(study), study)))
        row.largest.append(float(np.abs(reference).max()))
    return row


def one_rounding_away(weights: Vector, seed: int) -> Vector:
    """Every weight's neighbour among the float32, above or below by chance: what any other order of sums may give."""
    above = np.random.default_rng(seed).random(len(weights)) < 0.5
    return np.nextafter(weights, np.where(above, np.inf, -np.inf).astype(np.float32))


def _distance(one: Vector, other: Vector) -> float:
    return float(np.abs(one.astype(np.float64) - other).max())


HEADS = (
    "study", "model", "ε (δ)", "AUROC, ours", "AUROC, Opacus", "ours, s", "Opacus, s", "×", "ours, processor s",
    "Opacus, processor s", "×", "weights differ by", "one rounding: by", "largest weight",
)  # fmt: skip


def line(row: Row) -> str:
    """A row of the table: means over seeds, the ratio of their sums, and the largest difference of any seed."""
    ours, reference = (row.runs[engine] for engine in ENGINES)
    cells = [row.study, row.model, f"{row.epsilon:.2f} ({row.delta:g})", _spread(ours.auroc), _spread(reference.auroc)]
    for one, other in ((ours.wall_s, reference.wall_s), (ours.processor_s, reference.processor_s)):
        cells += [f"{statistics.fmean(one):.2f}", f"{statistics.fmean(other):.2f}", f"{sum(other) / sum(one):.1f}"]
    cells += [f"{max(row.difference):.1e}", f"{max(row.rounding):.1e}", f"{max(row.largest):.2f}"]
    return f"| {' | '.join(cells)} |"


def _spread(found: list[float]) -> str:
    deviation = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.4f}{deviation}"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=STUDIES)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each study by each engine")
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--prepared", type=Path, help="keep the prepared files in this folder, one folder a set")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args(arguments)
    source = os.environ.get("CONSILIUM_DATA", "")
    if not source and not all(map(is_demonstration, options.studies)):
        parser.error("CONSILIUM_DATA does not name the folder of published sets (docs/results/published-data.md)")
    torch.set_num_threads(1)
    print(f"| {' | '.join(HEADS)} |\n|{'---|' * len(HEADS)}", flush=True)
    found = []
    with tempfile.TemporaryDirectory(prefix="consilium-bench-") as temporary:
        for name in options.studies:
            folder = (options.prepared or Path(temporary)) / name
            folder.mkdir(parents=True, exist_ok=True)
            row = measure(name, 1 if options.quick else options.seeds, Path(source), folder)
            print(line(row), flush=True)
            found.append(asdict(row))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
