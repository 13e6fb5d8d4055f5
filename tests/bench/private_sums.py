"""Private studies whose every opened sum is one step, beside several local steps a round: a Markdown table.

    CONSILIUM_DATA=FOLDER python tests/bench/private_sums.py SET [--sites 4 20] [--epsilon 1 3] [--seeds 3]
        [--forms local sums shared floats] [--colluding 6] [--sums 48]
        [--sampling 0.25] [--rate 1.0] [--splits] [--recalibrate 0.1] [--prepared FOLDER] [--json FILE]

``local``: the settings of ``dp_accuracy.py``, several private steps of small batches at each site a round. ``sums``:
``privacy.sums``, each opened sum one step of all sites together, each site's own noise the whole. ``shared``: the
same with the noise of all sites but ``--colluding`` together the whole, and everybody in every sum. ``floats``: as
``sums`` without the program, of a linear model with everybody in every step: gradients by formula, clipped in float64,
Gaussian noise, no grid, no integers. ``--sites 20`` cuts the set's sites into so many, each from one of them.
``--splits``: each seed has other patients held back, as many at each site, instead of the set's own. Every row costs
each site the same ε. Metrics are of the last model's probabilities on all held-back patients, without noise: mean over
seeds ± their standard deviation.
``--recalibrate``: that part of ε goes to noised counts of half of the held-back patients, from which the coordinator
reads intercept and slope of the probabilities (``evaluation.recalibrate``); metrics are then of the other half,
recalibrated. The figures kept: ``docs/results/accuracy.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from consilium_client.data import Dataset
from consilium_client.data.dataset import ArrayDataset
from consilium_client.training.evaluation import measured, noised_counts
from consilium_server.study.figures import Figures
from consilium_shared.metrics import Layout
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.privacy.plan import Plan, PrivacyPlan
from consilium_shared.protocol.summand import Opened
from consilium_shared.recalibration import Recalibration
from consilium_shared.study import Study
from dp_accuracy import SETS, changed
from one_process import CPU, contract, federated, hospitals, plans, records

LOCAL: Mapping[str, Mapping[str, Mapping[float, float]]] = {
    "heart-disease": {"lr": {1.0: 1.0, 3.0: 3.0}},
    "pneumoniamnist": {"lr": {1.0: 0.5, 3.0: 0.5}},
    "physionet2012": {"lr": {1.0: 2.0, 3.0: 4.0}},
}
"""The best rate of each ε in ``docs/results/accuracy.md``."""
SHARED: Mapping[str, int] = {"empty_coordinates": 1024}
COLUMNS = ("AUROC", "AUPRC", "accuracy", "balanced accuracy", "ECE", "Brier", "mean p / rate")


def scores(truth: NDArray[np.int64], found: NDArray[np.float64]) -> tuple[float, ...]:
    """The columns' numbers of classes int64 ``[N]`` of two and probabilities of the second float64 ``[N]``."""
    order = np.argsort(-found, kind="stable")
    hits, positive = np.cumsum(truth[order]), int(truth.sum())
    ends = np.flatnonzero(np.append(np.diff(found[order]) != 0, True))  # equal scores are one threshold
    right, called = hits[ends], ends + 1
    wrong = np.concatenate([[0], called - right])
    auroc = float(np.trapezoid(np.concatenate([[0], right]), wrong)) / (positive * (len(truth) - positive))
    precision = float(np.sum(np.diff(np.concatenate([[0], right])) * right / called)) / positive
    said = found > 0.5
    sensitivity, specificity = float(said[truth == 1].mean()), float((~said[truth == 0]).mean())
    bins = np.minimum((found * 10).astype(int), 9)
    off = sum(abs(float((truth - found)[bins == b].sum())) for b in range(10)) / len(truth)
    brier = float(np.square(found - truth).mean())
    accuracy, balanced = float((said == truth).mean()), (sensitivity + specificity) / 2
    return auroc, precision, accuracy, balanced, off, brier, float(found.mean() / truth.mean())


def cut(sites: Mapping[str, Dataset], number: int) -> dict[str, Dataset]:
    """So many sites of patients of one site each, the largest ones cut first."""
    draw = np.random.default_rng(5)
    parts = [(name, draw.permutation(data.patient_count)) for name, data in sites.items()]
    while len(parts) < number:
        largest = max(range(len(parts)), key=lambda i: len(parts[i][1]))
        name, patients = parts.pop(largest)
        parts += [(name, patients[::2]), (name, patients[1::2])]
    return {f"{name}-{i}": _of(sites[name], np.sort(chosen)) for i, (name, chosen) in enumerate(parts)}


