"""Memory and time of a study with a large model: real processes, 33.6 million parameters (134 MB), one step a round.

    python tests/bench/large_model.py [--sites 3] [--rounds 3] [--optimizer fedavg]

Prints JSON: for each program the most memory that it held since the study began, above what it held before, in units of
the model; and seconds of the phases of a round. The study's process begins with the study: what its imports take, 300
MiB, is in its figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import yaml

from consilium_deploy.local import LocalFederation
from round_cost import exchanges, role_of, site_config, study

PARAMETERS = 12 * 4096 + 4096 + 2 * (4096 * 4096 + 4096) + 4096 * 2 + 2
MODEL_BYTES = 4 * PARAMETERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--optimizer", default="fedavg", choices=["fedavg", "fedavgm", "fedadam", "fedyogi"])
    given = parser.parse_args()
    sites = [f"site-{number:03d}" for number in range(given.sites)]
    with tempfile.TemporaryDirectory(prefix="cb") as folder:
        root = Path(folder)
        configs = {}
        for seed, site in enumerate(sites):
            config = yaml.safe_load(site_config(root, site, seed))
            config["policy"] = {
                "budgets": {"table": {"epsilon": "unlimited", "delta": 1e-3}},
                "allow_without_privacy": True,
            }
            configs[site] = yaml.safe_dump(config)
        contract = study(given.rounds, given.sites)
        contract["model"] = {"name": "mlp", "hidden": 4096, "layers": 3}
        contract["privacy"] = {"mode": "none"}
        contract["training"]["seed"] = 1
        contract["aggregation"]["optimizer"] = {"name": given.optimizer, "lr": 0.1}
        (root / "study.yaml").write_text(yaml.safe_dump(contract))
        with LocalFederation(root / "f", configs) as federation:
            federation.provision()
            federation.up()
            before = resident(federation, "VmRSS")
            federation.at_server("run", "--detach", root / "study.yaml")
            federation.approve("bench")
            peaks: dict[tuple[str, int], float] = {}

            def ended() -> bool:
                peaks.update(resident(federation, "VmHWM"))
                return federation.state("bench") in ("finished", "failed", "stopped")

            federation.wait(ended, "the study ends", "server", 3000)
            events = federation.events("bench")
            if federation.state("bench") != "finished":
                raise SystemExit(f"{events[-1]}\n{federation.logs('server')}")
        grown: dict[str, list[float]] = {}
        for (role, pid), peak in peaks.items():
            grown.setdefault(role, []).append((peak - before.get((role, pid), 0.0)) / MODEL_BYTES)
        report: dict[str, Any] = {
            "parameters": PARAMETERS,
            "sites": given.sites,
            "optimizer": given.optimizer,
            "peak_in_models": {role: round(max(values), 2) for role, values in sorted(grown.items())},
            "round": exchanges(events, given.rounds),
            "site_answers_s": round(
                statistics.median(e["seconds"] for e in events if e["event"] == "answer" and e["phase"] == "training"),
                1,
            ),
        }
        print(json.dumps(report, indent=2))


def resident(federation: LocalFederation, field: str) -> dict[tuple[str, int], float]:
    """Bytes of each program by role and process id: what it holds (``VmRSS``) or has held at most (``VmHWM``)."""
    found = {}
    for service in federation.services:
        for pid, words in federation.processes(service).items():
            try:
                lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                kib = next(int(line.split()[1]) for line in lines if line.startswith(field))
            except (OSError, StopIteration):
                continue
            found[role_of(service, words), pid] = kib * 1024.0
    return found


if __name__ == "__main__":
    main()
