"""FLamby's table of Fed-Heart-Disease with differential privacy, at the ε it names and the ε its runs cost.

    CONSILIUM_DATA=FOLDER python tests/bench/heart_disease_dp.py [--seeds 5] [--json FILE]

FLamby (Ogier du Terrail et al. 2022; ``flamby/dp_example`` and ``flamby/strategies`` in its repository) asks Opacus for
the noise of 15 epochs, its number of rounds, at sampling rate 1 / batches of an epoch, and runs 15 rounds of 100 steps.
The true ε below is that of 1500 steps with this noise, by our accountant, *if* its batches were Poisson samples. They
are not: they come from the shuffled loader, the private one is set aside. No ε is proved for what it ran.
The noise is taken by Opacus' Rényi accountant, its default until version 1.2 (2022); by the later default, which gives
less noise, every true ε would be larger.

Ours: the task's ``studies/heart-disease/study-dp.yaml``, its settings unchanged, ε and δ replaced, the noise from the
steps that run and from the release of the noised number of patients. That number has 10 / ε patients of noise where ε
is below 1: with 10, it alone would cost more than 0.1.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opacus.accountants.utils import get_noise_multiplier

from consilium_deploy.real_data import POOLED
from consilium_shared.errors import BudgetRefused, ConfigurationError, PolicyRefusal
from consilium_shared.privacy.accountant import check_delta, epsilon
from consilium_shared.privacy.event import DpSgdEvent
from one_process import contract, federated, hospitals, plans, records, values

NAME = "heart-disease"
PUBLISHED = {
    (0.1, 1e-1): (0.711, 0.029),
    (0.1, 1e-2): (0.667, 0.052),
    (0.1, 1e-3): (0.629, 0.086),
    (0.1, 1e-4): (0.606, 0.121),
    (1.0, 1e-1): (0.703, 0.045),
    (1.0, 1e-2): (0.706, 0.038),
    (1.0, 1e-3): (0.702, 0.044),
    (1.0, 1e-4): (0.685, 0.055),
    (5.0, 1e-1): (0.705, 0.036),
    (5.0, 1e-2): (0.700, 0.043),
    (5.0, 1e-3): (0.700, 0.041),
    (5.0, 1e-4): (0.704, 0.049),
    (10.0, 1e-1): (0.698, 0.039),
    (10.0, 1e-2): (0.700, 0.051),
    (10.0, 1e-3): (0.698, 0.043),
    (10.0, 1e-4): (0.700, 0.055),
    (50.0, 1e-1): (0.704, 0.046),
    (50.0, 1e-2): (0.703, 0.043),
    (50.0, 1e-3): (0.700, 0.040),
    (50.0, 1e-4): (0.702, 0.052),
}
"""(nominal ε, δ): accuracy, mean of the four centres, mean and standard deviation over FLamby's five seeds. Source:
``flamby/dp_example/results_fed_heart_disease.csv`` of its repository."""

PUBLISHED_WITHOUT_PRIVACY = (0.712, 0.024)
"""The same runs without privacy, same source."""

BATCH, ROUNDS, UPDATES = 4, 15, 100
"""FLamby's: records in a batch (``fed_heart_disease/common.py``), rounds, steps of each."""

LEGEND = """
Accuracy at 0.5, mean ± sd over seeds. FLamby: its published mean of the four centres, and at each centre the true ε of
its 1500 steps. Ours: mean of the four centres, pooled test part; first at the ε named, then at FLamby's largest true ε.
"""


class Bench:
    """The set, prepared once, and how often each study runs."""

    def __init__(self, source: Path, folder: Path, seeds: int) -> None:
        self.data = records(NAME, contract(NAME, "study-dp.yaml"), source, folder)
        self.sites = hospitals(self.data)
        self.seeds = seeds

    def patients(self) -> dict[str, int]:
        """Patients to train on, by centre."""
        return {site: int(part.train.sum()) for site, part in self.sites.items()}

    def accuracy(self, file: str, **privacy: Any) -> dict[str, Any]:
        """Accuracy as mean of the four centres and on the pooled test part: ``[mean, sd]`` over the seeds.

        With parameters under which no site would take part: ``refused``, the first site's reason.
        """
        means, pooled = [], []
        for seed in range(self.seeds):
            study = contract(NAME, file, seed, **privacy)
            try:
                planned = plans(NAME, study, self.sites, seed)
            except BudgetRefused as error:
                return {"refused": str(error)}
            except PolicyRefusal as error:
                return {"refused": str(error.__cause__)}
            found = values(study, federated(study, self.sites, planned, seed), self.data, "accuracy")
            pooled.append(found.pop(POOLED))
            means.append(statistics.fmean(found.values()))
        return {"mean_of_centres": _spread(means), "pooled": _spread(pooled)}

    def private(self, epsilon: float, delta: float) -> dict[str, Any]:
        """Ours at a true ε."""
        count_noise = max(10.0, 10.0 / epsilon)
        return self.accuracy("study-dp.yaml", epsilon=epsilon, delta=delta, count_noise=count_noise)