def _of(data: Dataset, patients: NDArray[np.int64]) -> Dataset:
    assert isinstance(data, ArrayDataset)  # every set here is small
    number = np.full(data.patient_count, -1, dtype=np.int64)
    number[patients] = np.arange(len(patients))
    kept = np.flatnonzero(number[data.patients] >= 0)
    return replace(
        data,
        inputs=tuple(each[kept] for each in data.inputs),
        labels=tuple(each[kept] for each in data.labels),
        patients=number[data.patients[kept]],
        patient_count=len(patients),
        train=data.train[patients],
        validation=None if data.validation is None else data.validation[patients],
    )


def study_of(
    name: str, form: str, epsilon: float, seed: int, sites: Mapping[str, Dataset], options: argparse.Namespace
) -> Study:
    """The set's contract in that form."""
    setting = SETS[name]
    privacy = {"mode": "dp", "epsilon": epsilon, "delta": setting.delta, "clipping_norm": 1.0}
    source = (name, setting.file) if options.study is None else (options.study, "study.yaml")
    study = contract(*source, seed, **privacy, count_noise=max(10.0, 10.0 / epsilon))
    if form == "local":
        rate = options.rate or LOCAL[name]["lr"][epsilon]
        return changed(study, {**setting.changes, "training.optimizer": {"name": "sgd", "lr": rate}})
    liars = options.colluding if options.colluding is not None else max(1, (len(sites) - 1) // 3)
    honest = {"honest_sites": len(sites) - liars} if form == "shared" else {}
    sharing = {"aggregation.min_sites": len(sites), "aggregation.corrupt_sites": liars}
    counting = {
        "evaluation.epsilon": options.recalibrate * epsilon,
        "evaluation.recalibrate": True,
        "evaluation.metrics": ["auroc", "calibration-intercept", "calibration-slope"],
        "evaluation.every": options.sums,
    }
    everybody = sum(int(each.train.sum()) for each in sites.values())
    return changed(
        study,
        {
            **({} if options.study else setting.changes),
            "training.rounds": options.sums,
            "training.steps_per_round": 1,
            "training.expected_batch": round(options.sampling * everybody),
            "training.optimizer": {"name": "sgd", "lr": options.rate or 1.0},
            "privacy.sums": {"sampling_rate": options.sampling, **(SHARED if form == "shared" else {}), **honest},
            **(sharing if form == "shared" else {}),
            **(counting if options.recalibrate else {}),
            "aggregation.weighting": "patients",
            **({"aggregation.optimizer": json.loads(options.optimizer)} if options.optimizer else {}),
            **({"model": {**study.contract["model"], **json.loads(options.model)}} if options.model else {}),
        },
    )


def split_anew(sites: Mapping[str, Dataset], seed: int) -> dict[str, Dataset]:
    """The sites with as many others held back, each by a draw of its own.

    They are split before anybody cuts them: the same patients are held back, however many sites there are.
    """
    draws = {name: np.random.default_rng([100, seed, place]) for place, name in enumerate(sites)}
    return {name: replace(data, train=draws[name].permutation(data.train)) for name, data in sites.items()}


def with_validation(sites: Mapping[str, Dataset], seed: int) -> dict[str, Dataset]:
    """The sites with half of the patients held back for validation."""
    draw = np.random.default_rng([200, seed])
    return {
        name: replace(data, validation=~data.train & (draw.random(data.patient_count) < 0.5))
        for name, data in sites.items()
    }


def recalibration(study: Study, model: bytes, sites: Mapping[str, Dataset], seed: int) -> Recalibration:
    """Intercept and slope that noised counts of the patients for validation give; 0 and 1 where they support none."""
    figures, total = Figures(study), np.zeros(Layout.of(study).width, dtype=np.int64)
    assert figures.noise is not None  # the contract gives counts an ε
    for site, data in sites.items():
        drawn = hashlib.sha256(f"counts {seed} {site}".encode()).digest()
        total += noised_counts(model, study, data, CPU, noise_multiplier=figures.noise, seed=drawn, of="validation")
    found, _ = figures.of(Opened(np.zeros(0, dtype=np.float32), 0, len(sites), total, None))
    return Recalibration.read(found) or Recalibration(0.0, 1.0)


def in_floats(study: Study, sites: Mapping[str, Dataset], plans: Mapping[str, Plan], seed: int) -> bytes:
    """Model after the study's sums by the formula of its gradients, of a linear model and everybody in every step."""
    draw, start = np.random.default_rng([300, seed]), to_vector(build(study)).astype(np.float64)
    numbers = [data.part("train").records for data in sites.values()]
    inputs = np.concatenate([np.asarray(d.inputs[0])[n] for d, n in zip(sites.values(), numbers, strict=True)])
    classes = np.concatenate([d.targets(n)[0] for d, n in zip(sites.values(), numbers, strict=True)])
    wide, outcome = np.hstack([inputs, np.ones((len(inputs), 1))]).astype(np.float64), np.eye(2)[classes]
    weights = np.hstack([start[:-2].reshape(2, -1), start[-2:, None]])
    plan, training = next(iter(plans.values())), study.training
    assert isinstance(plan, PrivacyPlan) and plan.sampling_rate == 1.0
    deviation = plan.noise_multiplier * plan.clipping_norm * np.sqrt(len(sites))
    for _ in range(training.rounds):
        odds = np.exp(wide @ weights.T)
        off = odds / odds.sum(axis=1, keepdims=True) - outcome
        norms = np.linalg.norm(off, axis=1) * np.linalg.norm(wide, axis=1)
        clipped = (off * np.minimum(1.0, plan.clipping_norm / norms)[:, None]).T @ wide
        noised = clipped + draw.normal(0.0, deviation, clipped.shape)
        weights -= training.optimizer.lr * noised / training.expected_batch
    return pack(np.concatenate([weights[:, :-1].ravel(), weights[:, -1]]).astype(np.float32), study)


def probabilities(
    study: Study, model: bytes, sites: Mapping[str, Dataset]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Class and probability of the second class of each held-back record of all sites."""
    truth, found = [], []
    for data in sites.values():
        chosen = data.part("test").records
        truth.append(data.targets(chosen)[0])
        found.append(measured(model, study, data, CPU, chosen)[:, 1])
    return np.concatenate(truth), np.concatenate(found)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=sorted(LOCAL))
    parser.add_argument("--study", help="another study of the set's files, for the form sums")
    parser.add_argument("--sites", nargs="+", type=int, default=[4])
    parser.add_argument("--epsilon", nargs="+", type=float, default=[1.0, 3.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--forms", nargs="+", choices=("local", "sums", "shared", "floats"), default=["local", "sums"])
    parser.add_argument("--colluding", type=int, help="shared: sites that may collude; fewer than a third by default")
    parser.add_argument("--recalibrate", type=float, default=0.0, help="sums, shared: part of ε for noised counts")
    parser.add_argument("--sums", type=int, default=48)
    parser.add_argument("--sampling", type=float, default=0.25, help="sums: sampling rate")
    parser.add_argument("--rate", type=float, help="learning rate")
    parser.add_argument("--optimizer", help="JSON of the contract's aggregation.optimizer")
    parser.add_argument("--model", help="JSON of keys of the contract's model")
    parser.add_argument("--splits", action="store_true", help="other patients held back with each seed")
    parser.add_argument("--prepared", type=Path, help="keep the prepared files in this folder, one folder a set")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    print(f"| ε | sites | form | {' | '.join(COLUMNS)} |\n|{'---|' * (3 + len(COLUMNS))}", flush=True)
    with tempfile.TemporaryDirectory(prefix="consilium-bench-") as temporary:
        folder = (options.prepared or Path(temporary)) / options.set
        folder.mkdir(parents=True, exist_ok=True)
        name = options.study or options.set
        template = contract(name, "study.yaml" if options.study else SETS[options.set].file)
        with contextlib.redirect_stdout(sys.stderr):
            data = records(name, template, Path(os.environ.get("CONSILIUM_DATA", ".")), folder)
        for epsilon in options.epsilon:
            for number in options.sites:
                natural = hospitals(data)
                for form in options.forms:
                    rows = []
                    for seed in range(options.seeds):
                        split = split_anew(natural, seed) if options.splits else natural
                        split = with_validation(split, seed) if options.recalibrate else split
                        here = split if number == len(natural) else cut(split, number)
                        study = study_of(options.set, form, epsilon, seed, here, options)
                        own = plans(name, study, here, seed)
                        if form == "floats":
                            model = in_floats(study, here, own, seed)
                        else:
                            model = federated(study, here, own, seed)
                        truth, said = probabilities(study, model, here)
                        if options.recalibrate:
                            fitted = recalibration(study, model, here, seed)
                            odds = fitted.intercept + fitted.slope * (np.log(said) - np.log1p(-said))
                            said = 1 / (1 + np.exp(-odds))
                        rows.append(scores(truth, said))
                    print(line(epsilon, number, form, np.array(rows)), flush=True)
                    found.append({"epsilon": epsilon, "sites": number, "form": form, "rows": rows})
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def line(epsilon: float, sites: int, form: str, rows: NDArray[np.float64]) -> str:
    """A row of the table."""
    cells = [f"{mean:.3f} ± {off:.3f}" for mean, off in zip(rows.mean(0), rows.std(0), strict=True)]
    return f"| {epsilon:g} | {sites} | {form} | {' | '.join(cells)} |"


if __name__ == "__main__":
    raise SystemExit(main())
