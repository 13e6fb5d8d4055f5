"""One real study on this machine: every site a federation of real processes, by the same commands as anywhere.

    python -m consilium_deploy.trial heart-disease --data OUT [--work DIR] [--seeds 5] [--compare]

``OUT`` is what ``consilium_deploy.real_data`` wrote: a folder for each site, and ``pooled`` beside them.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from consilium_deploy.local import LocalFederation, LocalFederationError
from consilium_shared import task

HOURS = 4 * 3600.0
MARKER = "TRIAL.txt"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m consilium_deploy.trial", description=__doc__)
    parser.add_argument(
        "name", choices=sorted(name for name, folder in task.studies().items() if (folder / "site.yaml").exists())
    )
    parser.add_argument("--data", type=Path, required=True, help="what consilium_deploy.real_data wrote")
    parser.add_argument("--work", type=Path, default=Path("trial"), help="folder to work in; an old trial is removed")
    parser.add_argument("--study", action="append", help="study file beside study.yaml (several run one after another)")
    parser.add_argument("--seeds", type=int, default=1, help="run each study so often, with seeds 0, 1, …")
    parser.add_argument("--epsilon", type=float, nargs="*", help="run studies with privacy once with each of these")
    parser.add_argument("--compare", action="store_true", help="also train on each site alone and on all data pooled")
    options = parser.parse_args(arguments)
    work, data = options.work.resolve(), options.data.resolve()
    if work.exists() and any(work.iterdir()) and not (work / MARKER).exists():
        print(f"{work} is not an old trial; choose another folder with --work", file=sys.stderr)
        return 2
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / MARKER).write_text("This folder is removed by the next consilium_deploy.trial that works here.\n")
    try:
        found = run(options.name, data, work, options, options.study or ["study.yaml"])
    except LocalFederationError as error:
        print(error, file=sys.stderr)
        return 1
    (work / "results.json").write_text(json.dumps(found, indent=2))
    print(json.dumps(found, indent=2))
    return 0


def run(name: str, data: Path, work: Path, options: argparse.Namespace, files: list[str]) -> list[dict[str, Any]]:
    """Every study with every seed; one result each."""
    sites = sorted(path.name for path in data.iterdir() if path.is_dir() and path.name != "pooled")
    template = yaml.safe_load((task.studies()[name] / "site.yaml").read_text())
    asset = next(iter(template["assets"]))
    federation = LocalFederation(work, {site: _site(template, site, data / site) for site in sites}, name, say=print)
    comparison = work / "comparison"
    comparison.mkdir()
    everyone = {site: _placed(template["assets"][asset], data / site) for site in (*sites, "pooled")}
    together = {"site": "comparison", "assets": everyone, "policy": {**template["policy"], "budgets": {}}}
    (comparison / "site.yaml").write_text(yaml.safe_dump(together))
    found = []
    with federation:
        federation.provision()
        federation.up()
        for file in files:
            for study in _variants(task.studies()[name] / file, work, options.seeds, options.epsilon or [None]):
                found.append(_run_one(federation, comparison, study, sites))
                print(json.dumps(found[-1]), flush=True)
    if options.compare:
        for file in files:
            study = _variants(task.studies()[name] / file, work, 1, [None])[0]
            for site in (*sites, "pooled"):
                found.append({"study": study.stem, "alone": site, **_baseline(comparison, study, site, sites)})
    return found


def _run_one(federation: LocalFederation, comparison: Path, study: Path, sites: list[str]) -> dict[str, Any]:
    federation.at_server("run", "--detach", study)
    federation.approve(study.stem, by="trial")
    ended = ("finished", "stopped", "failed")
    federation.wait(lambda: federation.state(study.stem) in ended, f"{study.stem} ends", "server", HOURS)
    if federation.state(study.stem) != "finished":
        raise LocalFederationError(f"{study.stem} ended as {federation.status()['studies'][study.stem]}")
    closed = federation.closed(study.stem)
    folder = next((federation.server / "models" / study.stem).iterdir())
    card = json.loads((folder / "card.json").read_text())["body"]
    tested = _test(comparison, study, folder / "model.safetensors", sites)
    return {
        "study": study.stem,
        "epsilon": card["epsilon"],
        "seconds_per_round": [event["seconds"] for event in closed],
        **tested,
    }


def _test(home: Path, study: Path, model: Path, sites: list[str]) -> dict[str, Any]:
    return _by_site(_site_command("test", home, str(study), str(model), *_test_on(sites)), sites)


def _baseline(home: Path, study: Path, site: str, sites: list[str]) -> dict[str, Any]:
    return _by_site(_site_command("baseline", home, "--train-on", site, str(study), *_test_on(sites)), sites)


def _test_on(sites: list[str]) -> list[str]:
    return [word for site in (*sites, "pooled") for word in ("--test-on", site)]


def _site_command(command: str, home: Path, *arguments: str) -> dict[str, Any]:
    words = [sys.executable, "-m", "consilium_client.commands.cli", command, "--json", "--home", str(home), *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LocalFederationError(done.stderr)
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def _by_site(found: dict[str, Any], sites: list[str]) -> dict[str, Any]:
    """The mean over the sites' own held-back patients, and the value on all of them together.

    A mean is None where a site's value is undefined (no held-back patient of some class): it would be of other sites.
    """
    kept = ("auroc", "accuracy", "f1")
    mean = {
        name: None if None in (values := [found[site][name] for site in sites]) else sum(values) / len(sites)
        for name in kept
    }
    return {
        "mean_of_sites": mean,
        "pooled": {name: found["pooled"][name] for name in kept},
        "sites": {site: {name: found[site][name] for name in kept} for site in sites},
    }


def _variants(file: Path, work: Path, seeds: int, epsilons: list[float | None]) -> list[Path]:
    """The study with each seed and ε: files of their own, under names of their own."""
    found: list[Path] = []
    for epsilon in epsilons:
        for seed in range(seeds):
            content = yaml.safe_load(file.read_text())
            content["study"] += f"-seed-{seed}"
            content["model"]["seed"] = seed
            if content["privacy"].get("mode") == "none":
                content["training"]["seed"] = seed
            elif epsilon is not None:
                content["study"] += f"-epsilon-{epsilon:g}".replace(".", "-")
                content["privacy"]["epsilon"] = epsilon
            target = work / f"{content['study']}.yaml"
            target.write_text(yaml.safe_dump(content, sort_keys=False))
            if target not in found:
                found.append(target)
    return found


def _site(template: dict[str, Any], site: str, folder: Path) -> str:
    placed = {name: _placed(asset, folder) for name, asset in template["assets"].items()}
    return yaml.safe_dump({**template, "site": site, "assets": placed})


def _placed(asset: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The asset with its paths taken from a site's folder."""
    return {key: str(folder / value) if key in ("path", "table", "series") else value for key, value in asset.items()}


if __name__ == "__main__":
    sys.exit(main())