def _spread(found: list[float]) -> list[float]:
    return [statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0]


def flamby_noise(nominal: float, delta: float, patients: int) -> tuple[float, float]:
    """(q, σ) of FLamby's steps at a centre: what Opacus gives for 15 epochs at the loader's rate."""
    rate = 1 / math.ceil(patients / BATCH)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus on the range of its Rényi orders
        sigma = get_noise_multiplier(
            target_epsilon=nominal, target_delta=delta, sample_rate=rate, epochs=ROUNDS, accountant="rdp"
        )
    return rate, sigma


def flamby_epsilon(nominal: float, delta: float, patients: int) -> float | None:
    """ε of FLamby's 1500 steps at a centre, were they on Poisson samples; None where δ >= 1 / patients says nothing."""
    try:
        check_delta(delta, patients)
    except ConfigurationError:
        return None
    rate, sigma = flamby_noise(nominal, delta, patients)
    return epsilon([DpSgdEvent(rate, sigma, ROUNDS * UPDATES)], delta)


def rows(bench: Bench) -> Iterator[dict[str, Any]]:
    """One row a setting: first without privacy, then each of FLamby's."""
    plain = {"flamby": list(PUBLISHED_WITHOUT_PRIVACY)}
    yield {"setting": "none, study.yaml", **plain, "ours": bench.accuracy("study.yaml")}
    yield {"setting": "none, study-dp.yaml", **plain, "ours": bench.accuracy("study-dp.yaml", mode="none")}
    for (nominal, delta), published in PUBLISHED.items():
        true = {site: flamby_epsilon(nominal, delta, count) for site, count in bench.patients().items()}
        row = {"setting": f"ε {nominal:g}, δ {delta:g}", "nominal_epsilon": nominal, "delta": delta}
        row |= {"flamby": list(published), "flamby_true_epsilon": true, "ours": bench.private(nominal, delta)}
        if None not in true.values():
            worst = max(value for value in true.values() if value is not None)
            row |= {"largest_true_epsilon": worst, "ours_at_largest": bench.private(worst, delta)}
        yield row


def _line(row: dict[str, Any], centres: list[str]) -> str:
    true = row.get("flamby_true_epsilon", dict.fromkeys(centres))
    cells = [f"{row['setting']:<20}", _number(row["flamby"]), *(_epsilon(true[site]) for site in centres)]
    cells += [_result(row["ours"]), _epsilon(row.get("largest_true_epsilon")), _result(row.get("ours_at_largest"))]
    return "  ".join(cells).rstrip()


def _number(found: list[float]) -> str:
    return f"{found[0]:.3f} ± {found[1]:.3f}"


def _epsilon(value: float | None) -> str:
    return f"{'–' if value is None else f'{value:.3g}':>6}"


def _result(found: dict[str, Any] | None) -> str:
    if found is None or "refused" in found:
        return f"{'–' if found is None else 'refused':<29}"
    return f"{_number(found['mean_of_centres'])}  {_number(found['pooled'])}"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of ours for each setting")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    options = parser.parse_args(arguments)
    source = os.environ.get("CONSILIUM_DATA")
    if not source:
        parser.error(
            "CONSILIUM_DATA does not name the folder with heart_disease.tar.xz; the set is published by the UCI "
            "Machine Learning Repository, archive.ics.uci.edu, data set 45 (docs/results/published-data.md)"
        )
    with tempfile.TemporaryDirectory(prefix="consilium-bench-") as folder:
        bench = Bench(Path(source), Path(folder), options.seeds)
        centres = list(bench.sites)
        print(LEGEND)
        heads = ["setting".ljust(20), "FLamby".ljust(13), *(site[:6].rjust(6) for site in centres)]
        heads += ["ours at the ε named".ljust(29), "FL. ε".rjust(6), "ours at that ε"]
        print("  ".join(heads))
        found, refusals = [], dict[str, None]()
        for row in rows(bench):
            found.append(row)
            print(_line(row, centres), flush=True)
            refused = [row[key].get("refused") for key in ("ours", "ours_at_largest") if key in row]
            refusals |= {reason: None for reason in refused if reason}
    for reason in refusals:
        print(f"refused: {reason}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
