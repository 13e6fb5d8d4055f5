"""C-index of federated hazards on three published sets, without privacy and at ε 3: a Markdown table.

    CONSILIUM_DATA=FOLDER python tests/bench/survival.py [--sets tcga-brca rotterdam lung] [--seeds 3]

Sites and server are computed in one process (``one_process.py``). TCGA-BRCA has FLamby's covariates, its six regions
as sites and its split; the index is the mean of the regions' test patients, and that of all of them together, whose
pairs may be of two regions. rotterdam has four sites by draw, lung its institutions in four groups; each in five folds
by patient, the same for every seed, and the index of a fold is that of all its test patients. An index is exact, of the
patients' own risks and times, no counts. The settings are those with which a model of this kind was tried on TCGA-BRCA
before, on the same test patients; the other two sets have them without another choice. The figures kept:
``docs/results/survival.md``.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import statistics
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from consilium_client.agent.estimates import make_plan
from consilium_client.data import load
from consilium_client.data.asset import TableAsset
from consilium_client.data.dataset import Dataset
from consilium_client.training.evaluation import measured
from consilium_shared.study import Study
from one_process import CPU, federated

EPSILON, DELTA = 3.0, 1e-3
PLAIN = {
    "rounds": 20,
    "steps_per_round": 20,
    "expected_batch": 64,
    "optimizer": {"name": "adam", "lr": 0.01, "weight_decay": 0.01},
}
PRIVATE = {"rounds": 5, "steps_per_round": 4, "expected_batch": 200, "optimizer": {"lr": 2.0}}
FOLDS, SITES = 5, 4


class Source:
    """One set: a row for each patient with ``patient``, ``site``, ``split``, ``time`` in years, ``event``, features."""

    def __init__(self, name: str, rows: pd.DataFrame, features: list[dict[str, Any]], edges: list[float]) -> None:
        self.name, self.rows, self.features, self.edges = name, rows, features, edges

    def study(self, seed: int, private: bool) -> Study:
        """The contract."""
        privacy = {"epsilon": EPSILON, "delta": DELTA, "clipping_norm": 1.0} if private else {"mode": "none"}
        return Study.model_validate(
            {
                "study": self.name,
                "task": "survival",
                "model": {"name": "linear-hazard", "seed": seed},
                "data": {
                    "asset": "table",
                    "time": {"name": "time"},
                    "event": {"column": "event", "classes": ["0", "1"]},
                    "edges": self.edges,
                    "features": self.features,
                    "missing": "center",
                },
                "training": {**(PRIVATE if private else PLAIN), **({} if private else {"seed": seed})},
                "privacy": privacy,
                "evaluation": {"metrics": ["c-index"], "split": None, "split_column": "split"},
            }
        )

    def folds(self) -> Iterator[pd.DataFrame]:
        """The rows with each split."""
        if "split" in self.rows:
            yield self.rows
            return
        fold = self.rows["patient"].map(lambda name: zlib.crc32(f"fold {name}".encode()) % FOLDS)
        for number in range(FOLDS):
            yield self.rows.assign(split=np.where(fold == number, "test", "train"))


def numeric(name: str, center: float = 0.0, scale: float = 1.0) -> dict[str, Any]:
    """A feature of a contract."""
    return {"name": name, "center": center, "scale": scale}


def member(folder: Path, archive: str, name: str, **options: Any) -> pd.DataFrame:
    """A table in a packed set."""
    with tarfile.open(folder / archive) as packed:
        found = next(each for each in packed.getnames() if each.endswith(name))
        content = packed.extractfile(found)
        assert content is not None
        return pd.read_csv(io.BytesIO(content.read()), **options)


def tcga_brca(folder: Path) -> Source:
    """FLamby's Fed-TCGA-BRCA."""
    rows = member(folder, "flamby_ref.tar.xz", "fed_tcga_brca/brca.csv")
    centers = member(folder, "flamby_ref.tar.xz", "fed_tcga_brca/centers.csv", keep_default_na=False)
    split = member(folder, "flamby_ref.tar.xz", "fed_tcga_brca/dataset_creation_scripts/train_test_split.csv")
    regions = dict(zip(centers["TSS Code"], centers["Region"], strict=True))
    columns = [name for name in rows.columns if name not in ("pid", "E", "T")]
    names = {name: f"x{number}" for number, name in enumerate(columns)}
    made = rows.rename(columns={**names, "pid": "patient"})
    made["site"] = made["patient"].map(lambda name: regions[name.split("-")[1]])
    made["split"] = made["patient"].map(dict(zip(split["pid"], split["fold"], strict=True)))
    made = made.dropna(subset=["split"])  # eight patients of no region
    made["time"], made["event"] = made["T"] / 365.25, made["E"].astype(int)
    features = [numeric(x, 60, 15) if name == "age_at_index" else numeric(x) for name, x in names.items()]
    return Source("tcga-brca", made, features, [0.5, 1, 2, 3, 4, 5, 6, 8, 10])


