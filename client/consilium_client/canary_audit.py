"""``consilium-site audit-canaries``: runs the audit of one study's plan, and says what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from consilium_client.site import SiteConfig
from consilium_shared.errors import ConfigurationError
from consilium_shared.privacy.canaries import CONFIDENCE, Bounds, Outcome, compare, contradiction, most
from consilium_shared.privacy.plan import PrivacyPlan, plan_from_dict
from consilium_shared.study import Study


@dataclass(frozen=True)
class Audited:
    """The study and the plan that runs here, as the agent told them."""

    study: Study
    plan: PrivacyPlan

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Audited:
        """From the answer to the administration's ``plan``; raises ConfigurationError for a study without privacy."""
        study, plan = Study.from_contract(told["contract"]), plan_from_dict(told["plan"])
        if not isinstance(plan, PrivacyPlan):
            raise ConfigurationError(f"study {study.study} trains without privacy: it promises no bound to audit")
        return cls(study, plan)


@dataclass(frozen=True)
class Result:
    """An outcome, and what it says of the training of the whole plan.

    Attributes:
        audited: study and plan.
        outcome: of the canaries.
        bounds: measured beside proven, at the plan's δ and at smaller ones.
        most: the same, had the run given everything away.
    """

    audited: Audited
    outcome: Outcome
    bounds: tuple[Bounds, ...]
    most: tuple[Bounds, ...]

    @property
    def contradiction(self) -> Bounds | None:
        """Where more was measured than was proven, or None."""
        return contradiction(self.bounds)

    def entry(self, by: str) -> dict[str, Any]:
        """The arguments of the administration's ``audit``."""
        plan = self.audited.plan.to_dict()
        return {"study": self.audited.study.digest, "plan": plan, **asdict(self.outcome), "by": by}

    def to_json(self) -> dict[str, Any]:
        """Everything, for programs."""
        found = self.contradiction
        return {
            "study": self.audited.study.study,
            "digest": self.audited.study.digest,
            **asdict(self.outcome),
            "confidence": CONFIDENCE,
            "bounds": [_plain(b) for b in self.bounds],
            "most_measurable": [_plain(b) for b in self.most],
            "contradiction": None if found is None else _plain(found),
        }

    def lines(self) -> list[str]:
        """For people."""
        study, outcome, own, able = self.audited.study, self.outcome, self.bounds[0], self.most[0]
        power = f"had everything leaked, {outcome.canaries} canaries would have shown ε {able.measured:.2f} at that δ"
        if contradiction(self.most) is None:
            power += f"; that is too few to contradict ε {own.proven:.2f}: give --canaries a larger number"
        said = [
            f"{study.study} version {study.version}, digest {study.digest}",
            f"  proven     training costs at most ε {own.proven:.3f} at δ {own.delta:g}",
            f"  measured   an attack proves at least ε {own.measured:.3f} at that δ ({CONFIDENCE:.0%} confidence): "
            f"{outcome.correct} of {outcome.guesses} guesses who of {outcome.canaries} canaries took part were right",
            f"  power      {power}",
            "  used       invented patients alone: no patient's data, no budget",
        ]
        if self.contradiction is None:
            said.append("  verdict    nothing measured contradicts what was proven; that is a test passed, not a proof")
        return said

    def alarm(self) -> str:
        """What is wrong; only where there is a contradiction."""
        found = self.contradiction
        assert found is not None  # noqa: S101
        return (
            f"DEFECT: at δ {found.delta:g} an attack proves ε {found.measured:.2f}, more than the {found.proven:.2f} "
            "that the plan allows. Either this is the one audit in twenty that errs, or training here does not "
            "protect patients as promised. Withdraw the approval (consilium-site reject), repeat the audit, report it."
        )


def run(
    audited: Audited,
    canaries: int | None,
    config: SiteConfig,
    on_progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Run the whole plan on invented patients, in this process, computed as the site computes its rounds.

    Raises:
        ConfigurationError, DataError: as ``training.canaries.audit``.
    """
    from consilium_client.training import device
    from consilium_client.training.canaries import CANARIES, audit

    plan, number = audited.plan, CANARIES if canaries is None else canaries
    outcome = audit(
        audited.study,
        plan,
        device.choose(config.device),
        canaries=number,
        on_progress=on_progress,
        way=config.gradients,
    )
    events = [plan.event(plan.rounds)]
    return Result(audited, outcome, compare(outcome, events, plan.delta), most(number, events, plan.delta))


def _plain(bounds: Bounds) -> dict[str, float | None]:
    """None stands for infinity, which JSON cannot write."""
    return {name: None if value == float("inf") else value for name, value in asdict(bounds).items()}
