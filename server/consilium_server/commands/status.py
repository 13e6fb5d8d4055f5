"""Commands that look: who is there, where the studies stand, and what would stop them."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from consilium_server.federation import Home
from consilium_server.state import progress, study_folder
from consilium_server.state.heads import Heads
from consilium_server.state.progress import Progress
from consilium_server.superlink import presence
from consilium_server.superlink.control import online_nodes
from consilium_server.superlink.presence import Presence
from consilium_server.superlink.settings import settings_of
from consilium_shared import console
from consilium_shared.errors import ConsiliumError
from consilium_shared.process.process_lock import is_held

HomeOption = Annotated[
    Path, typer.Option("--home", envvar="CONSILIUM_SERVER_HOME", help="The coordinator's folder.", show_default=True)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable output.")]
DEFAULT_HOME = Path("consilium-server")


def add_to(app: typer.Typer) -> None:
    """Give consilium-server these commands."""
    app.command()(status)
    app.command()(doctor)


def doctor(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Check everything that would stop this server, or keep a site off; the exit status is 2 when something would."""
    from consilium_server.commands.doctor import examine

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


def status(home: HomeOption = DEFAULT_HOME, as_json: JsonOption = False) -> None:
    """Show sites and studies: who is connected or since when not, for whom a study waits, how long it still takes."""
    place = Home(home.resolve())
    found = [progress.read(folder) for folder in study_folder.all_folders(place)]
    online = connected(place)
    value: dict[str, Any] = {
        "up": is_up(place),
        "sites": sites(place),
        "connected": online,
        "presence": {site: asdict(each) for site, each in _presences(place).items()},
        "exchanged": _exchanged(found),
        "studies": {p.name: _study(p) for p in found},
    }
    if as_json:
        print(json.dumps(value, indent=2, sort_keys=True))
        return
    console.console.print(f"serving: {'yes' if value['up'] else 'no (consilium-server up)'}", markup=False)
    there, exchanged = _presences(place), value["exchanged"]
    console.table(
        "sites",
        ["site", "state", "connected", "last exchange", "release"],
        [
            (
                site,
                state,
                said(there.get(site, Presence()), None if online is None else site in online),
                ago(exchanged.get(site)),
                there.get(site, Presence()).release,
            )
            for site, state in value["sites"].items()
        ],
    )
    console.table("studies", ["study", "state", "rounds", "sites"], [_row(p) for p in found])
    for p in found:
        metrics = progress.format_metrics(p.metrics)
        if p.metrics or p.no_metrics:
            console.console.print(f"{p.name}: {metrics}, {progress.REPORTED}", markup=False)
        if p.no_metrics:
            console.console.print(f"{p.name}: {p.no_metrics}", markup=False)


def _row(p: Progress) -> tuple[str, ...]:
    state = p.state + (f": {p.why}" if p.why else "")
    if (left := seconds_left(p)) is not None:
        state += f", about {duration(left)} left"
    about = [f"{site}: {what}" for site, what in sorted(p.sites.items())] + ([p.waiting] if p.waiting else [])
    return p.name, state, f"{p.round}/{p.rounds}", "\n".join(about)


def _study(p: Progress) -> dict[str, Any]:
    return {
        "state": p.state,
        "why": p.why,
        "rounds_done": p.round,
        "rounds": p.rounds,
        "sites": p.sites,
        "waiting": p.waiting,
        "seconds_left": seconds_left(p),
        "metrics": p.metrics,
        "no_metrics": p.no_metrics,
        "update_norms": p.norms,
        "epsilon": p.epsilon,
        "model": p.model,
    }


def is_up(home: Home) -> bool:
    """True while ``consilium-server up`` runs for this home."""
    return is_held(home.run / "up.lock")


def seconds_left(p: Progress) -> float | None:
    """Estimate of how long a running study still takes: its rounds take as long as the half of those that were quicker.

    None where no round is done yet, or somebody is waited for: nobody knows how long people take.
    """
    if p.state != "running" or not p.seconds or p.waiting:
        return None
    return round((p.rounds - p.round) * statistics.median(p.seconds), 1)


def _exchanged(found: list[Progress]) -> dict[str, float]:
    """Time of each site's last answer in any study."""
    times: dict[str, float] = {}
    for p in found:
        for site, at in p.heard.items():
            times[site] = max(at, times.get(site, 0.0))
    return times


def _presences(home: Home) -> dict[str, Presence]:
    return presence.of_sites(settings_of(home).directory, home.roster())


def said(found: Presence, online: bool | None) -> str:
    """Words for whether a site is connected, and since when not."""
    if online:
        return "yes"
    if (ahead := found.wrong_clock()) is not None:
        return f"refused: its clock is {duration(abs(ahead))} {'ahead' if ahead > 0 else 'behind'}"
    if found.seen is None:
        return "never"
    return f"not since {since(found.seen)}" if online is False else f"? (last {since(found.seen)})"


def since(moment: float) -> str:
    """A moment for people, UTC, to the minute."""
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M} UTC"


def ago(moment: float | None) -> str | None:
    """Time since a moment, for people; None of no moment."""
    return None if moment is None else f"{duration(max(time.time() - moment, 0.0))} ago"


def duration(seconds: float) -> str:
    """Length of a time, in the unit that suits it.

    >>> [duration(each) for each in (7, 600, 7200, 400_000)]
    ['7 s', '10 min', '2 h', '5 days']
    """
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length or (unit == "min" and seconds >= 120):
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def sites(home: Home) -> dict[str, str]:
    """State of each invited site."""
    invited = {file.stem for file in home.invitations.glob("*.json")}
    admitted, heads = {member.site for member in home.roster().members}, Heads(home.heads)
    states = {site: "admitted" if site in admitted else "invited" for site in sorted(invited | admitted)}
    halted = {site: heads.halted(site) for site in admitted}
    return states | {site: f"halted: {proof}" for site, proof in halted.items() if proof is not None}


def connected(home: Home) -> list[str] | None:
    """Sites whose SuperNode is connected now; None where the SuperLink cannot be asked."""
    if not is_up(home):
        return None
    try:
        return sorted(online_nodes(settings_of(home)))
    except ConsiliumError:
        return None
