"""consilium-site: hospital IT's program."""

from __future__ import annotations

import getpass
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer
from rich.progress import Progress

from consilium_client.commands import data_check, intake, screen
from consilium_client.commands.ask import ask
from consilium_client.commands.enroll import enroll as enroll_site
from consilium_client.commands.up import up_forever
from consilium_client.site import Home
from consilium_client.transport import contact
from consilium_shared import console
from consilium_shared.errors import BudgetRefused, ConfigurationError, PolicyRefusal
from consilium_shared.identity import PublicIdentity
from consilium_shared.protocol import version

if TYPE_CHECKING:
    from consilium_shared.study import Study

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Run a site: enroll, up, approve, budget.")
version.add_to(app)
intake.add_to(app)
data_check.add_to(app)

HomeOption = Annotated[Path, typer.Option("--home", envvar="CONSILIUM_SITE_HOME", help="The site's folder.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
StudyFile = Annotated[Path, typer.Argument(help="STUDY.yaml")]
StudyName = Annotated[str, typer.Argument(help="name of the study, or the beginning of its digest")]
By = Annotated[str | None, typer.Option("--by", help="Who decides (this account by default); it stands in the ledger.")]
AssetOption = Annotated[str | None, typer.Option(help="An asset of site.yaml; the study's own by default.")]
DEFAULT_HOME = Path("consilium-site")


def _contract(file: Path) -> Study:
    """The contract in a study's file. Its schema is loaded here, since most commands need none."""
    from consilium_shared.config import load_yaml
    from consilium_shared.study import Study

    return load_yaml(file, Study)


def _say(text: str, style: str | None = None) -> None:
    console.console.print(text, style=style, markup=False)


def _say_all(lines: Iterable[screen.Line]) -> None:
    for line in lines:
        _say(*line)


@app.command()
def enroll(
    invitation: Annotated[Path, typer.Argument(help="the invitation that the coordinator sent")],
    home: HomeOption = DEFAULT_HOME,
    fingerprint: Annotated[str | None, typer.Option(help="The coordinator's, as read to you by telephone.")] = None,
) -> None:
    """Accept an invitation: make this site's keys here and print the request for the coordinator."""
    place = Home(home.resolve())
    done = enroll_site(place, invitation, fingerprint)
    coordinator = PublicIdentity.from_hex(done.invitation.coordinator).fingerprint
    _say(
        f"site {done.invitation.site} of federation {done.invitation.name}" + ("" if done.new else ": enrolled before")
    )
    if done.moved:
        where = f"{done.invitation.address}:{done.invitation.port}"
        _say(
            f"the server is called at {where} from now on; keys, ledger and roster stay. Start consilium-site up again"
        )
        return
    _say(f"coordinator's fingerprint: {coordinator}")
    _say(f"this site's fingerprint:   {done.identity.fingerprint}")
    if fingerprint is None:
        _say("Compare both with the coordinator by telephone before you go on.", "yellow")
    _say(f"Send this file to the coordinator: {place.request_file}")
    _say(f"Then say what the site has and permits in {place.config_file}, and run: consilium-site doctor")


@app.command()
def rotate(home: HomeOption = DEFAULT_HOME) -> None:
    """Make a new key for this site's SuperNode, and the request to take it in place of the old or lost one."""
    from consilium_client.commands.rotate import rotate as rotate_key

    place = Home(home.resolve())
    rotate_key(place)
    _say(f"Send this file to the coordinator: {place.rotation_file}")
    _say("Once it is admitted there, the new key is taken into use by itself; until then the old one serves.")


@app.command()
def doctor(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Check everything that would stop this site; the exit status is 2 when something would."""
    from consilium_client.commands.doctor import examine

    found = list(examine(Home(home.resolve())))
    console.show(
        as_json,
        [vars(finding) for finding in found],
        "doctor",
        ["check", "state", "detail"],
        lambda: [(f.check, f.state, f.detail) for f in found],
    )
    if any(finding.state == "error" for finding in found):
        raise typer.Exit(2)


@app.command()
def studies(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """List what was proposed to this site, and what was decided."""
    found = ask(Home(home.resolve()).admin_socket, "studies")
    console.show(
        as_json,
        found,
        "studies",
        screen.STUDIES,
        lambda: screen.studies(found),
    )
    if not as_json:
        _say_absences(found)


def _say_absences(studies: list[dict[str, Any]]) -> None:
    for study in studies:
        for line in screen.absences(study):
            _say(line)


def _decider(by: str | None) -> str:
    try:
        return by or getpass.getuser()
    except (KeyError, OSError, ImportError) as error:  # an account without a name, as in many containers
        raise ConfigurationError("say who decides: --by NAME") from error


def _confirmed(question: str) -> bool:
    try:
        return typer.confirm(question)
    except click.Abort as error:
        if sys.stdin.isatty():
            raise
        raise ConfigurationError(
            "nobody answered, nothing was decided; where nobody can be asked, give --yes"
        ) from error


@app.command()
def approve(
    study: StudyName,
    home: HomeOption = DEFAULT_HOME,
    by: By = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a study would train on and cost, and approve it."""
    if as_json and not yes:
        raise ConfigurationError("--json asks nothing: look with show, then give --yes")
    who, socket = _decider(by), Home(home.resolve()).admin_socket
    estimate = ask(socket, "estimate", study=study)
    if not as_json:
        _say_all(screen.described(estimate))
    if estimate["state"] == "approved":
        raise ConfigurationError(f"study {estimate['study']} is approved already, by {estimate['by']}")
    if estimate["refused"]:
        rules = "; ".join(
            f"{each['rule']} (to permit it, in site.yaml: {each['remedy']})" for each in estimate["refused"]
        )
        raise PolicyRefusal("policy", f"study {estimate['study']} is refused by this site: {rules}")
    if not estimate["affordable"]:
        raise BudgetRefused(
            f"asset {estimate['asset']!r} cannot afford the study: {estimate['arithmetic']}. Nothing was approved or "
            "charged. What other studies hold: consilium-site budget; what a study that is over holds returns with "
            "consilium-site reject"
        )
    if not yes and not _confirmed("Approve this study?"):
        raise typer.Exit(1)
    # What was shown is what is approved, also when the name means another study by now, or the data has changed.
    approved = ask(socket, "approve", study=estimate["digest"], by=who, plan=estimate["plan"])
    if as_json:
        print(json.dumps(approved, indent=2, sort_keys=True))
    else:
        _say(f"approved by {who}; the entry is in the ledger")


@app.command()
def show(study: StudyName, home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Show what a study would train on and cost, without deciding."""
    estimate = ask(Home(home.resolve()).admin_socket, "estimate", study=study)
    if as_json:
        print(json.dumps(estimate, indent=2, sort_keys=True))
    else:
        _say_all(screen.described(estimate))


@app.command()
def reject(
    study: StudyName,
    reason: Annotated[str, typer.Option("--reason", help="Why; it stands in the ledger.")],
    home: HomeOption = DEFAULT_HOME,
    by: By = None,
) -> None:
    """Say no to a study, or withdraw an approval: the next round is refused."""
    who = _decider(by)
    ask(Home(home.resolve()).admin_socket, "reject", study=study, by=who, reason=reason)
    _say(f"rejected by {who}; the entry is in the ledger")


@app.command()
def retry(study: StudyName, home: HomeOption = DEFAULT_HOME) -> None:
    """Try this machine with a study again that it was too slow for, or that took more memory than there was."""
    found = ask(Home(home.resolve()).admin_socket, "retry", study=study)
    _say(f"{found['study']}: this machine is tried again before the next round is charged; the coordinator asks again")


@app.command()
def budget(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Show what every asset's patients have been charged, and what is left."""
    found = ask(Home(home.resolve()).admin_socket, "budget")
    console.show(
        as_json,
        found,
        "privacy budget",
        screen.BUDGET,
        lambda: screen.budgets(found),
    )
    if not as_json:
        for line in screen.alone(found):
            _say(line)


@app.command()
def up(home: HomeOption = DEFAULT_HOME) -> None:
    """Run the site's programs until Ctrl-C: agent (no network), SuperNode and courier (outbound), the receiver."""
    up_forever(Home(home.resolve()), _say)


@app.command()
def status(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Show what the site does now."""
    from consilium_client.commands.checks import installation

    place = Home(home.resolve())
    found = contact.read(place.root)
    value = ask(place.admin_socket, "status") | {"connected": found.connected(), "contact": vars(found)}
    receiver = installation.intake(place)
    if receiver is not None:
        value["receiver"] = vars(receiver)
    if as_json:
        print(json.dumps(value, indent=2, sort_keys=True))
        return
    activity = value["activity"]
    where = f" {activity['study']}" if "study" in activity else ""
    where += f" round {activity['round']}" if "round" in activity else ""
    where += f" step {activity['step']} of {activity['steps']}" if "step" in activity else ""
    where += f", {activity['done']} of {activity['of']}" if "done" in activity else ""
    _say(f"site {value['site']}: {activity['doing']}{where}")
    _say(f"connected: {'yes, ' if value['connected'] else ''}{found.said()}")
    if receiver is not None:
        _say(f"receiver: {receiver.detail}", None if receiver.state == "ok" else "yellow")
    _say(f"release {value['release']}, running for {value['up_seconds']} s")
    _say(f"ledger: {value['ledger']['entries']} entries, head {value['ledger']['head'][:16]}")
    for study in value["studies"]:
        charged = f"{study['rounds_charged']} of {study['rounds']} rounds charged"
        _say(f"study {study['study']}: {screen.state(study)}, {charged}")
    _say_absences(value["studies"])


@app.command()
def baseline(
    study: StudyFile,
    home: HomeOption = DEFAULT_HOME,
    train_on: AssetOption = None,
    test_on: Annotated[list[str] | None, typer.Option(help="Assets to test on; that of --train-on by default.")] = None,
    weights: Annotated[Path | None, typer.Option(help="Weights that the study starts from, if it names some.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a study on this site's data alone, to see what federating gains. Nothing leaves, nothing is charged."""
    from consilium_client.commands.baseline import load_asset, start_from, test, train_alone

    place, contract = Home(home.resolve()), _contract(study)
    config = place.config()
    asset, start = train_on or contract.data.asset, start_from(contract, weights)
    with Progress(console=console.errors, disable=not console.errors.is_terminal) as bar:
        task = bar.add_task(f"training on {asset} alone", total=contract.training.rounds)
        model = train_alone(
            contract,
            load_asset(config, place, asset, contract),
            config.device,
            lambda done, _: bar.update(task, completed=done),
            start,
            config.gradients,
        )
    found = {
        name: test(contract, model, load_asset(config, place, name, contract), config.device)
        for name in test_on or [asset]
    }
    _show_metrics(as_json, found)


@app.command()
def audit_canaries(
    study: StudyName,
    home: HomeOption = DEFAULT_HOME,
    canaries: Annotated[int | None, typer.Option(help="Invented patients, 10 … 100000; 2000 by default.")] = None,
    by: By = None,
    as_json: JsonOption = False,
) -> None:
    """Attack a study's plan with invented patients; show what the attack proves beside what was promised.

    Before it runs it says what it could show at best, and with how many canaries it could show the most. No patient's
    data is used and no budget is charged. The outcome is entered into the ledger, and goes to the coordinator with the
    study's last answer. The exit status is 70 when more was measured than the plan allows.
    """
    from consilium_client.commands import canary_audit

    who, place = _decider(by), Home(home.resolve())
    audited = canary_audit.Audited.of(ask(place.admin_socket, "plan", study=study))
    config, planned = place.config(), canary_audit.Planned.of(audited, canaries)
    if not as_json:
        for line in planned.lines():
            _say(line)
    with Progress(console=console.errors, disable=not console.errors.is_terminal) as bar:
        task = bar.add_task(f"auditing {audited.study.study} with canaries", total=None)
        result = canary_audit.run(planned, config, lambda n, all_: bar.update(task, completed=n, total=all_))
    entry = ask(place.admin_socket, "audit", **result.entry(who))["entry"]
    if as_json:
        print(json.dumps({**result.to_json(), "entry": entry}, indent=2, sort_keys=True))
    else:
        for line in result.lines():
            _say(line)
        _say(f"The outcome is entry {entry} of the ledger.")
    if result.contradiction is not None:
        console.errors.print(result.alarm(), style="bold red", markup=False)
        raise typer.Exit(console.INTERNAL)


@app.command()
def test(
    study: StudyFile,
    model: Annotated[Path, typer.Argument(help="model.safetensors")],
    home: HomeOption = DEFAULT_HOME,
    test_on: Annotated[list[str] | None, typer.Option(help="Assets to test on; the study's own by default.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Test a finished model on this site's held-back patients. Stays on this screen."""
    from consilium_client.commands.baseline import load_asset
    from consilium_client.commands.baseline import test as test_model
    from consilium_shared import study_file
    from consilium_shared.models.vector import study_of

    place = Home(home.resolve())
    config = place.config()
    try:
        content = model.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read {model}: {error.strerror}") from error
    contract = study_file.read_as(study, study_of(content))
    found = {
        name: test_model(contract, content, load_asset(config, place, name, contract), config.device)
        for name in test_on or [contract.data.asset]
    }
    _show_metrics(as_json, found)


def _show_metrics(as_json: bool, found: dict[str, dict[str, Any]]) -> None:
    names = sorted({name for values in found.values() for name in values})
    console.show(
        as_json,
        found,
        "held-back patients",
        ["metric", *found],
        lambda: [
            (name, *(f"{v:.3f}" if isinstance(v := values.get(name), float) else v for values in found.values()))
            for name in names
        ],
    )


def main() -> None:
    """Entry point."""
    console.run(app, "consilium-site")


if __name__ == "__main__":
    main()
