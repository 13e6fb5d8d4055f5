"""What private training of a part, from weights that were trained elsewhere without privacy, gains and sends.

    CONSILIUM_DATA=FOLDER python tests/bench/dp_finetune.py [--sets SET ...] [--seeds 5] [--json FILE]

Two cases, each with hospitals whose patients the privacy is for, and with something public to pretrain on:

* ``physionet2012``: death in intensive care, from summaries of the first 48 hours; an mlp. The cardiac units (CCU and
  CSRU, 1451 stays) stand for a set that somebody published; the general ones (MICU, SICU) are two hospitals, and none
  of their stays is in the public part. Other patients of another kind, of the same hospital and years.
* ``pneumoniamnist``: radiographs of children; small-cnn. Public are generated textures, and nobody's images: which of
  16 orientations and scales a band of noise has. All published training images are private, in four hospitals.

Every run is the study's rounds as ``one_process`` computes them: each site's own noise, the server's mean of the
encoded updates. AUROC on patients held back at the private hospitals alone, pooled. Each learning rate is the best of
four on seeds that are not reported; that choice looks at the held-back patients and its runs are not charged, for
every row alike. The row ``nothing`` is the pretrained model as it is, without any private training.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tests.support.records import dataset

from consilium_client.commands.baseline import train_alone
from consilium_client.data.dataset import ArrayDataset
from consilium_shared.models import start
from consilium_shared.models.vector import Vector, pack, width
from consilium_shared.study import Study
from one_process import contract, federated, plans, records, values

RATES, TUNING_SEED = (0.25, 1.0, 4.0, 16.0), 100
ROWS: tuple[tuple[str, bool, dict[str, Any]], ...] = (
    ("all, from the seed", False, {}),
    ("all", True, {}),
    ("lora, rank 4", True, {"trainable": "lora", "lora_rank": 4}),
    ("head", True, {"trainable": "head"}),
)
"""Name, whether it starts from the pretrained weights, and the model's further fields."""

SUMMARIES = ("mean", "least", "most", "last")
ORIENTATIONS, SCALES, EDGE = 8, (5.0, 10.0), 28
HELD_BACK = 0.3

POOLED = "pooled"


@dataclass(frozen=True)
class Case:
    """A public study, and a private one with its hospitals' records.

    Attributes:
        public, private: as contracts; of ``private`` privacy, seed, rate and model are replaced.
        pretraining: records for the public study.
        hospitals: a seed's split: records by site, and ``pooled`` of all.
        new_head: whether the public classes are others.
    """

    name: str
    public: Study
    private: Study
    pretraining: ArrayDataset
    hospitals: Callable[[int], Mapping[str, ArrayDataset]]
    new_head: bool


def changed(study: Study, rate: float | None = None, epsilon: float | None = None, **model: Any) -> Study:
    """The study with another learning rate, ε (None: without privacy) and fields of the model."""
    content = study.contract
    content["model"].update(model)
    if rate is not None:
        content["training"]["optimizer"].update(name="sgd", lr=rate)
    if epsilon is not None:
        private = {"mode": "dp", "epsilon": epsilon, "delta": 1e-4, "clipping_norm": 1.0}
        content["privacy"].update(private)
    return Study.from_contract(content)


def tables(name: str, names: list[str], classes: list[str], **training: Any) -> Study:
    """A study of an mlp on numbers that are prepared already."""
    return Study.model_validate(
        {
            "study": name,
            "task": "tabular-classification",
            "model": {"name": "mlp", "hidden": 64},
            "data": {
                "asset": "stays",
                "label": {"column": "death", "classes": classes},
                "features": [{"name": each} for each in names],
            },
            "training": {"optimizer": {"lr": 1.0}, **training},
            "privacy": {"mode": "none"},
            "evaluation": {"split": None, "split_column": "split"},
        }
    )


def images(name: str, classes: list[str], **training: Any) -> Study:
    """A study of small-cnn on 28 × 28 images."""
    return Study.model_validate(
        {
            "study": name,
            "task": "image-classification",
            "model": {"name": "small-cnn", "hidden": 32},
            "data": {"asset": "images", "label": {"column": "y", "classes": classes}, "image": {"size": EDGE}},
            "training": {"optimizer": {"lr": 1.0}, **training},
            "privacy": {"mode": "none"},
            "evaluation": {"split": None, "split_column": "split"},
        }
    )


def table(inputs: npt.NDArray[Any], labels: npt.NDArray[Any], train: npt.NDArray[np.bool_]) -> ArrayDataset:
    """Records with one patient each."""
    count = len(labels)
    return dataset(
        inputs=np.ascontiguousarray(inputs, dtype=np.float32),
        statics=None,
        labels=np.asarray(labels, dtype=np.int64),
        patients=np.arange(count),
        patient_count=count,
        train=train,
    )


