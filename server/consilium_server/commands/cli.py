"""consilium-server: the coordinator's program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from consilium_server import registry, removed
from consilium_server.commands import ask, graph, import_weights, status, study_check, suggest
from consilium_server.commands import evidence as study_evidence
from consilium_server.commands.admission import admit as admit_request
from consilium_server.commands.admission import exchange
from consilium_server.commands.provision import provision as provision_federation
from consilium_server.commands.provision import renew as renew_certificate
from consilium_server.commands.status import is_up
from consilium_server.commands.up import up_forever
from consilium_server.federation import Home
from consilium_server.state import progress, study_folder
from consilium_server.state.heads import Heads
from consilium_shared import certificates, console
from consilium_shared.errors import ConfigurationError, PeerError, TransportError
from consilium_shared.identity import PublicIdentity
from consilium_shared.protocol import version
from consilium_shared.protocol.rotation import is_rotation
from consilium_shared.secagg.terms import fewest_sites
from consilium_shared.study import Study

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Run a federation: provision, admit, up, run.")
version.add_to(app)
study_check.add_to(app)
suggest.add_to(app)
app.add_typer(graph.app, name="graph")
import_weights.add_to(app)
status.add_to(app)

HomeOption = Annotated[
    Path, typer.Option("--home", envvar="CONSILIUM_SERVER_HOME", help="The coordinator's folder.", show_default=True)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
DEFAULT_HOME = Path("consilium-server")


@app.command()
def provision(
    federation: Annotated[Path, typer.Argument(help="federation.yaml")], home: HomeOption = DEFAULT_HOME
) -> None:
    """Make keys, certificates and one invitation per site. A re-run makes only what is missing."""
    place = Home(home.resolve())
    made = provision_federation(place, federation)
    for line in made or ["nothing to do: everything was provisioned before"]:
        console.console.print(line, markup=False)
    console.console.print(f"coordinator's fingerprint: {place.coordinator().public.fingerprint}", markup=False)
    console.console.print("Send each site its invitation, and read it the fingerprint by telephone.", markup=False)


@app.command()
def admit(
    request: Annotated[list[Path], typer.Argument(help="join-request.json of a site")], home: HomeOption = DEFAULT_HOME
) -> None:
    """Check requests to join and add their sites to the signed roster."""
    place = Home(home.resolve())
    for file in request:
        try:
            content = file.read_bytes()
            if is_rotation(content):
                _exchange(place, content)
                continue
            joined, changed = admit_request(place, content)
        except OSError as error:
            raise ConfigurationError(f"cannot read {file}: {error.strerror}") from error
        except PeerError as error:
            raise type(error)(f"{file}: refused: {error}") from error
        fingerprint = PublicIdentity.from_hex(joined.identity).fingerprint
        what = "admitted" if changed else "was admitted before, nothing changed"
        console.console.print(f"{joined.site} {what}; its fingerprint: {fingerprint}", markup=False)
    console.console.print("Compare each fingerprint with the one that the hospital reads to you.", markup=False)


def _exchange(place: Home, content: bytes) -> None:
    """Admit another SuperNode key of a site that is in the roster."""
    request, changed = exchange(place, content)
    fingerprint = PublicIdentity.from_hex(request.identity).fingerprint
    both = "signed by both keys" if request.old_proof else "the old key is lost, and its identity alone vouches for it"
    what = f"has another SuperNode key from now on ({both})" if changed else "has that SuperNode key already"
    console.console.print(f"{request.site} {what}; its fingerprint: {fingerprint}", markup=False)


@app.command()
def remove(
    site: Annotated[str, typer.Argument(help="name of the site")],
    reason: Annotated[str, typer.Option("--reason", help="Why; it stands in the signed list of removed sites.")],
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Take a site out of the federation for good: from its next message on nothing of it is taken."""
    roster = removed.remove(Home(home.resolve()), site, reason)
    console.console.print(
        f"{site} is removed; roster version {roster.version} has {len(roster.members)} sites. Its keys are never taken "
        "again. Studies that run go on without it where enough sites are left",
        markup=False,
    )


@app.command()
def renew(home: HomeOption = DEFAULT_HOME) -> None:
    """Make the server's certificate anew, under the same CA. Studies go on, and no site needs anything."""
    made = renew_certificate(Home(home.resolve()))
    console.console.print(
        f"valid until {made.not_valid_after_utc:%Y-%m-%d}, for {', '.join(certificates.names(made))}; a server that "
        "runs takes it within seconds",
        markup=False,
    )


