"""Command that suggests a study's settings, with the reason of each, without a server and without anybody's data."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
import yaml

from consilium_shared import console, task
from consilium_shared.errors import ConfigurationError
from consilium_shared.suggestion import Asked, Suggestion


def add_to(app: typer.Typer) -> None:
    """Give consilium-server the command ``suggest``."""
    app.command()(suggest)


def suggest(
    task_name: Annotated[str, typer.Argument(metavar="TASK", help="task of the study, as its file has it")],
    patients: Annotated[int, typer.Option(help="Patients to train on, of all hospitals together.")],
    sites: Annotated[int, typer.Option(help="Hospitals.")] = 4,
    epsilon: Annotated[float | None, typer.Option(help="ε of the whole study; without it, none: no privacy.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Suggest settings for a study, and say where each was measured. Nothing is started, sent or read."""
    asked = Asked(patients, sites, epsilon)
    asked.check()
    found = _of(task_name, asked)
    if as_json:
        print(json.dumps({"settings": found.part, **_explained(found)}, indent=2, sort_keys=True, ensure_ascii=False))
        return
    print(as_yaml(found), end="")
    for line in found.doubts:
        console.errors.print(f"But: {line}.", style="yellow", markup=False)


def _of(name: str, asked: Asked) -> Suggestion:
    try:
        chosen = task.get(name)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error
    found = chosen.suggestion(asked)
    if found is None:
        known = [each for each in task.names() if task.get(each).suggestion(asked) is not None]
        raise ConfigurationError(
            f"nothing was measured for task {name} as yet ({', '.join(known)} have figures); its sample study is a "
            "start: docs/tasks/"
        )
    return found


def _explained(found: Suggestion) -> dict[str, Any]:
    return {key: value for key, value in asdict(found).items() if key == "doubts"} | {
        "reasons": [each._asdict() for each in found.reasons]
    }


def as_yaml(found: Suggestion) -> str:
    """A suggestion as a part of a study's file: the reasons are comments above the settings.

    >>> print(as_yaml(Suggestion({"model": {"name": "logistic"}}, [])), end="")
    model: {name: logistic}
    """
    lines = [f"# {key}: {why} ({source})" for key, why, source in found.reasons]
    for key, value in found.part.items():
        text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000, allow_unicode=True)
        lines.append(f"{key}: {text.strip()}")
    return "\n".join(lines) + "\n"
