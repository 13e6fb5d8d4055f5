"""The demonstration: four synthetic hospitals on this machine train two models together; every process is real.

    python -m consilium_deploy.demo [--out demo]

Says what it does while it does it, as the commands that a coordinator and four hospitals would type.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from consilium_deploy import demo_figure
from consilium_deploy.local import LocalFederation, LocalFederationError
from consilium_shared import task

HOSPITALS = ("hospital-a", "hospital-b", "hospital-c", "hospital-d")
SITE_YAML = """\
# Written by the demonstration; every patient in it is synthetic.
site: {site}
assets:
{assets}
policy:
  budgets:
    chest-xray: {{epsilon: 10.0, delta: 1.0e-3}}
    vital-signs: {{epsilon: 10.0, delta: 1.0e-3}}
  minimum_patients: 50
  minimum_sites: 4
  maximum_epsilon: 8.0
device: cpu
"""
ASSETS = """\
  {prefix}chest-xray: {{kind: dicom, path: {data}/synthetic-radiographs, table: {data}/synthetic-labels.csv}}
  {prefix}vital-signs: {{kind: timeseries, series: {data}/synthetic-vitals.csv, table: {data}/synthetic-outcomes.csv, \
time: minutes}}
"""

console = Console(highlight=False)


@dataclass(frozen=True)
class Outcome:
    """Outcome of one study: AUROC on all hospitals' held-back patients, by how the model came to be."""

    study: str
    federated: float
    pooled: float
    alone: dict[str, float]
    epsilon: dict[str, float]
    delta: float
    rounds: list[dict[str, Any]]
    evaluated: dict[int, dict[str, Any]]
    """Round to the metrics of the model after it."""
    model: str


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m consilium_deploy.demo", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder to work in; an old demo there is removed"
    )
    parser.add_argument("--study", action="append", help="only this study (demo-xray, demo-vitals)")
    options = parser.parse_args(arguments)
    out = options.out.resolve()
    if out.exists() and any(out.iterdir()) and not (out / "SYNTHETIC-DEMONSTRATION.txt").exists():
        console.print(f"{out} is not an old demonstration; choose another folder with --out", markup=False)
        return 2
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "SYNTHETIC-DEMONSTRATION.txt").write_text(
        "Everything below this folder was generated. No patient is real.\n"
    )
    try:
        run(out, options.study or ["demo-xray", "demo-vitals"])
    except (LocalFederationError, subprocess.CalledProcessError) as error:
        console.print(f"\nThe demonstration stopped: {error}", markup=False, style="red")
        console.print(f"Logs: {out}/server/log and {out}/sites/*/log", markup=False)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run(out: Path, studies: list[str]) -> None:
    """The whole demonstration in ``out``."""
    began = time.monotonic()
    _title(
        "Four synthetic hospitals", "Radiographs (DICOM) from four kinds of scanner, and vital signs of intensive care."
    )
    subprocess.run([sys.executable, "-m", "consilium_deploy.synthetic", str(out / "data")], check=True)
    federation = LocalFederation(out, {name: _site_yaml(out, name) for name in HOSPITALS}, "demo", say=_command)
    with federation:
        _title("Joining", "Each hospital makes its own keys; the coordinator admits their requests.")
        federation.provision()
        _title("Starting", "SuperLink over TLS; at each hospital a SuperNode, a courier, and an agent without network.")
        federation.up()
        for study in studies:
            _study(federation, study)
    _title(
        "Comparing", "The same training by each hospital alone, and on all data in one place (which nobody may have)."
    )
    outcomes = [_compare(out, study) for study in studies]
    _report(out, outcomes)
    console.print(f"\nDone in {time.monotonic() - began:.0f} s.")


def _study(federation: LocalFederation, study: str) -> None:
    _title(f"Study {study}", "The coordinator proposes; nothing is trained until every hospital's IT has approved.")
    federation.at_server("run", "--detach", task.studies()[study] / "study.yaml")
    first = HOSPITALS[0]
    federation.wait(lambda: federation.standing(first, study) == "pending", f"{first} hears of {study}", first)
    console.print(federation.at_site(first, "show", study).stdout.rstrip(), markup=False)
    federation.approve(study, by="synthetic IT department")
    command = [sys.executable, "-m", "consilium_server.commands.cli", "resume", "--home", str(federation.server), study]
    _command(f"$ consilium-server resume {study}    # shows the study until it ends; Ctrl-C would leave it running")
    subprocess.run(command, check=True)
    budget = federation.json_at_site(first, "budget")
    for asset in budget:
        if asset["studies"]:
            console.print(
                f"{first}: asset {asset['asset']} has spent ε {asset['spent']:.3f} of {asset['epsilon']:g}; "
                f"every round was charged in its signed ledger before it ran",
                markup=False,
            )