def joined(parts: list[ArrayDataset]) -> ArrayDataset:
    """The records of several sites together."""
    inputs, labels = np.concatenate([p.inputs[0] for p in parts]), np.concatenate([p.labels[0] for p in parts])
    return table(inputs, labels, np.concatenate([p.train for p in parts]))


def physionet(source: Path, folder: Path) -> Case:
    """Cardiac units as the public set, general ones as two hospitals."""
    series = contract("physionet2012", "study.yaml")
    assert series.data.series is not None
    variables = [each.name for each in series.data.series.variables]
    names = [f"{name} {what}" for what in SUMMARIES for name in variables]
    names += [f"{name} seen" for name in variables] + [each.name for each in series.data.series.statics]
    found = {site: _summaries(part) for site, part in records("physionet2012", series, source, folder).items()}
    shared: dict[str, Any] = {"names": names, "classes": ["0", "1"]}
    plain = {"rounds": 1, "steps_per_round": 150, "expected_batch": 64, "optimizer": {"name": "adam", "lr": 0.001}}
    public = tables("icu-public", **shared, **{**plain, "seed": 0})
    private = tables("icu-private", **shared, rounds=6, steps_per_round=5, expected_batch=256)

    def hospitals(seed: int) -> Mapping[str, ArrayDataset]:
        draw = np.random.default_rng(seed)
        units = ("micu", "sicu")
        parts = {u: replace(found[u], train=draw.random(found[u].patient_count) >= HELD_BACK) for u in units}
        return {**parts, POOLED: joined(list(parts.values()))}

    return Case("physionet2012", public, private, joined([found["ccu"], found["csru"]]), hospitals, new_head=False)


def _summaries(part: ArrayDataset) -> ArrayDataset:
    """A stay's series as one row: of every variable the mean, extremes and last value, and how often it was seen."""
    width_ = part.inputs[0].shape[2] // 3
    value, mask = part.inputs[0][:, :, :width_], part.inputs[0][:, :, width_ : 2 * width_]
    seen = mask.sum(axis=1)
    none = seen == 0
    rows = [(value * mask).sum(axis=1) / np.maximum(seen, 1)]
    rows += [np.where(mask > 0, value, np.inf).min(axis=1), np.where(mask > 0, value, -np.inf).max(axis=1)]
    rows.append(value[:, -1])
    rows = [np.clip(np.where(none, 0.0, row), -5.0, 5.0) for row in rows]
    everyone = np.ones(len(part.labels[0]), dtype=bool)
    return table(np.hstack([*rows, seen / mask.shape[1], part.inputs[1]]), part.labels[0], everyone)


def pneumonia(source: Path, _: Path) -> Case:
    """Textures as the public set, all radiographs in four hospitals."""
    with np.load(source / "pneumoniamnist_trainval.npz", allow_pickle=False) as data:
        pixels = np.concatenate([data["train_images"], data["val_images"]])[:, None] / 255.0
        labels = np.concatenate([data["train_labels"], data["val_labels"]]).reshape(-1)
        train = np.arange(len(labels)) < len(data["train_labels"])
    whole = table(pixels, labels, train)
    plain = {"rounds": 1, "steps_per_round": 500, "expected_batch": 64, "optimizer": {"name": "adam", "lr": 0.003}}
    kinds = [f"t{i}" for i in range(ORIENTATIONS * len(SCALES))]
    public = images("textures", kinds, **{**plain, "seed": 0})
    private = images("radiographs", ["normal", "pneumonia"], rounds=5, steps_per_round=6, expected_batch=128)

    def hospitals(seed: int) -> Mapping[str, ArrayDataset]:
        order = np.random.default_rng(seed).permutation(len(labels))
        parts = [table(pixels[each], labels[each], train[each]) for each in np.array_split(order, 4)]
        return {**{f"site-{'abcd'[i]}": part for i, part in enumerate(parts)}, POOLED: whole}

    return Case("pneumoniamnist", public, private, textures(8000), hospitals, new_head=True)


