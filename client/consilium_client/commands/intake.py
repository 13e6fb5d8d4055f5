"""Commands that take in data from the hospital's systems: receive, pull, deidentify, pull-fhir, imports."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress, TaskID

from consilium_client.commands import receiver
from consilium_client.site import Home
from consilium_shared import console
from consilium_shared.errors import ConfigurationError

if TYPE_CHECKING:
    from consilium_client.intake.inbox import Inbox
    from consilium_client.intake.pull import Pulled, Source
    from consilium_client.intake.settings import FhirExport, Hl7Export, Intake, Receive

HomeOption = Annotated[Path, typer.Option("--home", envvar="CONSILIUM_SITE_HOME", help="The site's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
DEFAULT_HOME = Path("consilium-site")


def add_to(app: typer.Typer) -> None:
    """Give consilium-site these commands."""
    app.command()(receive)
    app.command()(pull)
    app.command()(deidentify)
    app.command()(reidentify)
    app.command()(pull_fhir)
    app.command()(import_fhir)
    app.command()(import_hl7)
    app.command()(import_sql)


def _say(text: str) -> None:
    console.console.print(text, markup=False, soft_wrap=True)


def _settings(home: Path) -> tuple[Home, Intake]:
    place = Home(home.resolve())
    settings = place.config().intake
    if settings is None:
        raise ConfigurationError(f"{place.config_file} has no intake; deploy/config/site.full.yaml shows its keys")
    return place, settings


def _receive(place: Home, settings: Intake) -> Receive:
    if settings.receive is None:
        raise ConfigurationError(f"{place.config_file}: intake.receive says who may send, and is missing")
    return settings.receive.at(place.root)


def receive(home: HomeOption = DEFAULT_HOME) -> None:
    """Receive what archives and modalities send by DICOM (C-STORE), until Ctrl-C. consilium-site up does it, too."""
    receiver.receive(Home(home.resolve()), _say)


def pull(
    studies: Annotated[Path, typer.Argument(help="CSV with a column study (UIDs) or accession (accession numbers)")],
    archive: Annotated[str | None, typer.Option(help="An archive of site.yaml, where it has several.")] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Fetch the studies of a list from an archive, by DICOM (C-GET, C-MOVE) or DICOMweb.

    What is here already is not fetched again, so that a pull that broke off is simply run again. The exit status is 4
    when a study is not complete.
    """
    from consilium_client.intake import worklist
    from consilium_client.intake.inbox import Inbox
    from consilium_client.intake.pull import pull as pull_all

    place, settings = _settings(home)
    name = _archive(place, settings, archive)
    wanted = worklist.read(studies)
    inbox = Inbox(place.inbox(settings), settings.limits)

    def on_study(done: Pulled) -> None:
        if not as_json:
            _say(f"{done.wanted}: {done.outcome}, {done.here} of {done.expected} instances here {done.detail}".strip())

    with inbox.writing(), _source(place, settings, name, inbox) as source:
        found = pull_all(source, name, wanted, inbox, on_study)
    counts = {outcome: sum(each.outcome == outcome for each in found) for outcome in {each.outcome for each in found}}
    if as_json:
        print(json.dumps([vars(each) for each in found], indent=2))
    else:
        _say(", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())))
    if set(counts) - {"complete"}:
        raise typer.Exit(4)


def _archive(place: Home, settings: Intake, name: str | None) -> str:
    known = ", ".join(settings.archives) or "none"
    if name is None and len(settings.archives) == 1:
        return next(iter(settings.archives))
    if name not in settings.archives:
        raise ConfigurationError(f"{place.config_file}: name one of intake.archives with --archive ({known})")
    return name


@contextlib.contextmanager
def _source(place: Home, settings: Intake, name: str, inbox: Inbox) -> Iterator[Source]:
    """The archive; where it sends to this site's receiver, that runs meanwhile."""
    archive = settings.archives[name].at(place.root)
    if archive.kind == "dicomweb":
        from consilium_client.intake.dicomweb import WebSource

        yield WebSource(archive, inbox)
        return
    from consilium_client.intake.dimse import DimseSource

    if archive.retrieve == "get":
        yield DimseSource(archive, inbox, "")
        return
    from consilium_client.intake.receiver import PortTaken, Receiver

    wanted = _receive(place, settings)
    try:
        receiver = Receiver(wanted, inbox)
    except PortTaken:
        _say(f"port {wanted.port} is taken: the archive sends to the receiver that runs there")
        yield DimseSource(archive, inbox, wanted.ae_title)
        return
    receiver.start()
    try:
        yield DimseSource(archive, inbox, wanted.ae_title)
    finally:
        receiver.stop()


def deidentify(
    home: HomeOption = DEFAULT_HOME,
    again: Annotated[bool, typer.Option("--again", help="Look at what was set aside before, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Give what was received new names, and write it where an asset's files lie; set aside what may show a name.

    Also the label tables of site.yaml. The same patient, image or date becomes the same at every run. Without network.
    """
    from consilium_client.intake import sorting, tables
    from consilium_client.intake.inbox import Inbox
    from consilium_client.intake.pseudonyms import Pseudonyms
    from consilium_client.transport.sandbox import forbid_network

    forbid_network()
    place, settings = _settings(home)
    if settings.deidentify is None:
        raise ConfigurationError(f"{place.config_file}: intake.deidentify says where to, and is missing")
    wanted = settings.deidentify.at(place.root)
    names = Pseudonyms(place.intake, settings.shift_days)
    inbox = Inbox(place.inbox(settings), settings.limits)
    with Progress(console=console.errors, disable=not console.errors.is_terminal) as bar:
        task = bar.add_task("de-identifying", total=None)
        images = sorting.sort(inbox, names, wanted, again, lambda done: bar.update(task, completed=done))
    found = {"images": images, **{str(table.source): tables.rename(table, names) for table in wanted.tables}}
    if as_json:
        print(json.dumps(found, indent=2, sort_keys=True))
        return
    for what, counts in found.items():
        _say(f"{what}: {counts['done']} de-identified" + _rest(counts))
    aside = inbox.counts().get("aside", 0)
    if aside:
        _say(f"set aside in all: {aside}; they stay in the inbox")


def _rest(counts: Counter[str]) -> str:
    others = [f"{number} set aside: {reason}" for reason, number in counts.most_common() if reason != "done"]
    return "".join(f"\n  {line}" for line in others)


def reidentify(
    pseudonym: Annotated[str, typer.Argument(help="a pseudonym of this site (P…)")], home: HomeOption = DEFAULT_HOME
) -> None:
    """Say whose a pseudonym is. For hospital IT alone: the table lies in this home and nothing else reads it."""
    from consilium_client.intake.pseudonyms import Pseudonyms

    place, _ = _settings(home)
    if not (place.intake / "people.sqlite3").exists():
        raise ConfigurationError(f"{place.intake} has no table of people: nothing was de-identified here")
    patient, issuer = Pseudonyms(place.intake, 1).person(pseudonym)
    _say(patient + (f" ({issuer})" if issuer else ""))


def pull_fhir(
    export: Annotated[str | None, typer.Argument(help="an export of site.yaml, where it has several")] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Fetch a new FHIR bulk export from the hospital's server, in the place of the one before (SMART Backend Services).

    One that broke off is simply run again.
    """
    from consilium_client.intake.smart import pull as pull_export

    place, settings = _settings(home)
    served = {name: each for name, each in settings.fhir.items() if each.server is not None}
    name = next(iter(served), None) if export is None and len(served) == 1 else export
    if name not in served:
        known = ", ".join(served) or "none"
        raise ConfigurationError(f"{place.config_file}: name an export of intake.fhir that has a server ({known})")
    wanted = served[name].at(place.root)
    assert wanted.server is not None  # noqa: S101  (those alone are looked at)
    done = pull_export(wanted.server, wanted.folder, settings.limits, (lambda _: None) if as_json else _say)
    if as_json:
        print(json.dumps(vars(done), indent=2, sort_keys=True))
        return
    _say(f"{name}: {done.files} files, {done.size / 2**20:.1f} MiB, {done.here_before} of them fetched before")


def import_fhir(
    export: Annotated[str | None, typer.Argument(help="an export of site.yaml; all of them by default")] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Make tables of a FHIR bulk export (NDJSON) as site.yaml declares them. Units are converted; without network."""
    place, settings = _settings(home)
    _import(place, settings, "fhir", settings.fhir, export, as_json)


def import_hl7(
    export: Annotated[str | None, typer.Argument(help="an export of site.yaml; all of them by default")] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Make tables of HL7 v2 messages (ORU) as site.yaml declares them. Units are converted; without network."""
    place, settings = _settings(home)
    _import(place, settings, "hl7", settings.hl7, export, as_json)


def _import(
    place: Home,
    settings: Intake,
    kind: str,
    exports: Mapping[str, FhirExport | Hl7Export],
    export: str | None,
    as_json: bool,
) -> None:
    from consilium_client.intake.fhir import import_export
    from consilium_client.intake.pseudonyms import Pseudonyms
    from consilium_client.transport.sandbox import forbid_network

    forbid_network()
    if not exports or (export is not None and export not in exports):
        known = ", ".join(exports) or "none"
        raise ConfigurationError(f"{place.config_file}: intake.{kind} has no such export ({known})")
    names = Pseudonyms(place.intake, settings.shift_days)
    wanted = [export] if export is not None else list(exports)
    found = {name: import_export(exports[name].at(place.root), names) for name in wanted}
    if as_json:
        print(json.dumps({name: vars(done) for name, done in found.items()}, indent=2, sort_keys=True))
        return
    for name, done in found.items():
        _say(f"{name}: {done.patients} patients, {done.samples} samples" + _rest(Counter(done.aside)))


def _watch(bar: Progress, task: TaskID, done: int) -> None:
    bar.update(task, completed=done)


def import_sql(
    export: Annotated[str | None, typer.Argument(help="an export of site.yaml; all of them by default")] = None,
    home: HomeOption = DEFAULT_HOME,
    as_json: JsonOption = False,
) -> None:
    """Make tables of a database, or of a folder of exported tables, as site.yaml declares them. It is only read."""
    from consilium_client.intake.pseudonyms import Pseudonyms
    from consilium_client.intake.sql import import_tables
    from consilium_client.transport.sandbox import forbid_network

    place, settings = _settings(home)
    if not settings.sql or (export is not None and export not in settings.sql):
        known = ", ".join(settings.sql) or "none"
        raise ConfigurationError(f"{place.config_file}: intake.sql has no such export ({known})")
    wanted = [export] if export is not None else list(settings.sql)
    if all(settings.sql[name].source.kind == "folder" for name in wanted):
        forbid_network()
    names = Pseudonyms(place.intake, settings.shift_days)
    found = {}
    for name in wanted:
        with Progress(console=console.errors, disable=not console.errors.is_terminal) as bar:
            task = bar.add_task(f"rows of {name}", total=None)
            watch = partial(_watch, bar, task)
            found[name] = import_tables(settings.sql[name].at(place.root), names, watch)
    if as_json:
        print(json.dumps({name: vars(done) for name, done in found.items()}, indent=2, sort_keys=True))
        return
    for name, done in found.items():
        _say(
            f"{name}: {done.patients} patients, {done.records} records, {done.samples} samples"
            + _rest(Counter(done.aside))
        )
