"""Progress of a study, from its events: a state for scripts, lines for a log, a live view for a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from consilium_server.state.study_folder import StudyFolder
from consilium_shared.errors import TransportError
from consilium_shared.protocol.reasons import PASSING

GONE_SECONDS = 5.0
REPORTED = "as reported by the sites"
ENDED = frozenset({"finished", "stopped", "failed"})


@dataclass
class Progress:
    """Everything that the events have said so far."""

    name: str
    rounds: int
    state: str = "wanted"
    why: str = ""
    round: int = 0
    """Rounds that are finished."""
    current: int = 0
    phase: str = ""
    since: float = 0.0
    sites: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, Any] | None = None
    evaluated: int = 0
    """The round after which the model has these metrics."""
    no_metrics: str = ""
    """Reason why a later round has no metrics."""
    norms: dict[int, float | None] = field(default_factory=dict)
    """Round to the L2 norm of its mean update."""
    epsilon: dict[str, float | None] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    heard: dict[str, float] = field(default_factory=dict)
    """Site to the time of its last answer, refusals among them."""
    waiting: str = ""
    model: str = ""

    def apply(self, event: dict[str, Any]) -> str | None:
        """Take one event in; returns a line for the log, or None for one that needs none."""
        if event["event"] in ("answer", "proposal", "refusal", "back"):
            self.heard[event["site"]] = event.get("time", 0.0)
        handler = getattr(self, f"_on_{event['event']}", None)
        return handler(event) if handler is not None else None

    def out(self) -> dict[str, str]:
        """Sites that refused and are out of a study that runs, with what is said of them."""
        return {site: what for site, what in self.sites.items() if what.startswith(("out:", "stopped:", "refused"))}

    def _note(self, site: str, now: str) -> None:
        """Note what a site does; at the end of a study it stays what its part in the rounds came to."""
        if self.phase != "closing":
            self.sites[site] = now

    def _on_state(self, event: dict[str, Any]) -> str:
        self.state, self.why = event["state"], event["why"]
        self.waiting = ""
        return f"study {self.name}: {self.state}" + (f": {self.why}" if self.why else "")

    def _on_proposal(self, event: dict[str, Any]) -> str:
        self.sites[event["site"]] = event["state"] + (f" ({event['reason']})" if event["reason"] else "")
        detail = f": {event['detail']}" if event["detail"] else ""
        return f"{event['site']}: {self.sites[event['site']]}{detail}"

    def _on_round(self, event: dict[str, Any]) -> str:
        self.current, self.phase, self.since = event["round"], event["phase"], event["time"]
        if self.phase in ("training", "evaluation", "closing"):
            for site in event["sites"]:
                self._note(site, "asked")
        sites = len(event["sites"])
        return f"round {self.current} of {self.rounds}: {self.phase}, {sites} site{'s' * (sites != 1)} asked"

    def _on_answer(self, event: dict[str, Any]) -> str | None:
        if event["phase"] not in ("training", "evaluation", "closing"):
            return None
        self._note(event["site"], f"in after {event['seconds']:.1f} s")
        return f"round {event['round']}: {event['site']} in after {event['seconds']:.1f} s ({event['bytes']} bytes)"

    def _on_refusal(self, event: dict[str, Any]) -> str:
        reason, again = event["reason"], event.get("again")
        how = "refuses" if reason in PASSING else "stopped" if again is None else "out"
        when = "" if again is None else f"asked again for round {again}"
        self._note(event["site"], f"{how}: {reason}" + (f", {when}: {event['detail']}" if when else ""))
        ask = when or ("" if how == "refuses" else f"asked again after: consilium-server resume {self.name}")
        return f"round {event['round']}: {event['site']} {how} ({reason}): {event['detail']}" + (
            f"; {ask}" if ask else ""
        )

    def _on_back(self, event: dict[str, Any]) -> str:
        self._note(event["site"], f"back for round {event['round']}")
        return f"round {event['round']}: {event['site']} takes part again"

    def _on_problem(self, event: dict[str, Any]) -> str:
        self._note(event["site"], f"away: {event['what']}")
        return f"round {event['round']}: {event['site']} is away: {event['what']}"

    def _on_waiting(self, event: dict[str, Any]) -> str:
        names = ", ".join(f"{site} ({why})" for site, why in sorted(event["sites"].items()))
        least = event["minimum"]  # 0 where nobody has to answer, as at the study's end
        self.waiting = (f"{event['have']} of at least {least} sites; " if least else "") + f"waiting for {names}"
        return self.waiting

    def _on_abandoned(self, event: dict[str, Any]) -> str:
        self.waiting = ""
        return f"round {event['round']}: attempt {event['attempt']} was abandoned, nothing was opened: {event['why']}"

    def _on_implausible(self, event: dict[str, Any]) -> str:
        return f"round {event['round']}: no step was taken: {event['why']}"

    def _on_evaluated(self, event: dict[str, Any]) -> str:
        self.metrics, self.evaluated, self.no_metrics = event["metrics"], event["round"], ""
        return f"model after round {event['round']}, {REPORTED}: {format_metrics(event['metrics'])}"

    def _on_no_metrics(self, event: dict[str, Any]) -> str:
        self.no_metrics = f"model after round {event['round']}: no metrics, somebody spoilt the counts: {event['why']}"
        return self.no_metrics

    def _on_closed(self, event: dict[str, Any]) -> str:
        self.round, self.waiting = event["round"], ""
        self.seconds.append(event["seconds"])
        self.epsilon.update(event["epsilon"])
        self.norms[event["round"]] = event.get("update_norm")
        missing = sorted({*event["away"], *event.get("refused", ())})
        away = f"; without {', '.join(missing)}" if missing else ""
        for site, why in event["away"].items():
            self._note(site, f"away: {why}")
        norm = event.get("update_norm")  # events of older versions have none
        length = "" if norm is None else f"; the mean update has norm {norm:.3g}"
        return f"round {self.round} done in {event['seconds']:.1f} s{length}{away}"

    def _on_published(self, event: dict[str, Any]) -> str:
        self.model = event["folder"]
        return f"model: {self.model}"


def format_metrics(metrics: dict[str, Any] | None) -> str:
    """Metrics in words, such as ``auroc 0.832 [0.790, 0.874] (95 % intervals of the noise)`` where they are noised."""
    if not metrics:
        return "none"
    ends = metrics.get("interval", {})
    shown = ", ".join(
        _format_metric(name, value, ends.get(name), noised="interval" in metrics)
        for name, value in metrics.items()
        if value is None or isinstance(value, float)
    )
    return shown + (" (95 % intervals of the noise)" if ends else "")


def _format_metric(name: str, value: float | None, ends: list[float] | None, *, noised: bool) -> str:
    if value is None:
        return f"{name} unknown" + (" (too much noise)" if noised else "")
    return f"{name} {value:.3f}" + (f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else "")


def read(folder: StudyFolder) -> Progress:
    """Progress of the study so far."""
    progress = Progress(folder.name, folder.study().training.rounds)
    for _, event in folder.events():
        progress.apply(event)
    progress.state, progress.why = folder.state()
    return progress


def follow(folder: StudyFolder, console: Console, start: int, serving: Callable[[], bool]) -> Progress:
    """Show the study until it ends: a live view on a terminal, lines elsewhere. Ctrl-C leaves the study running.

    Args:
        start: events up to this offset are of earlier days and are not printed as lines.
        serving: False when nobody runs studies any more.

    Raises:
        TransportError: ``serving`` said no for ``GONE_SECONDS``.
    """
    gone: float | None = None
    progress = Progress(folder.name, folder.study().training.rounds)
    offset = 0
    live = Live(console=console, refresh_per_second=4, transient=False) if console.is_terminal else None
    with live or _Nothing():
        while True:
            for position, event in folder.events(offset):
                offset = position
                line = progress.apply(event)
                if line and live is None and offset > start:
                    console.print(f"{time.strftime('%H:%M:%S', time.localtime(event['time']))}  {line}", markup=False)
            if live is not None:
                live.update(render(progress))
            if progress.state in ENDED and folder.state()[0] in ENDED:
                return progress
            gone = None if serving() else gone or time.monotonic()
            if gone is not None and time.monotonic() - gone > GONE_SECONDS:
                raise TransportError("consilium-server up has ended; start it again, and the study goes on by itself")
            time.sleep(0.2)


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def render(progress: Progress) -> Group:
    """The live view."""
    head = Text(f"{progress.name}  ", style="bold")
    head.append(f"{progress.state}" + (f": {progress.why}" if progress.why else ""))
    bar = ProgressBar(total=progress.rounds, completed=progress.round, width=40)
    elapsed = f"{time.time() - progress.since:.0f} s" if progress.phase and progress.state == "running" else ""
    now = f"round {progress.current} of {progress.rounds}  {progress.phase}  {elapsed}" if progress.current else ""
    table = Table("site", "now", "ε spent", box=None, pad_edge=False)
    for site, what in sorted(progress.sites.items()):
        epsilon = progress.epsilon.get(site)
        table.add_row(site, what, "–" if epsilon is None else f"{epsilon:.3f}")
    parts: list[Any] = [head, bar, Text(now), table]
    if progress.metrics:
        parts.append(Text(f"after round {progress.evaluated}, {REPORTED}: {format_metrics(progress.metrics)}"))
    if progress.no_metrics:
        parts.append(Text(progress.no_metrics, style="yellow"))
    if len(known := [norm for norm in progress.norms.values() if norm is not None][-6:]) > 1:
        parts.append(Text("norm of the mean update, last rounds: " + ", ".join(f"{norm:.3g}" for norm in known)))
    if progress.waiting:
        parts.append(Text(progress.waiting, style="yellow"))
    if progress.model:
        parts.append(Text(f"model: {progress.model}"))
    return Group(*parts)


def format_epsilon(card: dict[str, Any]) -> tuple[str, str]:
    """ε of a model card: the largest that a site proved, at the study's δ; the largest that one measured at least."""
    if card["delta"] is None:
        return "none", "–"
    proven = max(card["epsilon"].values())
    measured = [each["epsilon_at_least"] for each in card.get("measured", {}).values()]
    return f"{proven:.3f} at δ {card['delta']:g}", f"≥ {max(measured):.2f} (95 %)" if measured else "–"
