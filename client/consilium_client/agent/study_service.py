"""Study service of the agent: opens the ledger and the stores, and puts the parts together that work on them.

The coordinator's requests (``requests.py``) and IT's commands (``administration.py``) share it.
"""

from __future__ import annotations

import logging

from consilium_client.agent.activity import Activity
from consilium_client.agent.approvals import Approvals
from consilium_client.agent.charges import Charges
from consilium_client.agent.estimates import Estimates
from consilium_client.agent.leftovers import Leftovers
from consilium_client.agent.machine import Machine
from consilium_client.agent.spending import Spending
from consilium_client.agent.study_data import StudyData
from consilium_client.prepared.key import StoreKey
from consilium_client.prepared.store import PreparedStore
from consilium_client.site import Home
from consilium_client.site_config import SiteConfig
from consilium_client.state.clipping_norms import ClippingNorms
from consilium_client.state.draw_seeds import DrawSeeds
from consilium_client.state.ledger_file import LedgerFile
from consilium_client.state.paces import Paces
from consilium_client.state.patient_count import PatientCounts
from consilium_client.state.proposals import Proposal, Proposals
from consilium_client.state.responses import Responses
from consilium_client.state.results import Results
from consilium_client.state.sum_store import SumStore
from consilium_shared.canonical import digest
from consilium_shared.identity import Identity, PublicIdentity

log = logging.getLogger("consilium.agent")


class StudyService:
    """The agent's parts. Opening it takes the ledger's lock and enters budgets that the ledger does not have yet.

    Attributes:
        data: what a study uses of the site's assets.
        estimates: plan and cost of a study.
        approvals: what was decided, and what may be.
        charges: of rounds, with the seeds of their draws.
        activity: what the agent does now.
        site_yaml: digest of the site.yaml that was read.
    """

    def __init__(self, home: Home) -> None:
        """Raises ConfigurationError, LedgerError or IntegrityError when the site's files do not allow a start."""
        self.home = home
        self.config: SiteConfig = home.config()
        self.site_yaml = digest(home.config_file.read_bytes())
        invitation = home.invitation()
        self.site = invitation.site
        self.federation = invitation.federation
        self.coordinator = PublicIdentity.from_hex(invitation.coordinator)
        self.identity: Identity = home.identity()
        self.ledger = LedgerFile(home.ledger, self.site, self.identity)
        if self.ledger.recovered is not None:
            log.warning("the ledger's last line was torn by a crash; recovered, entry %d", self.ledger.recovered.seq)
        self.responses = Responses(home.store / "answers")
        self.results = Results(home.store / "results")
        self.sums = SumStore(home.store / "sums")
        self.draw_seeds = DrawSeeds(home.store / "attempts")
        self.draw_seeds.end_kept(self.results, self.ledger)
        self.clipping_norms = ClippingNorms(home.store / "clipping-norms")
        self.proposals = Proposals(home.store / "studies", home.store / "refused")
        self.machine = Machine(home.store / "machine")
        self.paces = Paces(home.store / "pace")
        stores = self.sums, self.results, self.responses, self.draw_seeds, self.clipping_norms, self.paces
        self.leftovers = Leftovers(self.ledger, *stores)
        self.leftovers.end_quiet(self.config.policy.quiet_days)
        self.leftovers.forget_rejected()
        self.activity = Activity()
        self.spending = Spending(self.ledger)
        self.prepared = PreparedStore(home.prepared, StoreKey.at(home.store_key), self.config.processes)
        self.prepared.keep_only(self.config.assets)
        self.data = StudyData(self.config, home.root, self.activity, self.prepared)
        self.patient_counts = PatientCounts(home.store / "cohorts")
        self.estimates = Estimates(self.config, self.data, self.patient_counts, self.spending)
        self.approvals = Approvals(self.config, self.proposals, self.data, self.estimates, self.spending)
        self.charges = Charges(self.spending, self.draw_seeds)
        self._enter_policy()

    def _enter_policy(self) -> None:
        """Enter in the ledger what of the policy it does not have yet, and what a crash left open."""
        policy = self.config.policy
        for asset, entry in policy.budgets.items():
            self.spending.open_asset(asset, entry.budget, policy.digest, entry.reason)
        self.spending.note_policy(policy.digest)
        self.spending.charge_counts()

    def reject(self, proposal: Proposal, by: str, reason: str) -> None:
        """Say no to a study, or withdraw an approval; what it has left here is deleted. Raises as ``Approvals``."""
        self.approvals.reject(proposal, by, reason)
        self.leftovers.forget_rejected()

    def close(self) -> None:
        """Free the ledger."""
        self.machine.trials.stopped()
        self.ledger.close()
