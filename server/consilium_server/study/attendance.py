"""Attendance of a roster's sites in a study's rounds: who takes part, who is out, since when and why.

No site is without a reason, in any round. A site that refused is out, for this round; whoever refused for what its
people can mend is asked again, once a round, beside the work of the others, so that nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consilium_shared.canonical import canonical_bytes, parse_canonical
from consilium_shared.errors import PeerError
from consilium_shared.files import write_atomically

LASTING = frozenset({"rejected", "wrong-roster", "wrong-federation", "bad-signature", "ledger", "removed"})
"""Reasons that do not pass by themselves: after one of them a site is asked again when the study is resumed."""
PATIENCE = 9
"""Rounds in a row that a site takes part in until one of its failures is forgiven: so however it chooses when to fail,
it costs the others no more than one round in ten, and a few at the beginning."""
REMARKS = 20
"""Most remarks on one site in one round; a site that is asked for ever must not fill the record."""


@dataclass(frozen=True)
class Out:
    """A site's absence after a refusal.

    Attributes:
        since: round in which it began; 0 before the first.
        reason, detail: of the last refusal.
        again: round for which it is asked again; None: when the study is resumed, if ever.
    """

    since: int
    reason: str
    detail: str
    again: int | None


class Attendance:
    """Status of each site, and what happened to it in the round under way."""

    def __init__(self, sites: Collection[str], rounds: int, file: Path) -> None:
        """``rounds``: of the study; ``file`` keeps a round's notes over a restart, and a damaged one is begun anew."""
        self.standing: dict[str, str] = dict.fromkeys(sites, "pending")
        """``pending``, ``approved`` or ``refused``."""
        self.out: dict[str, Out] = {}
        self.round = 0
        self._rounds = rounds
        self._file = file
        self._refused: dict[str, tuple[str, str]] = {}
        self._away: dict[str, str] = {}
        self._remarks: dict[str, list[str]] = {}
        self._in_vain: dict[str, int] = {}
        """Times that a site gave keys and then no update, and was not forgiven: that costs the others an attempt."""
        self._good: dict[str, int] = {}
        """Rounds in a row that a site which is not forgiven has taken part in."""
        self._rests: dict[str, tuple[int, int]] = {}
        """Site to the round in which it was late, and the first one for which it is asked again."""

    def sites(self, state: str) -> tuple[str, ...]:
        """Sites that stand so."""
        return tuple(site for site, now in self.standing.items() if now == state)

    def begin(self, number: int) -> None:
        """Round ``number`` begins, or goes on after a restart."""
        if number == self.round:
            return
        self.round, self._refused, self._away, self._remarks = number, {}, {}, {}
        try:
            kept = parse_canonical(self._file.read_bytes())
            if kept["round"] == number:
                self._refused = {site: (why[0], why[1]) for site, why in kept["refused"].items()}
                self._away, self._remarks = dict(kept["away"]), {s: list(each) for s, each in kept["remarks"].items()}
        except (OSError, PeerError, KeyError, TypeError, IndexError):
            pass

    def come(self, site: str) -> bool:
        """Let ``site`` take part again; returns whether it was out."""
        self.standing[site] = "approved"
        return self.out.pop(site, None) is not None

    def took_part(self, sites: Collection[str]) -> None:
        """Note the sites whose updates are in the round's model."""
        for site in sites:
            if site not in self._in_vain:
                continue
            self._good[site] = self._good.get(site, 0) + 1
            if self._good[site] == PATIENCE:
                self._good[site] = 0
                self._in_vain[site] -= 1
                if not self._in_vain[site]:
                    del self._in_vain[site]

    def _pause(self, site: str) -> int:
        """Rounds after which a site that failed once more, having given keys, is asked again: 1, 2, 4, …"""
        times = self._in_vain.get(site, 0)
        self._in_vain[site], self._good[site] = times + 1, 0
        return 1 << min(times, 10)

    def late(self, site: str, number: int) -> int:
        """Note that ``site`` gave keys for round ``number`` and no update in time: it is left out for a while.

        Returns:
            The first round for which it is asked again; its keys for rounds between are not asked for.
        """
        if site in self._rests and self._rests[site][0] == number:
            return self._rests[site][1]  # of another attempt at the same round
        self._rests[site] = number, number + self._pause(site)
        return self._rests[site][1]

    def resting(self, number: int) -> frozenset[str]:
        """Sites that are left out of round ``number``, as they were late in earlier ones."""
        return frozenset(site for site, (late, again) in self._rests.items() if late < number < again)

    def undecided(self, site: str, *, lost: bool = False) -> None:
        """The hospital has not decided. ``lost``: it does not know the study, and is to be told of it again."""
        self.standing[site] = "pending"
        if not lost:
            self.out.pop(site, None)

    def refuse(self, site: str, reason: str, detail: str, asked_for: int, *, costly: bool = False) -> int | None:
        """``site`` is out.

        Args:
            asked_for: the round it was asked for; later than the one under way where it was asked ahead.
            costly: it had given keys for the sum; then it is asked again after growing pauses.

        Returns:
            The round for which it is asked again; None when the study is resumed.
        """
        since = self.out[site].since if site in self.out else asked_for
        pause = self._pause(site) if costly else 1
        again = None if reason in LASTING or asked_for + pause > self._rounds else asked_for + pause
        self.standing[site], self.out[site] = "refused", Out(since, reason, detail, again)
        return again

    def due(self, number: int, cohort: Collection[str]) -> tuple[str, ...]:
        """Sites outside the cohort that are to be asked whether they take part in round ``number``."""
        resting = self.resting(number)
        return tuple(
            site
            for site, now in self.standing.items()
            if site not in cohort
            and site not in resting
            and (now != "refused" or ((again := self.out[site].again) is not None and again <= number))
        )

    def recall(self) -> None:
        """Ask again whoever is out, whatever the reason was, since somebody resumed the study."""
        for site, out in list(self.out.items()):
            self.out[site] = Out(out.since, out.reason, out.detail, 0)
        self._in_vain, self._good, self._rests = {}, {}, {}

    # -- what happened in the round under way

    def note_refusal(self, site: str, reason: str, detail: str) -> None:
        """Note that ``site`` refused something in this round."""
        self._refused[site] = reason, detail
        self._remark(site, f"{reason}: {detail}" if detail else reason)

    def note_away(self, site: str, what: str) -> None:
        """Note that ``site`` was away for something in this round."""
        self._away[site] = what
        self._remark(site, what)

    def _remark(self, site: str, what: str) -> None:
        remarks = self._remarks.setdefault(site, [])
        if what not in remarks and len(remarks) < REMARKS:
            remarks.append(what)
        kept: dict[str, Any] = {"round": self.round, "away": self._away, "remarks": self._remarks}
        kept["refused"] = {name: list(why) for name, why in self._refused.items()}
        write_atomically(self._file, canonical_bytes(kept))

    def absent(self, participants: Collection[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
        """Every site of the roster that is not among ``participants``: who was away and why, who refused and why."""
        away: dict[str, str] = {}
        refused: dict[str, list[str]] = {}
        resting = {site: self._rests[site] for site in self.resting(self.round)}
        for site, now in self.standing.items():
            if site in participants:
                continue
            out = self.out.get(site)
            if out is not None and out.since < self.round:
                when = f"since round {out.since}" if out.since else "since before round 1"
                refused[site] = [out.reason, f"{when}: {out.detail}" if out.detail else when]
            elif site in self._refused:
                refused[site] = list(self._refused[site])
            elif out is not None and out.since == self.round:
                refused[site] = [out.reason, out.detail]
            elif site in resting and site not in self._away and now != "pending":
                late, again = resting[site]
                away[site] = f"left out until round {again}: it gave keys and was late, in round {late} the last time"
            else:
                away[site] = "not decided" if now == "pending" else self._away.get(site, "was not asked for this sum")
        return away, refused

    def remarks(self, participants: Collection[str]) -> dict[str, list[str]]:
        """Further events of this round, by site: of sites that took part, and of others that had more than one."""
        return {
            site: list(remarks)
            for site, remarks in sorted(self._remarks.items())
            if site in participants or len(remarks) > 1
        }

    def told_out(self) -> str:
        """Sites that are out and why, in words; empty where none is."""
        return ", ".join(
            f"{site} ({out.reason}{': ' + out.detail if out.detail else ''})" for site, out in self.out.items()
        )
