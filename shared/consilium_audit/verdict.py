"""The outcome of a verification: which steps hold, what an auditor should know, and what stays open."""

from __future__ import annotations

from dataclasses import dataclass, field

from consilium_audit.evidence import STEPS


@dataclass(frozen=True)
class Passed:
    """A step that holds, and what was looked at, in words."""

    number: int
    says: str

    @property
    def name(self) -> str:
        """Subject of the step."""
        return STEPS[self.number]


@dataclass
class Verdict:
    """Verdict on the evidence of one study.

    Attributes:
        compared: whether the coordinator's key is the one whose fingerprint the auditor was told.
        steps: those that hold, in order.
        unchecked: participants whose ledgers are not there.
        notes: what an auditor should know although it breaks no rule.
        witnessed: of each ledger, (entries behind the last head that a record names, all entries).
    """

    study: str = ""
    coordinator: str = ""
    compared: bool = False
    rounds: int = 0
    steps: list[Passed] = field(default_factory=list)
    unchecked: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    witnessed: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def open(self) -> tuple[str, ...]:
        """Sentences on what stays open where every step holds; while there is one, nothing is verified whole."""
        found = []
        if not self.compared:
            found.append(
                "the coordinator's fingerprint was compared with nothing, and whoever made up a whole federation could "
                "have signed all of this: ask the coordinator and a hospital for it by telephone, and give it with "
                "--coordinator"
            )
        if self.unchecked:
            found.append(
                f"the ledgers of {', '.join(self.unchecked)} are missing: ask these hospitals for them, or leave that "
                "open with --partial"
            )
        return tuple(found)
