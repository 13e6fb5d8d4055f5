"""Command about the prepared store: what it holds, and deleting it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from consilium_client.site import Home
from consilium_shared import console
from consilium_shared.errors import ConfigurationError

HomeOption = Annotated[Path, typer.Option("--home", envvar="CONSILIUM_SITE_HOME", help="The site's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]


def prepared(
    home: HomeOption = Path("consilium-site"),
    asset: Annotated[str | None, typer.Option(help="Of this asset alone.")] = None,
    delete: Annotated[bool, typer.Option("--clear", help="Delete it; a study that needs it prepares it anew.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show how much disk the prepared data takes, by asset, or delete it."""
    from consilium_client.prepared.store import clear, held  # numpy is slow to load

    place = Home(home.resolve())
    place.check_there()
    found = [each for each in held(place.prepared) if asset in (None, each.asset)]
    if asset is not None and not found:
        raise ConfigurationError(f"{place.prepared} holds nothing of an asset {asset!r}")
    if delete:
        clear(place.prepared, [each.asset for each in found])
    console.show(
        as_json,
        [{**vars(each), "deleted": delete} for each in found],
        "deleted" if delete else "prepared data",
        ["asset", "MiB", "files", "last used"],
        lambda: [
            (each.asset, round(each.size / 2**20, 1), each.files, datetime.fromtimestamp(each.used, UTC).date())
            for each in found
        ],
    )
