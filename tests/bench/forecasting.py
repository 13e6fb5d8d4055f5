"""Errors of federated forecasts on two published sets, without privacy and at ε 3: a Markdown table.

    CONSILIUM_DATA=FOLDER python tests/bench/forecasting.py [--sets glucose heart-rate] [--folds 3]

Sites and server are computed in one process (``one_process.py``). A row is what was known of a patient at one time.
Folds are by patient: no patient of a test fold was trained on. The rivals see the same rows: the last value, and AR
models of each patient's own past, fitted anew for every row by least squares. The figures kept:
``docs/results/forecasting.md``.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from consilium_client.agent.estimates import make_plan
from consilium_client.data import load
from consilium_client.data.asset import TableAsset
from consilium_client.training.evaluation import measured
from consilium_shared.study import Study
from one_process import CPU, federated

PLAIN = {"rounds": 10, "steps_per_round": 20, "expected_batch": 64, "optimizer": {"name": "adam", "lr": 0.01}}
PRIVATE = {"rounds": 5, "steps_per_round": 4, "expected_batch": 1000, "optimizer": {"lr": 0.3}}
SITES = 4
Vector = NDArray[np.float64]


def members(archive: Path) -> Iterator[tuple[str, str]]:
    """Name and text of each file of a packed set."""
    with tarfile.open(archive) as packed:
        for each in packed:
            content = packed.extractfile(each)
            if content is not None:
                yield Path(each.name).name, content.read().decode("latin-1")


def autoregressed(past: Vector, steps: int, order: int, differences: int) -> Vector:
    """Next values ``[steps]`` of a series by ARIMA(order, differences, 0), fitted to its last 100 by least squares.

    The last value where the past is too short to fit, and never beyond the range of the past.
    """
    known = np.diff(past[-100:], n=differences)
    if len(known) < 2 * order + 3:
        return np.full(steps, past[-1])
    windows = np.lib.stride_tricks.sliding_window_view(known, order + 1)
    design = np.column_stack([np.ones(len(windows)), windows[:, :-1]])
    weights = np.linalg.lstsq(design, windows[:, -1], rcond=None)[0]
    found = list(known)
    for _ in range(steps):
        found.append(float(weights[0] + weights[1:] @ np.array(found[-order:])))
    ahead = np.array(found[len(known) :])
    return np.asarray(np.clip(past[-1] + np.cumsum(ahead) if differences else ahead, past.min(), past.max()))


RIVALS: dict[str, Callable[[Vector, int], Vector]] = {
    "last value": lambda past, steps: np.full(steps, past[-1]),
    "each patient's mean so far": lambda past, steps: np.full(steps, past.mean()),
    "each patient's ARIMA(1,0,0)": lambda past, steps: autoregressed(past, steps, 1, 0),
    "each patient's ARIMA(2,0,0)": lambda past, steps: autoregressed(past, steps, 2, 0),
    "each patient's ARIMA(1,1,0)": lambda past, steps: autoregressed(past, steps, 1, 1),
}


def row_of(past: Vector, name: str, horizons: list[int], further: dict[str, float]) -> dict[str, Any]:
    """Features of a series' past ``[n]``, and what the rivals say of each horizon."""
    row: dict[str, Any] = {name: past[-1], "before": past[-2], "mean6": past[-6:].mean(), "mean": past.mean()}
    for rival, function in RIVALS.items():
        found = function(past, max(horizons))
        row |= {f"{rival} {horizon}": found[horizon - 1] for horizon in horizons}
    return row | further


