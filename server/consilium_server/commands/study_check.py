"""Command that reads a study's file without a server: what hospitals would approve, and what it would cost them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from consilium_shared import console
from consilium_shared.errors import BudgetRefused, ConfigurationError

PATIENTS = (100, 300, 1000, 3000)
"""Numbers of patients for which the plan is shown, unless others are asked for."""


def add_to(app: typer.Typer) -> None:
    """Give consilium-server the group ``study``."""
    group = typer.Typer(no_args_is_help=True, help="Look at a study's file, without a server.")
    group.callback()(_group)  # of a single command typer would else make the group itself
    group.command()(check)
    app.add_typer(group, name="study")


def _group() -> None:
    """Look at a study's file, without a server."""


def check(
    file: Annotated[Path, typer.Argument(help="STUDY.yaml")],
    patients: Annotated[list[int] | None, typer.Option(help="A hospital's patients; may be given again.")] = None,
    sites: Annotated[int, typer.Option(help="Sites of the roster.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Check a study's file; show its digest, size and what it asks of hospitals. Nothing is started or sent."""
    from consilium_shared import study_file  # torch is slow to load
    from consilium_shared.models.vector import width
    from consilium_shared.secagg.terms import least_sites

    study = study_file.read(file)
    found: dict[str, Any] = {
        "study": study.study,
        "version": study.version,
        "digest": study.digest,
        "task": study.task,
        "model": study.model.name,
        "trained_parameters": width(study),
        "rounds": study.training.rounds,
        "steps": study.training.rounds * study.training.steps_per_round,
        "least_sites": least_sites(study.aggregation, sites),
        "norm_bound": study.aggregation.norm_bound,
        "plans": [_plan(study, each) for each in patients or PATIENTS],
    }
    if as_json:
        print(json.dumps(found, indent=2, sort_keys=True))
        return
    say = console.console.print
    say(f"{study.study} version {study.version}, digest {study.digest}", markup=False)
    say(f"{found['model']} for {study.task}, {found['trained_parameters']} trained parameters", markup=False)
    say(f"{found['rounds']} rounds, {found['steps']} steps; norm bound {found['norm_bound']:g}", markup=False)
    say(f"of a roster of {sites} sites at least {found['least_sites']} in every sum", markup=False)
    if study.privacy.mode == "none":
        say("WITHOUT differential privacy: the model may reveal what it was trained on", style="bold red", markup=False)
        return
    console.table(
        "what it asks of a hospital",
        ["patients", "sampling rate", "noise multiplier", "ε"],
        [
            (p["patients"], f"{p['sampling_rate']:.4g}", f"{p['noise_multiplier']:.4g}", f"{p['epsilon']:.3f}")
            if "why" not in p
            else (p["patients"], "–", "–", p["why"])
            for p in found["plans"]
        ],
    )
    alone = next((p["epsilon_alone"] for p in found["plans"] if "epsilon_alone" in p), None)
    if alone is not None:
        say(f"the noise is SHARED: by its own share alone a hospital is protected to ε {alone:.3f}", markup=False)


def _plan(study: Any, patients: int) -> dict[str, Any]:
    """Plan of a hospital with so many patients, or the reason for which there is none."""
    from consilium_shared.privacy.plan import PrivacyPlan, plan_of

    try:
        plan = plan_of(study, patients)
        if not isinstance(plan, PrivacyPlan):
            return {"patients": patients}
        about = {"sampling_rate": plan.sampling_rate, "noise_multiplier": plan.noise_multiplier}
        shared = {"epsilon_alone": plan.cost_alone()} if plan.shared else {}
        return {"patients": patients, **about, "epsilon": plan.cost(), **shared}
    except (ConfigurationError, BudgetRefused) as error:
        return {"patients": patients, "why": str(error)}
