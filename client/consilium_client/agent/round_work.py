"""Work of one round at the site: charge, train, evaluate, keep the result, settle the charge. Sends nothing.

A result depends on the study, the round and the model alone. Masks and attempts are the business of ``secure_sums.py``
and cost nothing more.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from consilium_client.agent.accounts import ChargedUse, reported
from consilium_client.agent.study_service import StudyService
from consilium_client.data.dataset import Dataset
from consilium_client.policy import check_contract, check_patients
from consilium_client.state.draw_seeds import Use
from consilium_client.state.proposals import Proposal
from consilium_client.state.results import About, Result
from consilium_shared import split
from consilium_shared.errors import PeerError, PolicyRefusal
from consilium_shared.metrics import Counts, Layout
from consilium_shared.privacy.event import GaussianEvent
from consilium_shared.privacy.plan import NonPrivatePlan, Plan, PrivacyPlan
from consilium_shared.protocol.messages import Evaluate, Train
from consilium_shared.protocol.summand import bound, counts_with, largest_weight
from consilium_shared.study import Study

if TYPE_CHECKING:
    from consilium_client.training.fit import Fit


def ready(service: StudyService, study: Study, plan: Plan) -> None:
    """Check that this site's data, today's policy and this machine allow a round, as far as known without the model.

    Asked before a key for a sum is given, so that a site that cannot take part costs the others nothing. The data is
    read where it was not, or could not be; a machine that failed before is tried again.

    Raises:
        PolicyRefusal: the policy of today, which may be stricter than at the approval.
        DataError: the data cannot be used.
        MachineError: this machine could not compute the study with privacy before, and cannot now.
    """
    _allowed(service, study)
    if isinstance(plan, PrivacyPlan):
        service.machine.check_again(study, plan, service.config.device, service.config.gradients)


def _allowed(service: StudyService, study: Study) -> None:
    patients = service.data.patients(study)
    check_contract(service.config.policy, study)
    check_patients(service.config.policy, study, patients.train, patients.counted(study))


def check(service: StudyService, study: Study, plan: Plan, request: Train | Evaluate, model: bytes) -> str:
    """Check everything that may be refused, before anything is charged.

    Returns:
        The digest of what the study does not train of the model (``models.vector.check``).

    Raises:
        PolicyRefusal: the policy of today, which may be stricter than at the approval; or bytes that are no model, or
            not what the contract has the study start from.
        DataError: the data cannot be used.
        ConfigurationError: the study cannot be trained with privacy, or not as this site is set up, or not on this
            machine (MachineError).
    """
    from consilium_client.training.trainer import check_independence, check_mechanism
    from consilium_shared.models.vector import check

    service.data.records(study)
    _allowed(service, study)
    try:
        frozen = check(model, study, first=isinstance(request, Train) and request.round == 1)
    except PeerError as error:
        raise PolicyRefusal("model", str(error)) from error
    if isinstance(plan, PrivacyPlan):
        check_independence(study)
        check_mechanism(study, plan, service.config.gradients)
        _weight(study, plan, 1)
    _where(service, study, plan)
    return frozen


def train(
    service: StudyService, proposal: Proposal, plan: Plan, request: Train, model: bytes, *, counts: bool
) -> Result:
    """Train round ``request.round``, and count on the model that it begins with where that is due.

    Args:
        counts: whether this site's counts may leave with the update.
    """
    from consilium_client.training import trainer

    study, number, basis = proposal.study, request.round, request.payload.sha256
    account = service.estimates.account(study, plan)
    norm = service.clipping_norms.before(study.digest, number)
    counted = counts and counts_with(study, number)
    records, where = service.data.records(study), _where(service, study, plan)
    uses = [Use("training", number, basis)]
    if counted:
        uses.append(Use("evaluation", number - 1, basis))
    service.charges.check(account, uses)
    with ExitStack() as running:
        training, *others = [running.enter_context(service.charges.begin(account, use)) for use in uses]
        counting = others[0] if others else None

        def watch(done: int, steps: int) -> None:
            service.activity.begin("training", study=study.study, round=number, step=done, steps=steps)

        watch(0, plan.steps_per_round)
        found = trainer.train(
            model,
            study,
            records,
            plan,
            round=number,
            site=service.site,
            device=where.device,
            seed=training.seed,
            attempt=training.number,
            clipping_norm=norm,
            on_progress=watch,
            engine=service.config.gradients,
            rows=where.rows,
            workers=where.workers,
        )
        numbers = None
        if counting is not None:
            numbers = _count(service, study, model, counting, records, where, last=False)
        elif counts_with(study, number):
            numbers = np.zeros(Layout.of(study).width, dtype=np.int64)
        last = training if counting is None else counting
        leaves: npt.NDArray[np.float32] | npt.NDArray[np.uint32] = found.update
        if found.integers is None:
            bound(found.update, study)
        else:
            leaves = found.integers  # nothing comes after the noise
        about = About(
            purpose="training",
            round=number,
            attempt=request.attempt,
            model=basis,
            weight=_weight(study, plan, found.patients),
            counted=counted,
            epsilon=reported(last.study_epsilon),
            parameters=leaves.size,
            counts=0 if numbers is None else numbers.size,
            integers=found.integers is not None,
        )
        if found.clipping_norm is not None and study.training.adaptive_clipping is not None:
            service.clipping_norms.put(study.digest, number, found.clipping_norm)
        result = service.results.put(study.digest, about, leaves, numbers)
        service.charges.settle(training, found.steps)
        if counting is not None:
            service.charges.settle(counting, 1)
    return result


def evaluate(service: StudyService, proposal: Proposal, plan: Plan, request: Evaluate, model: bytes) -> Result:
    """Evaluate the model that is to be published, after the last round; returns the kept counts."""
    study = proposal.study
    records, where = service.data.records(study), _where(service, study, plan)
    account, use = service.estimates.account(study, plan), Use("evaluation", request.round, request.payload.sha256)
    with service.charges.begin(account, use) as counting:
        counts = _count(service, study, model, counting, records, where, last=True)
        about = About(
            purpose="evaluation",
            round=request.round,
            attempt=request.attempt,
            model=request.payload.sha256,
            weight=0,
            counted=True,
            epsilon=reported(counting.study_epsilon),
            parameters=0,
            counts=counts.size,
        )
        result = service.results.put(study.digest, about, np.zeros(0, dtype=np.float32), counts)
        service.charges.settle(counting, 1)
    return result


def _where(service: StudyService, study: Study, plan: Plan) -> Fit:
    """Device on which this site computes, and with privacy the number of rows of its pieces."""
    from consilium_client.training.fit import Fit
    from dpsgd import device

    if not isinstance(plan, PrivacyPlan):
        return Fit(device.choose(service.config.device), None)
    return service.machine.fit(study, plan, service.config.device, service.config.gradients)


def _count(
    service: StudyService,
    study: Study,
    model: bytes,
    counting: ChargedUse,
    records: Dataset,
    where: Fit,
    *,
    last: bool,
) -> npt.NDArray[np.int64]:
    from consilium_client.training import evaluation

    of = split.counted_part(study, last=last)
    service.activity.begin("evaluating", study=study.study)
    counts: Counts
    if isinstance(counting.event, GaussianEvent):
        sigma, seed = counting.event.noise_multiplier, counting.seed
        counts = evaluation.noised_counts(
            model, study, records, where.device, noise_multiplier=sigma, seed=seed, rows=where.rows, of=of
        )
    else:
        least = service.config.policy.minimum_group
        counts = evaluation.evaluate(model, study, records, where.device, Layout.of(study), least=least, of=of)
    return counts


def _weight(study: Study, plan: Plan, patients: int) -> int:
    """Weight of the update. With privacy the true number of patients stays here."""
    if study.aggregation.weighting == "equal" or study.privacy.sums is not None:
        return 1
    if isinstance(plan, NonPrivatePlan):
        return min(patients, largest_weight(study))
    if plan.patients is None:
        raise PolicyRefusal("policy", "the approved plan has no number of patients that may leave; approve it again")
    return min(plan.patients, largest_weight(study))