def textures(count: int) -> ArrayDataset:
    """Noise through a band-pass filter of one of 16 orientations and scales, with random brightness and contrast."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, ORIENTATIONS * len(SCALES), count)
    frequency = np.fft.fftfreq(EDGE)
    y, x = np.meshgrid(frequency, frequency, indexing="ij")
    angle, radius = np.arctan2(y, x), np.hypot(y, x)
    pixels = np.empty((count, 1, EDGE, EDGE), dtype=np.float32)
    for row, label in enumerate(labels):
        turn = np.pi * (label % ORIENTATIONS) / ORIENTATIONS
        away = np.abs((angle - turn + np.pi / 2) % np.pi - np.pi / 2)
        length = SCALES[label // ORIENTATIONS]
        band = np.exp(-((away / 0.25) ** 2) - ((radius * length - 1.0) / 0.4) ** 2)
        image = np.fft.ifft2(np.fft.fft2(draw.normal(size=(EDGE, EDGE))) * band).real
        image = image / image.std() * draw.uniform(0.05, 0.25) + draw.uniform(0.3, 0.7)
        pixels[row, 0] = np.clip(image + draw.normal(scale=0.05, size=image.shape), 0.0, 1.0)
    return table(pixels, labels, np.ones(count, dtype=bool))


class Bench:
    """One case; each model is pretrained once."""

    def __init__(self, case: Case, folder: Path, tuning: int) -> None:
        """``tuning``: on how many seeds each learning rate is chosen."""
        self.case, self.tuning = case, range(TUNING_SEED, TUNING_SEED + tuning)
        self.file = folder / f"{case.name}.safetensors"
        self.file.write_bytes(train_alone(case.public, case.pretraining, "cpu"))

    def study(self, row: tuple[str, bool, dict[str, Any]], rate: float, epsilon: float, seed: int) -> Study:
        """The private study of a row."""
        return changed(self.case.private, rate, epsilon, seed=seed, **row[2])

    def pretrained(self, study: Study) -> Vector:
        """The pretrained weights in this study's model."""
        return start.read(self.file, study, new_head=self.case.new_head).vector

    def auroc(self, row: tuple[str, bool, dict[str, Any]], rate: float, epsilon: float, seed: int) -> float:
        """Of one run."""
        study, data = self.study(row, rate, epsilon, seed), self.case.hospitals(seed)
        sites = {site: part for site, part in data.items() if site != POOLED}
        vector = self.pretrained(study) if row[1] else None
        model = federated(study, sites, plans(self.case.name, study, sites, seed), seed, vector)
        return values(study, model, {POOLED: data[POOLED]}, "auroc")[POOLED]

    def tuned(self, row: tuple[str, bool, dict[str, Any]], epsilon: float) -> float:
        """The best learning rate."""
        return max(
            RATES, key=lambda rate: statistics.fmean(self.auroc(row, rate, epsilon, seed) for seed in self.tuning)
        )

    def untrained(self, seeds: int) -> list[float]:
        """AUROC of the pretrained model itself."""
        found = []
        for seed in range(seeds):
            study = changed(self.case.private, seed=seed)
            model, data = pack(self.pretrained(study), study), self.case.hospitals(seed)
            found.append(values(study, model, {POOLED: data[POOLED]}, "auroc")[POOLED])
        return found


def _spread(found: list[float]) -> str:
    return f"{statistics.fmean(found):.3f} ± {statistics.stdev(found) if len(found) > 1 else 0.0:.3f}"


CASES: dict[str, Callable[[Path, Path], Case]] = {"physionet2012": physionet, "pneumoniamnist": pneumonia}


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=sorted(CASES), default=sorted(CASES))
    parser.add_argument("--seeds", type=int, default=5, help="reported runs of each setting")
    parser.add_argument("--tuning-seeds", type=int, default=2, help="runs on which each learning rate is chosen")
    parser.add_argument("--epsilon", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args(arguments)
    source = os.environ.get("CONSILIUM_DATA")
    if not source:
        parser.error("CONSILIUM_DATA does not name the folder of published sets (docs/results/published-data.md)")
    found = []
    for name in options.sets:
        with tempfile.TemporaryDirectory(prefix="consilium-bench-") as folder, tempfile.TemporaryDirectory() as kept:
            bench = Bench(CASES[name](Path(source), Path(folder)), Path(kept), options.tuning_seeds)
            epsilons = " | ".join(f"AUROC at ε {epsilon:g}" for epsilon in options.epsilon)
            print(f"{name}\n| trained | learning rates | numbers sent | bytes a round | {epsilons} |", flush=True)
            if not bench.case.new_head:
                alone = bench.untrained(options.seeds)
                print(f"| nothing: the start | | 0 | 0 | {' | '.join([_spread(alone)] * len(options.epsilon))} |")
                found.append({"set": name, "trained": "nothing", "auroc": alone})
            for row in ROWS:
                rates = {e: bench.tuned(row, e) for e in options.epsilon}
                by = {e: [bench.auroc(row, rates[e], e, seed) for seed in range(options.seeds)] for e in rates}
                study = bench.study(row, RATES[0], options.epsilon[0], 0)
                sent, size = width(study), study.aggregation.ring_bits // 8 * width(study)
                cells = " | ".join(_spread(each) for each in by.values())
                chosen = ", ".join(f"{rate:g}" for rate in rates.values())
                print(f"| {row[0]} | {chosen} | {sent} | {size} | {cells} |", flush=True)
                found.append({"set": name, "trained": row[0], "rates": rates, "sent": sent, "bytes": size, "auroc": by})
    if options.json:
        options.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
