"""What a round costs outside training: four sites of real processes, a model of 13 numbers, one step a round.

    python tests/bench/round_cost.py [--rounds 20]

Prints seconds as JSON: medians of the three exchanges, and of a whole round. Evaluation rides on the training exchange.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import yaml

from consilium_deploy.local import LocalFederation

SITES = ("site-a", "site-b", "site-c", "site-d")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="consilium-bench-") as folder:
        root = Path(folder)
        draw = np.random.default_rng(0)
        configs = {}
        for site in SITES:
            rows = [
                f"{site}{i},{'ab'[i % 2]}," + ",".join(f"{v:.3f}" for v in draw.normal(size=12)) for i in range(100)
            ]
            header = "patient,label," + ",".join(f"x{i}" for i in range(12))
            (root / f"{site}.csv").write_text(header + "\n" + "\n".join(rows) + "\n")
            asset = {"kind": "table", "path": str(root / f"{site}.csv")}
            policy = {"budgets": {"table": {"epsilon": 10.0, "delta": 1e-3}}}
            configs[site] = yaml.safe_dump(
                {"site": site, "assets": {"table": asset}, "policy": policy, "device": "cpu"}
            )
        study = {
            "study": "bench",
            "task": "tabular-classification",
            "model": {"name": "logistic"},
            "data": {
                "asset": "table",
                "label": {"column": "label", "classes": ["a", "b"]},
                "features": [{"name": f"x{i}"} for i in range(12)],
            },
            "training": {"rounds": rounds, "steps_per_round": 1, "expected_batch": 16, "optimizer": {"lr": 0.1}},
            "privacy": {"epsilon": 5.0, "delta": 1e-3, "clipping_norm": 1.0},
            "aggregation": {"min_sites": 4},
        }
        (root / "study.yaml").write_text(yaml.safe_dump(study))
        with LocalFederation(root / "f", configs) as federation:
            federation.provision()
            federation.up()
            federation.at_server("run", "--detach", root / "study.yaml")
            federation.approve("bench")
            federation.wait(lambda: federation.state("bench") == "finished", "the study ends", "server", 900)
            events = federation.events("bench")
        print(json.dumps(measure(events, rounds), indent=2))


def measure(events: list[dict[str, object]], rounds: int) -> dict[str, float]:
    """Medians over all rounds but the first and the last."""
    begun = {(e["round"], e["phase"]): float(str(e["time"])) for e in events if e["event"] == "round"}
    closed = {e["round"]: float(str(e["time"])) for e in events if e["event"] == "closed"}
    middle = range(2, rounds)  # the first finds cold caches, the last has a sum of counts of its own
    training = [begun[n, "survivors"] - begun[n, "training"] for n in middle]
    survivors = [begun[n, "opening"] - begun[n, "survivors"] for n in middle]
    opening = [closed[n] - begun[n, "opening"] for n in middle]
    whole = [closed[n] - begun[n, "training"] for n in middle]
    return {
        "training_exchange_s": round(statistics.median(training), 2),
        "survivors_exchange_s": round(statistics.median(survivors), 2),
        "opening_exchange_s": round(statistics.median(opening), 2),
        "round_s": round(statistics.median(whole), 2),
        "longest_round_s": round(max(whole), 2),
    }


if __name__ == "__main__":
    main()