def _compare(out: Path, study: str) -> Outcome:
    """Local-only and pooled training, in a folder that holds all data and so exists in a demonstration only."""
    home = out / "comparison"
    home.mkdir(exist_ok=True)
    assets = "".join(ASSETS.format(prefix=f"{name}-", data=out / "data" / name) for name in (*HOSPITALS, "pooled"))
    (home / "site.yaml").write_text(SITE_YAML.format(site="comparison", assets=assets))
    file = task.studies()[study] / "study.yaml"
    cards = sorted((out / "server" / "models" / study).glob("*/card.json"))
    card = json.loads(cards[-1].read_text())["body"]
    asset = card["contract"]["data"]["asset"]
    everybody = f"pooled-{asset}"

    def auroc(command: str, *arguments: str) -> float:
        words = [command, "--json", "--home", str(home), "--test-on", everybody, str(file), *arguments]
        done = subprocess.run(
            [sys.executable, "-m", "consilium_client.commands.cli", *words],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # two run at a time on two cores
        )
        if done.returncode != 0:
            raise LocalFederationError(done.stderr)
        found: float = json.loads(done.stdout)[everybody]["auroc"]
        return found

    _command(f"$ consilium-site baseline {study}/study.yaml    # for each hospital alone, and for all data pooled")
    with ThreadPoolExecutor(max_workers=2) as pool:
        tasks = {
            name: pool.submit(auroc, "baseline", "--train-on", f"{name}-{asset}") for name in ("pooled", *HOSPITALS)
        }
        tasks["federated"] = pool.submit(auroc, "test", str(cards[-1].parent / "model.safetensors"))
        found = {name: task.result() for name, task in tasks.items()}
    events = (out / "server" / "studies" / study / "events.jsonl").read_text().splitlines()
    closed = [event for event in map(json.loads, events) if event["event"] == "closed"]
    return Outcome(
        study,
        found["federated"],
        found["pooled"],
        {name: found[name] for name in HOSPITALS},
        card["epsilon"],
        card["delta"],
        closed,
        {event["round"]: event["metrics"] for event in map(json.loads, events) if event["event"] == "evaluated"},
        str(cards[-1].parent),
    )


def _report(out: Path, outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        table = Table(
            "model", "AUROC", "ε spent", title=f"{outcome.study}: synthetic patients held back by all hospitals"
        )
        for name, value in outcome.alone.items():
            table.add_row(f"{name} alone", f"{value:.3f}", "nothing left the hospital")
        mean = sum(outcome.alone.values()) / len(outcome.alone)
        table.add_row("mean of the four alone", f"{mean:.3f}", "", style="dim")
        table.add_row("pooled (all data in one place)", f"{outcome.pooled:.3f}", "", style="dim")
        spent = ", ".join(f"{name[-1]} {value:.2f}" for name, value in sorted(outcome.epsilon.items()))
        table.add_row("federated", f"{outcome.federated:.3f}", f"{spent} (δ {outcome.delta:g})", style="bold")
        for number, value, low, high in demo_figure.noised(outcome):
            table.add_row(
                f"  as round {number}'s noised counts say", f"{value:.2f} [{low:.2f}, {high:.2f}]", "in that ε"
            )
        console.print(table)
    console.print(
        "All were trained with the same steps, clipping and ε; alone and pooled as if they were to be released. "
        "Figures are exact tests, which only a demonstration can make. The coordinator sees noised counts, with the "
        "interval that holds the exact figure in 95 of 100 cases; one above 1 is noise, and is not cut off."
    )
    figure = out / "demonstration.png"
    demo_figure.draw(outcomes, figure)
    (out / "results.json").write_text(json.dumps([vars(outcome) for outcome in outcomes], indent=2))
    console.print("\nWhere everything lies", style="bold")
    for what, where in (
        ("picture", figure),
        ("results", out / "results.json"),
        *((f"model {outcome.study}", Path(outcome.model)) for outcome in outcomes),
        ("round records", out / "server" / "studies"),
        ("ledgers", out / "sites" / "*" / "ledger.jsonl"),
        ("logs", out / "*" / "log"),
    ):
        console.print(f"  {what:<20} {where}", markup=False, soft_wrap=True)


def _site_yaml(out: Path, name: str) -> str:
    return SITE_YAML.format(site=name, assets=ASSETS.format(prefix="", data=out / "data" / name))


def _title(title: str, text: str) -> None:
    console.print(f"\n[bold]{title}[/bold]")
    console.print(text, style="dim", markup=False)


def _command(text: str) -> None:
    console.print(text, style="cyan", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