def rotterdam(folder: Path) -> Source:
    """Death of 2982 patients with breast cancer; four sites by draw."""
    rows = member(folder, "survival_r.tar.xz", "rotterdam.csv", dtype={"pid": str})
    made = pd.DataFrame({"patient": rows["pid"], "time": rows["dtime"] / 365.25, "event": rows["death"]})
    made["site"] = [f"site-{zlib.crc32(name.encode()) % SITES}" for name in rows["pid"]]
    for name in ("age", "meno", "grade", "hormon", "chemo"):
        made[name] = rows[name]
    for name in ("nodes", "pgr", "er"):  # counts and concentrations, over powers of ten
        made[name] = np.log1p(rows[name])
    made["middle"], made["large"] = (rows["size"] == "20-50").astype(int), (rows["size"] == ">50").astype(int)
    scaled = {"age": (55, 12), "grade": (2.5, 0.5), "nodes": (1, 1), "pgr": (4, 2), "er": (4, 2)}
    features = [numeric(x, *scaled.get(x, (0, 1))) for x in made.columns[4:]]
    return Source("rotterdam", made, features, [1, 2, 3, 4, 5, 6, 8, 10, 12, 15])


def lung(folder: Path) -> Source:
    """Death of 228 patients with lung cancer; their institutions in four groups."""
    rows = member(folder, "survival_r.tar.xz", "lung.csv")
    made = pd.DataFrame({"patient": [f"p{number}" for number in range(len(rows))], "time": rows["time"] / 365.25})
    made["event"] = rows["status"] - 1
    made["site"] = [f"site-{int(inst) % SITES}" for inst in rows["inst"].fillna(0)]
    scaled = {
        "age": (62, 9),
        "sex": (1.4, 0.5),
        "ph.ecog": (1, 0.7),
        "ph.karno": (80, 12),
        "pat.karno": (80, 15),
        "meal.cal": (900, 400),
        "wt.loss": (10, 13),
    }
    for name in scaled:
        made[name] = rows[name]
    return Source("lung", made, [numeric(name, *each) for name, each in scaled.items()], [0.25, 0.5, 0.75, 1, 1.5, 2])


SETS = {"tcga-brca": tcga_brca, "rotterdam": rotterdam, "lung": lung}


def index(times: NDArray[Any], events: NDArray[Any], risks: NDArray[Any]) -> float:
    """Harrell's C-index."""
    right = pairs = 0.0
    for at in np.flatnonzero(events):
        later = times > times[at]
        pairs += later.sum()
        right += (risks[at] > risks[later]).sum() + 0.5 * (risks[at] == risks[later]).sum()
    return right / pairs if pairs else float("nan")


def run(source: Source, rows: pd.DataFrame, seed: int, private: bool) -> tuple[float, float]:
    """The mean index of the sites, and that of all test patients together."""
    study, sites = source.study(seed, private), dict[str, Dataset]()
    with tempfile.TemporaryDirectory() as folder:
        for site, part in [*rows.groupby("site"), ("all", rows)]:
            path = Path(folder) / f"{site}.csv"
            part.to_csv(path, index=False)
            sites[str(site)] = load(TableAsset(kind="table", path=path, patient="patient"), study)
    everybody, draw = sites.pop("all"), random.Random(seed)
    noise = study.privacy.count_noise if private else 0.0
    plans = {
        site: make_plan(study, max(1, int(data.train.sum()) + round(draw.gauss(0.0, noise))))
        for site, data in sites.items()
    }
    model = federated(study, sites, plans, seed)

    def of(data: Dataset) -> float:
        held = data.part("test").records
        times, events = data.targets(held)
        return index(times, events, measured(model, study, data, CPU, held)[:, -1])

    known = [found for found in map(of, sites.values()) if np.isfinite(found)]
    return statistics.fmean(known), of(everybody)


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    folder = Path(os.environ["CONSILIUM_DATA"])
    print("| set | sites | privacy | C-index, mean of sites | C-index, all test patients |\n|---|---|---|---|---|")
    for name in asked.sets:
        source = SETS[name](folder)
        for private in (False, True):
            found = [
                np.mean([run(source, rows, seed, private) for rows in source.folds()], axis=0)
                for seed in range(asked.seeds)
            ]
            cells = (
                f"{np.mean(each):.3f} ± {np.std(each, ddof=1) if len(each) > 1 else 0:.3f}"
                for each in np.transpose(found)
            )
            counted = source.rows["site"].value_counts()
            sites = f"{len(counted)}, {counted.min()} to {counted.max()} patients"
            print(f"| {name} | {sites} | {f'ε {EPSILON:g}' if private else 'none'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
