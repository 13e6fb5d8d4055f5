"""``--version`` and ``version`` of the three programs: the release, and the formats that it reads and writes."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated, Any

import typer

from consilium_shared import console
from consilium_shared.schema import OLDEST, SCHEMA


def about() -> dict[str, Any]:
    """The release, and of each format the oldest and the newest number that it reads; it writes the newest."""
    one = {"oldest": 1, "newest": 1}
    spoken = {"oldest": OLDEST, "newest": SCHEMA}
    return {
        "consilium": importlib.metadata.version("consilium"),
        "formats": {"contract_schema": spoken, "protocol": spoken, "ledger": one, "secure_sum": one},
    }


def add_to(app: typer.Typer) -> None:
    """Give a program the option ``--version`` (one line) and the command ``version`` (with the formats)."""
    app.callback()(_options)
    app.command("version")(_version)


def _show(context: typer.Context, wanted: bool) -> None:
    if wanted:
        console.console.print(f"{context.find_root().info_name} {about()['consilium']}", markup=False)
        raise typer.Exit


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show, is_eager=True, help="Show the release and exit.")
    ] = False,
) -> None:
    del version


def _version(as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False) -> None:
    """Show the release, and which formats it reads and writes."""
    found = about()
    console.show(
        as_json,
        found,
        f"Consilium {found['consilium']}",
        ["format", "reads", "writes"],
        lambda: [
            (name.replace("_", " "), f"{span['oldest']} to {span['newest']}", span["newest"])
            for name, span in found["formats"].items()
        ],
    )
