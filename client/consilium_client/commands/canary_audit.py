"""``consilium-site audit-canaries``: runs the audit of one study's plan, and says what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from consilium_client.site_config import SiteConfig
from consilium_shared.errors import ConfigurationError
from consilium_shared.privacy.canaries import (
    CONFIDENCE,
    Bounds,
    Outcome,
    Power,
    compare,
    contradiction,
    nearest,
    needed,
    power,
)
from consilium_shared.privacy.plan import PrivacyPlan, plan_from_dict
from consilium_shared.study import Study


@dataclass(frozen=True)
class Audited:
    """Study and plan that are audited, as the agent answered."""

    study: Study
    plan: PrivacyPlan

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Audited:
        """Read the agent's answer to ``plan``; raises ConfigurationError for a study without privacy."""
        study, plan = Study.from_contract(told["contract"]), plan_from_dict(told["plan"])
        if not isinstance(plan, PrivacyPlan):
            raise ConfigurationError(f"study {study.study} trains without privacy: it promises no bound to audit")
        return cls(study, plan)


@dataclass(frozen=True)
class Result:
    """Outcome of an audit, and what it says of the whole plan.

    Attributes:
        audited: study and plan.
        outcome: of the canaries.
        bounds: measured beside proven, at the plan's δ and at smaller ones.
        power: what it could have shown at best.
    """

    audited: Audited
    outcome: Outcome
    bounds: tuple[Bounds, ...]
    power: Power

    @property
    def contradiction(self) -> Bounds | None:
        """Bounds with more measured than proven, or None."""
        return contradiction(self.bounds)

    def entry(self, by: str) -> dict[str, Any]:
        """The arguments of the administration's ``audit``."""
        plan = self.audited.plan.to_dict()
        return {"study": self.audited.study.digest, "plan": plan, **asdict(self.outcome), "by": by}

    def to_json(self) -> dict[str, Any]:
        """All figures, for programs."""
        found = self.contradiction
        return {
            "study": self.audited.study.study,
            "digest": self.audited.study.digest,
            **asdict(self.outcome),
            "confidence": CONFIDENCE,
            "bounds": [_plain(b) for b in self.bounds],
            "most_measurable": [_plain(b) for b in self.power.most],
            "could_contradict": self.power.able,
            "best_canaries": self.power.best,
            "contradiction": None if found is None else _plain(found),
        }

    def lines(self) -> list[str]:
        """For people."""
        study, outcome, own = self.audited.study, self.outcome, self.bounds[0]
        said = [
            f"{study.study} version {study.version}, digest {study.digest}",
            f"  proven     training costs at most ε {own.proven:.3f} at δ {own.delta:g}",
            f"  guesses    {outcome.correct} of {outcome.guesses} guesses who of {outcome.canaries} canaries took part "
            f"were right; coins alone would give {outcome.guesses / 2:g}",
            f"  measured   that proves at least ε {own.measured:.3f} at δ {own.delta:g}, with {CONFIDENCE:.0%} "
            f"confidence{self._needed(own, 0.0, 'anything')}",
        ]
        close = nearest(self.bounds)
        if close.delta != own.delta:
            said.append(
                f"             it comes nearest to what is proven at δ {close.delta:g}: at least ε "
                f"{close.measured:.3f}, and at most {close.proven:.3f} is proven there"
                f"{self._needed(close, close.proven, 'more')}"
            )
        said.append("  used       invented patients alone: no patient's data, no budget")
        if self.contradiction is None:
            said.append(
                "  verdict    nothing measured contradicts what was proven; that is a test passed, not a proof"
                if self.power.able
                else "  verdict    none: an audit with so many canaries cannot contradict what was proven (see power)"
            )
        return said

    def _needed(self, bound: Bounds, epsilon: float, what: str) -> str:
        """Number of right guesses that would prove more than ε, in words; empty where that was reached."""
        if bound.measured > epsilon:
            return ""
        least = needed(self.outcome, epsilon, bound.delta)
        if least is None:
            return (
                f"; not even {self.outcome.guesses} right ones would prove {what}: δ leaves room for so many by itself"
            )
        return f"; it would take {least} right ones to prove {what}"

    def alarm(self) -> str:
        """Description of what is wrong; only where there is a contradiction."""
        found = self.contradiction
        assert found is not None  # noqa: S101
        return (
            f"DEFECT: at δ {found.delta:g} an attack proves ε {found.measured:.2f}, more than the {found.proven:.2f} "
            "that the plan allows. Either this is the one audit in twenty that errs, or training here does not "
            "protect patients as promised. Withdraw the approval (consilium-site reject), repeat the audit, report it."
        )


@dataclass(frozen=True)
class Planned:
    """An audit before it runs.

    Attributes:
        audited: study and plan.
        canaries: how many are planted.
        power: what it can show at best.
    """

    audited: Audited
    canaries: int
    power: Power

    @classmethod
    def of(cls, audited: Audited, canaries: int | None) -> Planned:
        """With the number that was asked for, or else the default; raises ConfigurationError for one that cannot be."""
        from consilium_client.training.canaries import CANARIES

        number, plan = CANARIES if canaries is None else canaries, audited.plan
        return cls(audited, number, power(number, [plan.event(plan.rounds)], plan.delta))

    def lines(self) -> list[str]:
        """For people."""
        able, own, best = nearest(self.power.most), self.power.most[0], nearest(self.power.most_of_best)
        said = [
            f"  power      had everything leaked, {self.canaries} canaries would prove ε {able.measured:.2f} at δ "
            f"{able.delta:g}, where at most {able.proven:.2f} is proven"
        ]
        if able.delta != own.delta:
            said.append(
                f"             (at the plan's own δ {own.delta:g}: ε {own.measured:.2f}, beside {own.proven:.2f})"
            )
        if self.power.able:
            said.append(f"             it cannot show a defect that costs less than ε {able.proven:.2f} there")
        else:
            said.append(
                "             it is too weak to contradict what is proven: whatever leaks, this audit cannot fail"
            )
        if self.canaries == self.power.best:
            said.append("             no other number of canaries shows more here")
        elif best.measured > best.proven:
            said.append(
                f"             the sharpest number here is --canaries {self.power.best}: ε {best.measured:.2f} at δ "
                f"{best.delta:g}, beside {best.proven:.2f}"
            )
        if best.measured <= best.proven:
            said.append(
                "             no number of canaries could: the plan allows more than such an audit can ever show"
            )
        return said


def run(
    planned: Planned,
    config: SiteConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Run the whole plan on invented patients, in this process, computed as the site computes its rounds.

    Where and in which pieces is found out anew: the agent's store is the agent's to write.

    Raises:
        ConfigurationError, DataError: as ``training.canaries.audit``.
        MachineError: as ``training.fit.fitting``; no private round runs here either.
    """
    from consilium_client.training.canaries import audit
    from consilium_client.training.fit import fitting

    study, plan = planned.audited.study, planned.audited.plan
    where = fitting(study, plan, config.device, config.gradients)
    outcome = audit(
        study,
        plan,
        where.device,
        canaries=planned.canaries,
        on_progress=on_progress,
        engine=config.gradients,
        rows=where.rows,
    )
    return Result(planned.audited, outcome, compare(outcome, [plan.event(plan.rounds)], plan.delta), planned.power)


def _plain(bounds: Bounds) -> dict[str, float | None]:
    """None stands for infinity, which JSON cannot write."""
    return {name: None if value == float("inf") else value for name, value in asdict(bounds).items()}
