"""Commands of the hospital's IT to the running agent: JSON in, JSON out, over the administration socket."""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from consilium_client.agent import absence
from consilium_client.agent.estimates import Estimate
from consilium_client.agent.study_service import StudyService
from consilium_client.data.report import NothingUsable
from consilium_client.quality import fit
from consilium_client.state.proposals import Proposal
from consilium_shared.canonical import canonical_digest
from consilium_shared.errors import ConfigurationError, ConsiliumError, DataError, PolicyRefusal
from consilium_shared.graphs.graph import Graph
from consilium_shared.graphs.model import GraphModel
from consilium_shared.ledger.entry import Reject
from consilium_shared.ledger.spending import StudySpending
from consilium_shared.privacy.accountant import epsilon
from consilium_shared.privacy.budget import Budget, Quote, affords, alone_of
from consilium_shared.privacy.canaries import Outcome
from consilium_shared.privacy.plan import Plan, PrivacyPlan
from consilium_shared.protocol.version import about
from consilium_shared.secagg.terms import fewest_sites


class Administration:
    """Handler of IT's commands, in the agent."""

    def __init__(self, service: StudyService) -> None:
        self.service = service
        self._started = time.time()
        self._commands: dict[str, Callable[..., Any]] = {
            "status": self.status,
            "studies": self.studies,
            "estimate": self.estimate,
            "approve": self.approve,
            "reject": self.reject,
            "retry": self.retry,
            "budget": self.budget,
            "plan": self.plan,
            "audit": self.audit,
        }

    def handle(self, request: bytes) -> bytes:
        """The answer to one command; a failure is an answer with the reason."""
        try:
            arguments = json.loads(request)
            command = self._commands.get(arguments.pop("command"))
            if command is None or not _takes(command, arguments):
                raise ConfigurationError("the agent is of another version than this program; restart consilium-site up")
            answer: dict[str, Any] = {"value": command(**arguments)}
        except PolicyRefusal as error:
            answer = {"refused": error.reason_code, "error": error.detail}
        except ConsiliumError as error:
            answer = {"error": str(error)}
        return json.dumps(answer).encode()

    def status(self) -> dict[str, Any]:
        """Status of the agent: what it does now."""
        head = self.service.ledger.head
        return {
            "site": self.service.site,
            "federation": self.service.federation,
            "release": about()["consilium"],
            "site_yaml": self.service.site_yaml,
            "activity": self.service.activity.now,
            "up_seconds": round(time.time() - self._started),
            "ledger": {"entries": head.seq, "head": head.sha256},
            "studies": self.studies(),
        }

    def studies(self) -> list[dict[str, Any]]:
        """Proposed studies, each with what was decided on it."""
        return [self._describe(proposal) for proposal in self.service.proposals.all()]

    def _describe(self, proposal: Proposal) -> dict[str, Any]:
        study = proposal.study
        approval = self.service.spending.approval(study.digest)
        with self.service.ledger.exclusive():
            rejected = isinstance(self.service.ledger.books.decisions.get(study.digest), Reject)
        state = self.service.spending.state(study.data.asset)
        own = next((s for s in state.studies if s.study == study.digest), None)
        objections = self.service.approvals.objections(proposal)
        undecided = "refused" if objections else "pending"
        entries = self.service.ledger.entries if approval else ()
        return {
            "study": study.study,
            "version": study.version,
            "digest": study.digest,
            "state": "approved" if approval else "rejected" if rejected else undecided,
            "by": approval.by if approval else None,
            "out": absence.out(entries, study.digest),
            "quiet_days": self.service.config.policy.quiet_days,
            "quiet_since": absence.quiet_since(entries, study.digest, datetime.now(UTC)),
            "refused": [{"rule": each.detail, "remedy": each.remedy} for each in objections],
            "task": study.task,
            "asset": study.data.asset,
            "sites": {site: public.fingerprint for site, public in proposal.identities.items()},
            "rounds": study.training.rounds,
            "rounds_charged": len(own.rounds) if own else 0,
            "epsilon": study.privacy.epsilon,
            "epsilon_spent": _finite(self.service.spending.study_epsilon(study.digest)) if approval else 0.0,
        }

    def estimate(self, study: str) -> dict[str, Any]:
        """Estimate of a study: training data, cost, and the whole contract with its defaults written out.

        Of a study that the policy forbids, no cost.
        """
        proposal = self.service.proposals.find(study)
        # The contract with what absent keys mean.
        found = {**self._describe(proposal), "contract": proposal.study.model_dump(mode="json")}
        found["least_sites"] = fewest_sites(proposal.study, proposal.identities)
        if isinstance(proposal.study.model, GraphModel):
            found["graph"] = _graph(proposal.study.model.graph)
        if found["refused"]:
            return found
        try:
            estimate = self._estimate(self.service.estimates.of(proposal.study))
        except NothingUsable as error:
            told = (f"{each.where}: {each.what}" for each in fit.of_report(proposal.study, error.report))
            raise DataError("; ".join([str(error), *told])) from None  # for the screen that asked: nothing logs it
        return {**found, **estimate, "fit": [asdict(each) for each in self.service.data.findings(proposal.study)]}

    def _estimate(self, estimate: Estimate) -> dict[str, Any]:
        plan = estimate.plan
        return {
            "patients": estimate.patients,
            "patients_held_back": estimate.held_back,
            "evaluation_counts": self.service.config.policy.allow_evaluation_counts,
            "evaluated_rounds": list(estimate.evaluated_rounds),
            "plan": plan.to_dict(),
            "cost": _finite(plan.cost()) if isinstance(plan, PrivacyPlan) else None,
            **(
                {"cost_alone": _finite(plan.cost_alone()), "asset_alone": _finite(estimate.alone or 0.0)}
                if isinstance(plan, PrivacyPlan) and plan.shared
                else {}
            ),
            "arithmetic": str(estimate.quote),
            "affordable": estimate.quote.fits,
            "budget": _in_numbers(estimate.quote),
        }

    def approve(self, study: str, by: str, plan: dict[str, Any]) -> dict[str, Any]:
        """Approve a study with the plan that was shown; the ledger's entry names ``by``."""
        proposal = self.service.proposals.find(study)
        estimate = self.service.approvals.approve(proposal, by, plan)
        return {**self._describe(proposal), **self._estimate(estimate)}

    def reject(self, study: str, by: str, reason: str) -> dict[str, Any]:
        """Reject a study, or withdraw its approval."""
        proposal = self.service.proposals.find(study)
        self.service.reject(proposal, by, reason)
        return self._describe(proposal)

    def retry(self, study: str) -> dict[str, Any]:
        """Take this machine for one that has not been tried with a study: its pace, and what ended the agent."""
        proposal = self.service.proposals.find(study)
        self.service.paces.forget(proposal.study.digest)
        ended = self.service.machine.forget(proposal.study.digest)
        return {**self._describe(proposal), "ended": ended}

    def plan(self, study: str) -> dict[str, Any]:
        """A study's contract, and the plan that runs here: the approved one, else the one that would be approved."""
        proposal = self.service.proposals.find(study)
        return {
            "study": proposal.study.study,
            "version": proposal.study.version,
            "digest": proposal.study.digest,
            "contract": proposal.study.contract,
            "plan": self._plan(proposal).to_dict(),
        }

    def _plan(self, proposal: Proposal) -> Plan:
        approval = self.service.spending.approval(proposal.study.digest)
        return approval.plan if approval else self.service.estimates.of(proposal.study).plan

    def audit(
        self, study: str, plan: dict[str, Any], canaries: int, guesses: int, correct: int, by: str
    ) -> dict[str, Any]:
        """Enter the outcome of a canary audit of exactly the plan that runs here; returns the entry's number."""
        proposal = self.service.proposals.find(study)
        if plan != self._plan(proposal).to_dict():
            raise ConfigurationError(f"study {proposal.study.study} has another plan now than was audited; audit again")
        entry = self.service.ledger.append(
            "audit",
            {
                "study": proposal.study.digest,
                "name": proposal.study.study,
                **asdict(Outcome(canaries, guesses, correct)),
                "plan": canonical_digest(plan),
                "by": by,
            },
        )
        return {"entry": entry.seq}

    def budget(self) -> list[dict[str, Any]]:
        """Budget of each asset: what was spent, what is reserved for approved studies, and what is left for others."""
        return [
            self._of_asset(asset, each.budget) for asset, each in sorted(self.service.config.policy.budgets.items())
        ]

    def _of_asset(self, asset: str, budget: Budget) -> dict[str, Any]:
        with self.service.ledger.exclusive():
            state, held = self.service.spending.state(asset), self.service.spending.reserved(asset)
        spent = {study.study: study for study in state.studies}
        reserved = {each.study: each for each in held}
        names = {each.study: each.name for each in state.studies} | {each.study: each.name for each in held}
        studies = []
        for digest, name in names.items():
            ran = spent.get(digest, StudySpending(digest, name, (), (), 0))
            promised = reserved[digest].events if digest in reserved else ()
            studies.append(
                {
                    "study": name,
                    "digest": digest,
                    "rounds": len(ran.rounds),
                    "unsettled": ran.unsettled,
                    "epsilon": _finite(epsilon(ran.events, budget.delta)),
                    "reserved": _finite(affords(budget, ran.events, (), promised).reserved),
                }
            )
        reserved_too = [event for each in held for event in each.events]
        whole = affords(budget, state.events, (), reserved_too)
        alone = alone_of([*state.events, *reserved_too], budget.delta)
        shared = {} if alone is None else {"alone": _finite(alone)}
        return {"asset": asset, **_in_numbers(whole), "epsilon": _finite(budget.epsilon), "studies": studies, **shared}


def _graph(graph: Graph) -> dict[str, Any]:
    """Graph as it is shown: its layers one by one, its weights, and the memory of a step."""
    from dpsgd.isolation import ROWS  # torch comes with it, and an agent has none until a study needs it

    return {
        "layers": [list(row) for row in graph.described()],
        "parameters": graph.parameters,
        "record_numbers": graph.numbers,
        "step_bytes": graph.step_bytes(ROWS),
        "rows": ROWS,
    }


def _in_numbers(quote: Quote) -> dict[str, float | None]:
    """Arithmetic of a budget as numbers; ``str(quote)`` says the same in words."""
    return {
        "limit": _finite(quote.limit),
        "delta": quote.delta,
        "spent": _finite(quote.spent),
        "reserved": _finite(quote.reserved),
        "added": _finite(quote.added),
        "total": _finite(quote.total),
        "left": _finite(quote.left),
    }


def _takes(command: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    try:
        inspect.signature(command).bind(**arguments)
    except TypeError:
        return False
    return True


def _finite(value: float) -> float | None:
    """Value rounded to six decimals; None for infinity, which JSON cannot write."""
    return None if math.isinf(value) else round(value, 6)
