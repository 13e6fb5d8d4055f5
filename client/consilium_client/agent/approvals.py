"""Approvals of studies: which may be decided on, what was decided, and what the coordinator reads of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from consilium_client.agent.absence import check_not_rejected
from consilium_client.agent.accounts import Approval
from consilium_client.agent.estimates import Estimate, Estimates
from consilium_client.agent.spending import Spending
from consilium_client.agent.study_data import StudyData
from consilium_client.policy import check_decider, objections
from consilium_client.site_config import SiteConfig
from consilium_client.state.proposals import Proposal, Proposals
from consilium_shared import limits
from consilium_shared.errors import ConfigurationError, PolicyRefusal
from consilium_shared.study import Study


class Approvals:
    """Approval status and decisions, from the proposals that came and the ledger."""

    def __init__(
        self, config: SiteConfig, proposals: Proposals, data: StudyData, estimates: Estimates, spending: Spending
    ) -> None:
        self.config = config
        self._proposals, self._data, self._estimates, self._spending = proposals, data, estimates, spending

    def check_new(self, proposal: Proposal) -> bool:
        """Check a proposal that is about to be kept; False where it is kept already.

        Raises:
            PeerError: the same study came before with another roster.
            PolicyRefusal: too many that nobody has decided on are kept, or a site has another key than in a study that
                was approved here.
        """
        if self._proposals.has(proposal):
            return False
        self._check_keys(proposal)
        decided = self._spending.decided()
        undecided = [kept for kept in self._proposals.digests() if kept not in decided]
        if len(undecided) >= limits.UNDECIDED_PROPOSALS and proposal.study.digest not in decided:
            raise PolicyRefusal("policy", "this site has too many undecided proposals; ask it to decide on some first")
        return True

    def status(self, proposal: Proposal) -> Literal["pending", "approved"]:
        """Approval status of a proposal. What the policy forbids is refused before anybody is asked.

        The answer depends on the contract, the policy and what was decided on this very study: on no patient's record,
        and on no budget. That there are too few patients, that the data cannot be used, that other studies have left
        too little, is for the site's people to see and to tell: they find it at the approval.

        Raises:
            PolicyRefusal: the hospital said no, its policy does, or it has no such asset.
        """
        study = proposal.study
        if self._spending.approval(study.digest) is not None:
            return "approved"
        self._check_not_rejected(study)
        for objection in self.objections(proposal):
            raise objection
        return "pending"

    def objections(self, proposal: Proposal) -> list[PolicyRefusal]:
        """Reasons why nobody here may approve the study: every rule that forbids it, with what would permit it."""
        approved = self._spending.approval(proposal.study.digest) is not None
        found = objections(self.config.policy, proposal.study, len(proposal.identities), approved=approved)
        try:
            self._data.asset(proposal.study)
        except PolicyRefusal as refusal:
            found.append(refusal)
        return found

    def in_force(self, proposal: Proposal) -> Approval:
        """The approval in force; raises PolicyRefusal where nobody approved the study, or somebody withdrew that."""
        found = self._spending.approval(proposal.study.digest)
        if found is None:
            self._check_not_rejected(proposal.study)
            raise PolicyRefusal("pending", "nobody at the hospital has approved this study")
        if found.roster != proposal.roster:
            raise PolicyRefusal("wrong-roster", "the study was approved with another roster")
        return found

    def approve(self, proposal: Proposal, by: str, shown: Mapping[str, Any] | None = None) -> Estimate:
        """Approve a study with the plan that it has today.

        Args:
            proposal: the study.
            by: who decides.
            shown: the plan that this person saw, as ``Plan.to_dict`` writes it; None where nobody was shown one.

        Raises:
            PolicyRefusal: as ``Estimates.of``, or this person may not decide here.
            BudgetRefused, DataError: as ``Estimates.of``.
            ConfigurationError: it is approved already, or its plan is not the one that was shown.
        """
        study = proposal.study
        check_decider(self.config.policy, by)
        if self._spending.approval(study.digest) is not None:
            raise ConfigurationError(f"study {study.study} is approved already")
        self._check_keys(proposal)
        for objection in self.objections(proposal):
            raise objection
        estimate = self._estimates.of(study)
        if shown is not None and dict(shown) != estimate.plan.to_dict():
            raise ConfigurationError(
                f"study {study.study} has another plan now than was shown; nothing was approved. Look at it again"
            )
        self._proposals.put(proposal)  # it may have been refused when it came
        limit = study.privacy.epsilon if study.privacy.epsilon is not None else math.inf
        account = self._estimates.account(study, estimate.plan)
        self._spending.approve(account, epsilon=limit, by=by, roster=proposal.roster)
        return estimate

    def reject(self, proposal: Proposal, by: str, reason: str) -> None:
        """Reject a study, or withdraw its approval.

        Raises:
            PolicyRefusal: this person may not decide here.
        """
        check_decider(self.config.policy, by)
        self._spending.reject(study=proposal.study.digest, name=proposal.study.study, by=by, reason=reason)

    def _check_keys(self, proposal: Proposal) -> None:
        for kept in self._proposals.all():
            changed = [s for s, key in kept.identities.items() if proposal.identities.get(s, key) != key]
            if changed and self._spending.approval(kept.study.digest) is not None:
                names = ", ".join(changed)
                raise PolicyRefusal("wrong-roster", f"{names}: another key than in study {kept.study.study}")

    def _check_not_rejected(self, study: Study) -> None:
        check_not_rejected(self._spending.decision(study.digest))