def glucose(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The next blood glucose of 70 patients with diabetes, at each measurement from the eighth on."""
    rows = []
    for file, text in members(folder / "uci_diabetes_cgm.tar.xz"):
        if not file.startswith("data-"):
            continue
        lines = []
        for line in text.splitlines():
            try:
                day, clock, code, value = line.split("\t")
                when = datetime.strptime(f"{day} {clock}", "%m-%d-%Y %H:%M")
                lines.append((when.toordinal() * 24 + when.hour + when.minute / 60, int(code), float(value)))
            except ValueError:
                continue  # malformed, of which the set has some
        lines.sort(key=lambda each: each[0])
        hours, codes, numbers = np.array(lines).T
        is_glucose = np.isin(codes, [48, *range(57, 65)]) & (numbers >= 20) & (numbers <= 600)
        is_insulin = np.isin(codes, [33, 34, 35]) & (numbers >= 0) & (numbers <= 100)
        times, values = hours[is_glucose], numbers[is_glucose]
        given, doses = hours[is_insulin], numbers[is_insulin]
        for at in range(7, len(values) - 1):
            turn = 2 * np.pi * times[at] / 24
            further = {
                "sine": np.sin(turn),
                "cosine": np.cos(turn),
                "insulin": doses[(given > times[at] - 6) & (given <= times[at])].sum(),
                "day_ago": values[np.abs(times[at] - times[:at] - 18).argmin()],
            }
            row = row_of(values[: at + 1], "glucose", [1], further)
            rows.append({"patient": file, "record": f"{file}-{at}", "target1": values[at + 1], **row})
    made = pd.DataFrame(rows)
    made["site"] = [f"site-{zlib.crc32(name.encode()) % SITES}" for name in made["patient"]]
    target = {"center": 150, "scale": 80, "low": 0, "high": 650}
    levels = [{"name": name, "center": 150, "scale": 80} for name in ("glucose", "before", "mean6", "mean", "day_ago")]
    features = [*levels, {"name": "sine"}, {"name": "cosine"}, {"name": "insulin", "scale": 10}]
    return made, {"targets": [{"name": "target1", "last": "glucose", **target}], "features": features}


def heart_rate(folder: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Heart rate one, three and six hours after the first day of an ICU stay, hourly means; sites are kinds of ICU."""
    rows, horizons, now = [], [1, 3, 6], 24
    for file, text in members(folder / "physionet2012_set_a.tar.xz"):
        if not file.removesuffix(".txt").isdigit():
            continue
        start, found = dict[str, float](), dict[str, list[tuple[int, float]]]()
        for line in text.splitlines()[1:]:
            clock, name, value = line.split(",")
            if not name or not value:
                continue
            hour = int(clock[:2]) + int(clock[3:]) / 60
            if hour == 0:
                start.setdefault(name, float(value))
            found.setdefault(name, []).append((math.ceil(hour), float(value)))
        pulse = dict[int, list[float]]()
        for at, beats in found.get("HR", []):
            if 20 <= beats <= 250:
                pulse.setdefault(at, []).append(beats)
        past = np.array([np.mean(pulse[hour]) for hour in sorted(pulse) if hour <= now])
        if len(past) < 6 or not pulse.keys() >= {now, *(now + each for each in horizons)}:
            continue
        further = {"age": start.get("Age", 65.0)}
        for name, usual in (("Temp", 37.0), ("MAP", 80.0), ("GCS", 12.0)):
            known = [number for at, number in found.get(name, []) if at <= now and number > 0]
            further[name] = known[-1] if known else usual
        row = row_of(past, "HR", horizons, further)
        later = {f"target{each}": np.mean(pulse[now + each]) for each in horizons}
        rows.append({"patient": file, "record": file, "site": f"icu-{start['ICUType']:.0f}", **later, **row})
    target = {"center": 87, "scale": 15, "low": 0, "high": 300, "last": "HR"}
    levels = [{"name": name, "center": 87, "scale": 15} for name in ("HR", "before", "mean6", "mean")]
    others = {"age": (65, 15), "Temp": (37, 1), "MAP": (80, 15), "GCS": (12, 4)}
    features = [*levels, *({"name": name, "center": c, "scale": s} for name, (c, s) in others.items())]
    targets = [{"name": f"target{each}", **target} for each in horizons]
    return pd.DataFrame(rows), {"targets": targets, "features": features}


SETS = {"glucose": glucose, "heart-rate": heart_rate}


def study_of(name: str, model: str, parts: dict[str, Any], private: bool) -> Study:
    """The contract."""
    repeated = {"records_per_patient": 8} if name == "glucose" else {}
    privacy = {"epsilon": 3.0, "delta": 1e-3, "clipping_norm": 1.0} if private else {"mode": "none"}
    return Study.model_validate(
        {
            "study": name,
            "task": "forecasting",
            "model": {"name": model},
            "data": {"asset": "table", **parts},
            "training": PRIVATE | repeated if private else PLAIN | {"seed": 0},
            "privacy": privacy,
            "evaluation": {"metrics": ["rmse"], "split": None, "split_column": "split"},
        }
    )


def errors(study: Study, rows: pd.DataFrame) -> Vector:
    """Errors ``[n, T]`` of the federated model on the test patients, in the targets' unit."""
    sites, draw = {}, random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        for site, part in [*rows.groupby("site"), ("all", rows)]:
            path = Path(folder) / f"{site}.csv"
            part.to_csv(path, index=False)
            sites[str(site)] = load(TableAsset(kind="table", path=path, patient="patient", record="record"), study)
    everybody = sites.pop("all")
    noise = study.privacy.count_noise if study.privacy.mode == "dp" else 0.0
    plans = {
        site: make_plan(study, max(1, int(data.train.sum()) + round(draw.gauss(0.0, noise))))
        for site, data in sites.items()
    }
    model = federated(study, sites, plans)
    held = everybody.part("test").records
    found = measured(model, study, everybody, CPU, held)
    true = np.stack(everybody.targets(held)[: found.shape[1]], axis=1)
    scales = [target["scale"] for target in study.contract["data"]["targets"]]
    return np.asarray((found - true) * scales)


MODELS = (
    ("federated linear, no privacy", "linear-forecast", False),
    ("federated linear, ε 3", "linear-forecast", True),
    ("federated MLP, no privacy", "mlp-forecast", False),
)


def line(name: str, label: str, folds: list[Vector]) -> str:
    """Line of the table, of the errors ``[n, T]`` in each fold."""
    roots = np.array([np.sqrt((each**2).mean(axis=0)) for each in folds])
    mean, spread = roots.mean(axis=0), roots.std(axis=0, ddof=1)
    cells = ", ".join(f"{a:.2f} ± {b:.2f}" for a, b in zip(mean, spread, strict=True))
    return f"| {name} | {label} | {cells} | {np.mean([np.abs(each).mean() for each in folds]):.2f} |"


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--folds", type=int, default=3)
    asked = parser.parse_args()
    print("| set | forecast | RMSE by horizon, mean of folds ± deviation | MAE |\n|---|---|---|---|")
    for name in asked.sets:
        rows, parts = SETS[name](Path(os.environ["CONSILIUM_DATA"]))
        horizons = [target["name"].removeprefix("target") for target in parts["targets"]]
        fold = rows["patient"].map(lambda each: zlib.crc32(f"fold {each}".encode()) % asked.folds)
        splits = [rows.assign(split=np.where(fold == number, "test", "train")) for number in range(asked.folds)]
        print(f"{name}: {len(rows)} rows of {rows['patient'].nunique()} patients", flush=True)
        for rival in RIVALS:
            tests = [each[each["split"] == "test"] for each in splits]
            said = [np.stack([each[f"{rival} {h}"] - each[f"target{h}"] for h in horizons], axis=1) for each in tests]
            print(line(name, rival, said), flush=True)
        for label, model, private in MODELS:
            study = study_of(name, model, parts, private)
            print(line(name, label, [errors(study, each) for each in splits]), flush=True)


if __name__ == "__main__":
    main()
