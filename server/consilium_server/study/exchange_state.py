"""State machine of one exchange with many sites: who was asked, who answered, whether to go on waiting.

No clock, no network: time is an argument, messages are facts handed in.

    asked ──answer──► in
      │ ╲──refusal──► out   (not asked again in this round, unless the reason may pass by itself)
      │ ╲──problem──► away  (asked again while the round is open)
      ╰──timeout────► away  (the round closes without it; it is asked again next round)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from consilium_shared.protocol.reasons import PASSING

LATECOMER_SECONDS = 3.0
"""Seconds of waiting for a site that nobody counts on and of which one does not know how long it takes."""


@dataclass
class ExchangeState:
    """State of one exchange of a round.

    Args:
        sites: whom to ask.
        minimum: so many answers are enough.
        opened: seconds on any clock.
        timeout: seconds after which it closes without those who are away, if there are enough others.
        awaited: nobody else is waited for longer than ``latecomers``; None waits for everybody alike.
        least: after ``timeout`` it closes with so many answers too, though they are not enough; None waits on.
    """

    sites: tuple[str, ...]
    minimum: int
    opened: float
    timeout: float
    awaited: frozenset[str] | None = None
    least: int | None = None
    phase: str = ""
    latecomers: float = LATECOMER_SECONDS
    """Seconds."""
    answered: list[str] = field(default_factory=list)
    """In the order of arrival."""
    refused: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Site to (reason code, detail)."""
    problems: dict[str, str] = field(default_factory=dict)
    """Last problem of a site that has not answered yet."""
    failed_once: set[str] = field(default_factory=set)
    """Sites that failed inside and are asked once more before that counts."""

    def answer(self, site: str) -> None:
        """Note that ``site`` answered as asked."""
        self._expect(site)
        self.answered.append(site)
        self.problems.pop(site, None)

    def refuse(self, site: str, reason: str, detail: str) -> None:
        """Note a refusal of ``site``. A failure inside the site counts as a refusal the second time only."""
        self._expect(site)
        if reason == "internal" and site not in self.failed_once:
            self.failed_once.add(site)
            self.problems[site] = detail
            return
        self.refused[site] = (reason, detail)
        self.problems.pop(site, None)

    def problem(self, site: str, what: str) -> None:
        """Note that ``site`` could not be reached, or sent an unusable answer; it stays open."""
        self._expect(site)
        self.problems[site] = what

    def open(self) -> tuple[str, ...]:
        """Sites that may still answer."""
        return tuple(site for site in self.sites if site not in self.answered and site not in self.refused)

    def enough(self) -> bool:
        """True where the minimum has answered."""
        return len(self.answered) >= self.minimum

    def possible(self) -> bool:
        """True where enough can still be reached."""
        return len(self.answered) + len(self.open()) >= self.minimum

    def done(self, now: float) -> bool:
        """True once everybody has answered, or enough have and time is up, or enough never will."""
        if not self.open() or not self.possible():
            return True
        waited = now - self.opened
        if self.enough() and self.awaited is not None and not self.awaited & set(self.open()):
            return waited >= self.latecomers
        least = self.minimum if self.least is None else min(self.minimum, self.least)
        return waited >= self.timeout and len(self.answered) >= least

    def stopped(self) -> dict[str, tuple[str, str]]:
        """Refusals after which the site is out."""
        return {site: why for site, why in self.refused.items() if why[0] not in PASSING}

    def away(self) -> dict[str, str]:
        """Sites the question closed (or waits) without, and why."""
        return {site: self.problems.get(site, "no answer yet") for site in self.open()}

    def _expect(self, site: str) -> None:
        if site not in self.sites:
            raise ValueError(f"{site} was not asked")
        if site in self.answered or site in self.refused:
            raise ValueError(f"{site} has answered already")