@app.command()
def up(home: HomeOption = DEFAULT_HOME) -> None:
    """Run the SuperLink and the studies until Ctrl-C."""
    up_forever(Home(home.resolve()), lambda line: console.console.print(line, markup=False))


@app.command()
def run(
    study: Annotated[Path, typer.Argument(help="STUDY.yaml")],
    home: HomeOption = DEFAULT_HOME,
    detach: Annotated[bool, typer.Option(help="Start it and return at once.")] = False,
    weights: Annotated[Path | None, typer.Option(help="Safetensors file of the weights to start from.")] = None,
    new_head: Annotated[bool, typer.Option(help="Of --weights all but the last layer, which starts anew.")] = False,
) -> None:
    """Start a study and show it until it ends. Ctrl-C leaves the study running.

    The study names the weights that it starts from by their digest (model.start), so that every hospital approves just
    these; with --weights and a study that does not, the digest is shown and nothing is started.
    """
    place = Home(home.resolve())
    contract = _contract(study, place)
    roster = place.roster()
    sites, least = len(roster.members), fewest_sites(contract, roster.members)
    if sites < least:
        raise ConfigurationError(
            f"{study}: every sum takes at least {least} sites (aggregation.min_sites, and two more than "
            f"corrupt_sites), but {sites} sites are admitted (consilium-server admit)"
        )
    if least > contract.aggregation.min_sites:
        console.errors.print(
            f"at least {least} of the roster's {sites} sites must take part in every round, so that no sum shows one "
            f"hospital's where {least - 2} help a coordinator that cheats (aggregation.corrupt_sites in {study})",
            markup=False,
        )
    folder = study_folder.folder(place, contract.study)
    folder.create(contract, place.roster_file.read_bytes(), _weights(study, contract, weights, new_head))
    _start(place, folder, detach)


ask.add_to(app, run)


def _contract(file: Path, home: Home) -> Study:
    """Contract of a study's file; of one that was started here before, perhaps by another release, as it was then."""
    from consilium_shared import study_file  # torch is slow to load

    found = study_file.read(file)
    try:
        started = study_folder.folder(home, found.study).study()
    except ConfigurationError:
        return found
    return study_file.read_as(file, started.digest, started.aggregation.norm_bound)


def _weights(file: Path, study: Study, weights: Path | None, new_head: bool) -> bytes | None:
    """The model before round 1, where it comes from a file."""
    if weights is None:
        if new_head:
            raise ConfigurationError(
                "--new-head leaves the last layer of given weights out, and none are given: add --weights FILE, or "
                "leave --new-head out (without weights every layer starts from model.seed)"
            )
        if study.model.start is not None:
            raise ConfigurationError(
                f"{file}: model.start names weights to start from; give their file: --weights FILE"
            )
        return None
    from consilium_shared.models import start
    from consilium_shared.models.vector import pack

    found = start.read(weights, study, new_head=new_head)
    for line in found.lines():
        console.errors.print(line, markup=False)
    start.check(found.vector, study, weights)
    return pack(found.vector, study)


@app.command()
def resume(
    study: Annotated[str, typer.Argument(help="name of the study")],
    home: HomeOption = DEFAULT_HOME,
    detach: Annotated[bool, typer.Option(help="Return at once.")] = False,
) -> None:
    """Go on with a study at the round where it stands, and show it. Sites that are out of it are asked again."""
    place = Home(home.resolve())
    folder = study_folder.folder(place, study)
    out = progress.read(folder).out() if folder.state()[0] == "running" else {}
    for site, what in sorted(out.items()):
        console.console.print(f"{site}: {what}; it is asked again for the next round", markup=False)
    _start(place, folder, detach, again=bool(out))


