"""Command that puts a question to the hospitals and shows its answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from consilium_server import registry
from consilium_server.commands import ask_page
from consilium_server.federation import Home
from consilium_server.state import study_folder
from consilium_shared import task
from consilium_shared.answer import Answer
from consilium_shared.errors import ConfigurationError, ConsiliumError
from consilium_shared.files import write_atomically


def add_to(app: typer.Typer, run: Callable[..., None]) -> None:
    """Give consilium-server the command ``ask``; ``run`` starts a study and shows it until it ends."""

    @app.command()
    def ask(
        question: Annotated[Path, typer.Argument(help="QUESTION.yaml, or the name of one that was answered")],
        home: Annotated[
            Path, typer.Option("--home", envvar="CONSILIUM_SERVER_HOME", help="The coordinator's folder.")
        ] = Path("consilium-server"),
        page: Annotated[Path | None, typer.Option(help="Also write the answer as a page, FILE.html.")] = None,
        as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
    ) -> None:
        """Ask the hospitals a question, wait for their approvals and the sum, and show the answer with intervals.

        A question is a study: hospitals approve it, and each ledger is charged. Asked again under the same name, what
        was answered is shown and nothing is charged. Progress goes to the standard error.
        """
        place = Home(home.resolve())
        name = str(question)
        if question.suffix in (".yaml", ".yml"):
            from consilium_shared import study_file  # torch is slow to load

            study = study_file.read(question)
            if not task.of(study).answers:
                raise ConfigurationError(
                    f"{question} is no question but a study of task {study.task}; start it with consilium-server run"
                )
            with redirect_stdout(sys.stderr):
                run(question, home=home, detach=False, weights=None, new_head=False)
            name = study.study
        found = answer(place, name)
        if page is not None:
            write_atomically(page, ask_page.page(found).encode())
        print(json.dumps(found.to_dict(), indent=2, allow_nan=False) if as_json else "\n".join(found.lines()))


def answer(home: Home, name: str) -> Answer:
    """Answer of a question that was asked here.

    Raises:
        ConfigurationError: no study of that name, one that is no question, or that has no result yet.
        ConsiliumError: its sum was implausible, so that there is no answer.
    """
    from consilium_shared.models import build
    from consilium_shared.models.vector import unpack

    folder = study_folder.folder(home, name)
    study, state = folder.study(), folder.state()
    if state[0] != "finished":
        raise ConfigurationError(f"{name} has no answer: it is {state[0]}; consilium-server status says what it awaits")
    record = folder.records(home.coordinator())[-1]
    if record["implausible"] is not None:
        raise ConsiliumError(f"{name} has no answer: {record['implausible']}")
    model = registry.newest(home, name)
    weights = unpack((model.folder / "model.safetensors").read_bytes(), build(study), study)
    found = task.of(study).answer(study, weights, len(record["participants"]))
    if found is None:
        raise ConfigurationError(f"{name} is no question but a study of task {study.task}; its model is {model.folder}")
    return found
