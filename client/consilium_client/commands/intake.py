"""Commands that take in data from the hospital's systems: receive, pull, deidentify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consilium_client.intake.settings import Intake
from consilium_client.site import Home
from consilium_shared import console
from consilium_shared.errors import ConfigurationError

HomeOption = Annotated[Path, typer.Option("--home", envvar="CONSILIUM_SITE_HOME", help="The site's folder.")]
DEFAULT_HOME = Path("consilium-site")


def add_to(app: typer.Typer) -> None:
    """Give consilium-site these commands."""
    app.command()(receive)


def _settings(home: Path) -> tuple[Home, Intake]:
    place = Home(home.resolve())
    settings = place.config().intake
    if settings is None:
        raise ConfigurationError(f"{place.config_file} has no intake; deploy/config/site.full.yaml shows its keys")
    return place, settings


def receive(home: HomeOption = DEFAULT_HOME) -> None:
    """Receive what archives and modalities send by DICOM (C-STORE), until Ctrl-C. A process of its own."""
    from consilium_client.intake.inbox import Inbox
    from consilium_client.intake.receiver import receive_forever
    from consilium_shared.process import logs

    place, settings = _settings(home)
    if settings.receive is None:
        raise ConfigurationError(f"{place.config_file}: intake.receive says who may send, and is missing")
    logs.configure()
    inbox = Inbox(place.inbox(settings), settings.limits)
    receive_forever(
        settings.receive.at(place.root), inbox, lambda text: console.console.print(text, markup=False, soft_wrap=True)
    )