def _start(home: Home, folder: study_folder.StudyFolder, detach: bool, *, again: bool = False) -> None:
    """``again``: a study that runs is told so too: it asks whoever is out."""
    contract = folder.study()
    if not is_up(home):
        raise TransportError(f"nothing serves {home.root}; start it first: consilium-server up --home {home.root}")
    if contract.privacy.mode == "none":
        console.errors.print(
            "This study runs WITHOUT differential privacy: its model may reveal what it was trained on.",
            style="bold red",
            markup=False,
        )
    state, _ = folder.state()
    offset = max((offset for offset, _ in folder.events()), default=0)
    if state not in ("running", "finished") or (again and state == "running"):
        folder.set_state("wanted")
    if detach:
        console.console.print(f"study {folder.name}: {folder.state()[0]}", markup=False)
        return
    ended = progress.follow(folder, console.console, offset, lambda: is_up(home))
    if ended.state != "finished":
        raise TransportError(f"study {folder.name} {ended.state}: {ended.why}")
    model = registry.read(Path(ended.model), home.coordinator().public)
    found = progress.format_metrics(model.card["metrics"])
    console.console.print(f"{model.folder}; metrics, {progress.REPORTED}: {found}", markup=False)


@app.command()
def stop(study: Annotated[str, typer.Argument(help="name of the study")], home: HomeOption = DEFAULT_HOME) -> None:
    """Halt a study after the message in flight; resume goes on at the same round."""
    folder = study_folder.folder(Home(home.resolve()), study)
    folder.study()
    if folder.state()[0] == "finished":
        raise ConfigurationError(f"study {study} is finished")
    folder.set_state("stopped", "by the coordinator")


@app.command()
def readmit(site: Annotated[str, typer.Argument(help="name of the site")], home: HomeOption = DEFAULT_HOME) -> None:
    """Take a site's answers again, after all but one copy of its home were stopped (runbook two-homes.md)."""
    kept = Heads(Home(home.resolve()).heads).readmit(site)
    if kept is None:
        raise ConfigurationError(f"{site} is not halted; consilium-server status shows which sites are")
    console.console.print(
        f"{site}'s answers are taken again; {kept} is kept for the auditor. Studies that run ask the site after: "
        "consilium-server resume STUDY",
        markup=False,
    )


@app.command()
def models(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """List the finished models, each verified."""
    found = registry.all_models(Home(home.resolve()))
    console.show(
        as_json,
        [{"folder": str(m.folder), "card": m.card} for m in found],
        "models",
        ["study", "model", "rounds", "ε proven", "ε measured", f"metrics, {progress.REPORTED}", "folder"],
        lambda: [
            (
                m.card["study"],
                m.card["model"]["sha256"][:12],
                len(m.card["rounds"]),
                *progress.format_epsilon(m.card),
                progress.format_metrics(m.card["metrics"]),
                m.folder,
            )
            for m in found
        ],
    )


@app.command()
def export(
    study: Annotated[str, typer.Argument(help="name of the study")],
    target: Annotated[Path, typer.Argument(help="an existing or new folder, or a name that ends in .zip")],
    home: HomeOption = DEFAULT_HOME,
    licence: Annotated[Path | None, typer.Option(help="Text file: terms under which the model is handed out.")] = None,
) -> None:
    """Write a study's newest model as a signed bundle: weights, ONNX graph, card, page, example, script."""
    from consilium_server.export.bundle import export as export_bundle

    place = Home(home.resolve())
    model = export_bundle(place, study, target, licence)
    console.console.print(f"{target} has the signed bundle of {model.folder}", markup=False)
    console.console.print(f"coordinator's fingerprint: {place.coordinator().public.fingerprint}", markup=False)


@app.command()
def evidence(
    study: Annotated[str, typer.Argument(help="name of the study")],
    target: Annotated[Path, typer.Argument(help="a new folder, or one that holds the sites' ledgers")],
    home: HomeOption = DEFAULT_HOME,
) -> None:
    """Copy what an auditor needs of a study: roster, contract, signed round records, model card, public key."""
    place = Home(home.resolve())
    files = study_evidence.collect(place, study, target)
    members = study_folder.folder(place, study).roster(place).members
    console.console.print(f"{len(files)} files of study {study} are in {target}", markup=False)
    console.console.print(f"coordinator's fingerprint: {place.coordinator().public.fingerprint}", markup=False)
    ledgers = ", ".join(f"{member.site}.jsonl" for member in members)
    console.console.print(
        f"Ask each hospital for its ledger.jsonl, and put it there under the hospital's name: {ledgers}. Then: "
        f"consilium-audit verify {target}",
        markup=False,
    )


def main() -> None:
    """Entry point."""
    console.run(app, "consilium-server")


if __name__ == "__main__":
    main()
