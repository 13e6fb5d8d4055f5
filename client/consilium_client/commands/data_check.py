"""Command ``consilium-site data check``: an asset as a study would read it, for the hospital's own people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from consilium_client.commands.prepared import prepared
from consilium_client.site import Home
from consilium_shared import console
from consilium_shared.errors import ConfigurationError

HomeOption = Annotated[Path, typer.Option("--home", envvar="CONSILIUM_SITE_HOME", help="The site's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
StudyFile = Annotated[Path, typer.Argument(help="STUDY.yaml")]
AssetOption = Annotated[str | None, typer.Option(help="An asset of site.yaml; the study's own by default.")]
DEFAULT_HOME = Path("consilium-site")


def add_to(app: typer.Typer) -> None:
    """Give consilium-site the commands about its data."""
    data = typer.Typer(no_args_is_help=True, help="Look at the site's data.")
    data.command()(check)
    data.command()(prepared)
    app.add_typer(data, name="data")


def check(
    study: StudyFile, home: HomeOption = DEFAULT_HOME, asset: AssetOption = None, as_json: JsonOption = False
) -> None:
    """Read an asset as a study would, and show what is usable, odd, set aside or missing. Stays at this site.

    The same, with histograms, becomes a page for a browser in the home's folder data-check.
    """
    from consilium_client.commands.baseline import load_asset
    from consilium_client.data.report import NothingUsable
    from consilium_client.quality import page
    from consilium_client.quality.assessment import assess, reasons
    from consilium_shared.config import load_yaml
    from consilium_shared.study import Study

    place, contract = Home(home.resolve()), load_yaml(study, Study)
    name, config = asset or contract.data.asset, place.config()
    try:
        with Progress(console=console.errors, disable=not console.errors.is_terminal) as bar:
            task = bar.add_task(f"reading {name}", total=None)

            def progress(done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

            records = load_asset(config, place, name, contract, progress)
    except NothingUsable as error:
        for table in reasons(error, contract) if not as_json else ():
            console.table(table.title, table.columns, table.rows)
        raise
    quality = assess(records, contract, name, config.policy.minimum_patients)
    try:
        written = page.write(quality, config.site, place.data_check)
    except OSError as error:
        raise ConfigurationError(f"cannot write the page into {place.data_check}: {error.strerror}") from error
    if as_json:
        print(json.dumps({**quality.to_json(), "page": str(written)}, indent=2, sort_keys=True))
        return
    for table in quality.tables():
        console.table(table.title, table.columns, table.rows)
    console.console.print(f"As a page, for this hospital's eyes only: {written}", markup=False, soft_wrap=True)
