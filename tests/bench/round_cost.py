"""Cost of a round outside training, and of waiting: real processes, a model of 13 numbers, one step a round.

    python tests/bench/round_cost.py [--sites 4] [--rounds 20] [--idle 30]

Prints JSON. Seconds are medians over the rounds; evaluation rides on the training exchange. ``bare_s`` is one request
to the SuperLink over a new TLS connection in the same run, and ``in_bare`` the three exchanges in such requests.
Processor time is in percent of a core: of the SuperLink, of the study's process, and of one site's programs together.
"""

from __future__ import annotations

import argparse
import json
import os
import ssl
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from consilium_deploy.local import LocalFederation

TICKS = os.sysconf("SC_CLK_TCK")
ROLES = {"superlink": "superlink", "supernode": "supernode", "courier": "courier", "agent": "agent"}
"""A word of a program's module, and the name under which its cost is printed; ``up`` and the study have none."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--idle", type=float, default=30.0, help="seconds for which a waiting federation is watched")
    given = parser.parse_args()
    sites = [f"site-{number:03d}" for number in range(given.sites)]
    with tempfile.TemporaryDirectory(prefix="cb") as folder:
        root = Path(folder)
        configs = {site: site_config(root, site, seed) for seed, site in enumerate(sites)}
        (root / "study.yaml").write_text(yaml.safe_dump(study(given.rounds, given.sites)))
        with LocalFederation(root / "f", configs) as federation:
            federation.provision()
            federation.up()
            time.sleep(5)  # the agents have warmed up
            found: dict[str, Any] = {"sites": given.sites, "no_study": cost(federation, given.idle)}
            federation.at_server("run", "--detach", root / "study.yaml")
            for site in sites:
                federation.wait(lambda site=site: federation.standing(site, "bench"), "the study is known", site)
            time.sleep(5)
            found["waiting_for_approval"] = cost(federation, given.idle)
            before, began = processor(federation), time.monotonic()
            federation.approve("bench")
            federation.wait(lambda: federation.state("bench") == "finished", "the study ends", "server", 1800)
            found["while_it_ran"] = percent(federation, before, time.monotonic() - began)
            found["round"] = exchanges(federation.events("bench"), given.rounds)
            found["round"]["bare_s"] = bare(federation)
            found["round"]["in_bare"] = round(found["round"]["three_exchanges_s"] / found["round"]["bare_s"], 1)
        print(json.dumps(found, indent=2))


def site_config(root: Path, site: str, seed: int) -> str:
    """Writes a site's table of a hundred generated patients; returns its site.yaml."""
    draw = np.random.default_rng(seed)
    rows = [f"{site}{i},{'ab'[i % 2]}," + ",".join(f"{v:.3f}" for v in draw.normal(size=12)) for i in range(100)]
    header = "patient,label," + ",".join(f"x{i}" for i in range(12))
    (root / f"{site}.csv").write_text(header + "\n" + "\n".join(rows) + "\n")
    asset = {"kind": "table", "path": str(root / f"{site}.csv")}
    policy = {"budgets": {"table": {"epsilon": 10.0, "delta": 1e-3}}}
    return yaml.safe_dump({"site": site, "assets": {"table": asset}, "policy": policy, "device": "cpu"})


def study(rounds: int, sites: int) -> dict[str, Any]:
    """The smallest private study, of all sites."""
    return {
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
        "aggregation": {"min_sites": sites},
    }


def exchanges(events: list[dict[str, Any]], rounds: int) -> dict[str, float]:
    """Medians over all rounds but the first and the last."""
    begun = {(e["round"], e["phase"]): float(e["time"]) for e in events if e["event"] == "round"}
    closed = {e["round"]: float(e["time"]) for e in events if e["event"] == "closed"}
    middle = range(2, rounds)  # the first finds cold caches, the last has a sum of counts of its own
    training = [begun[n, "survivors"] - begun[n, "training"] for n in middle]
    survivors = [begun[n, "opening"] - begun[n, "survivors"] for n in middle]
    opening = [closed[n] - begun[n, "opening"] for n in middle]
    whole = [closed[n] - begun[n, "training"] for n in middle]
    return {
        "training_exchange_s": round(statistics.median(training), 3),
        "survivors_exchange_s": round(statistics.median(survivors), 3),
        "opening_exchange_s": round(statistics.median(opening), 3),
        "three_exchanges_s": round(statistics.median(whole), 3),
        "longest_round_s": round(max(whole), 3),
        "from_round_to_round_s": round((closed[rounds - 1] - closed[1]) / (rounds - 2), 3),
    }


def cost(federation: LocalFederation, seconds: float) -> dict[str, Any]:
    """Processor time and memory of each role over some seconds."""
    before = processor(federation)
    began = time.monotonic()
    time.sleep(seconds)
    return percent(federation, before, time.monotonic() - began)


def percent(federation: LocalFederation, before: Mapping[int, float], seconds: float) -> dict[str, Any]:
    """Percent of a core since ``before`` and MiB now, by role; of sites the mean of one."""
    used: dict[str, list[float]] = {}
    held: dict[str, list[float]] = {}
    for service in federation.services:
        for pid, words in federation.processes(service).items():
            role = role_of(service, words)
            try:
                spent = ticks(pid) - before.get(pid, 0.0)
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except (OSError, ValueError):
                continue
            used.setdefault(role, []).append(100 * spent / seconds)
            held.setdefault(role, []).append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
    cores = {role: round(statistics.mean(values), 2) for role, values in sorted(used.items())}
    one_site = sum(value for role, value in cores.items() if role in {"supernode", "courier", "agent", "site-up"})
    return {
        "percent_of_a_core": {**cores, "one_site": round(one_site, 2)},
        "mib": {role: round(statistics.mean(values)) for role, values in sorted(held.items())},
    }


def role_of(service: str, words: list[str]) -> str:
    """Name under which a program's cost is printed."""
    module = next((word for word in words if word.startswith("consilium_")), "")
    for word, role in ROLES.items():
        if word in module.split("."):
            return role
    if service == "server":
        return "server-up" if "up" in words else "study"
    return "site-up"


def processor(federation: LocalFederation) -> dict[int, float]:
    """Seconds of processor time so far, by process id."""
    found = {}
    for service in federation.services:
        for pid in federation.processes(service):
            try:
                found[pid] = ticks(pid)
            except (OSError, ValueError):
                continue
    return found


def ticks(pid: int) -> float:
    """Seconds of processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def bare(federation: LocalFederation) -> float:
    """Median seconds of one request to the SuperLink over a new connection."""
    port = yaml.safe_load((federation.root / "federation.yaml").read_text())["port"]
    context = ssl.create_default_context(cafile=str(federation.server / "keys" / "ca.crt"))
    taken = []
    for _ in range(20):
        began = time.monotonic()
        with urllib.request.urlopen(f"https://127.0.0.1:{port}/health", context=context) as answer:
            answer.read()
        taken.append(time.monotonic() - began)
    return round(statistics.median(taken), 4)


if __name__ == "__main__":
    main()
