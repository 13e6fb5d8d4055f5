"""Replay guard: may a kept result leave, or leave again? May a round be worked on, or worked on anew?

One result is never in two sums that are both opened: their difference would show what another site added.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from consilium_client.agent.study_service import StudyService
from consilium_client.state.draw_seeds import Use
from consilium_client.state.results import About, Result
from consilium_client.state.sum_store import Session
from consilium_shared import limits
from consilium_shared.canonical import canonical_digest
from consilium_shared.errors import IntegrityError, PolicyRefusal
from consilium_shared.ledger.entry import Charge, Release
from consilium_shared.privacy.plan import NonPrivatePlan, Plan
from consilium_shared.protocol.messages import Evaluate, Survivors, Train
from consilium_shared.protocol.summand import counts_with
from consilium_shared.secagg.site import SiteState
from consilium_shared.secagg.terms import Slot, Terms
from consilium_shared.study import Study

log = logging.getLogger("consilium.agent")


def sequence(number: int, attempt: int) -> int:
    """Number of an answer in a study's sequence: rises from attempt to attempt, and from round to round.

    >>> sequence(1, 2) < sequence(1, 3) < sequence(2, 1)
    True
    """
    return number * (limits.ATTEMPTS + 1) + attempt


def round_of(where: int) -> int:
    """The round of a number of the ``sequence``.

    >>> round_of(sequence(7, 3))
    7
    """
    return where // (limits.ATTEMPTS + 1)


class ReplayGuard:
    """Rules against releasing one result in two opened sums, from the site's stores and its ledger."""

    def __init__(self, service: StudyService) -> None:
        self.service = service

    def kept(self, study: Study, request: Train | Evaluate, terms: Terms) -> Result | None:
        """The result that is kept for this round, if it may leave under these terms; None where it is to be made.

        It may have left before, in an attempt that was given up. It leaves again only when it is certain that nobody
        ever opens that one (``Terms.dead``).

        Raises:
            PolicyRefusal: this round was worked on from another model.
            IntegrityError: the ledger has no charge for it.
        """
        kept = self.service.results.get(study.digest, request.purpose, request.round)
        if kept is None:
            return None
        if kept.about.model != request.payload.sha256:
            raise PolicyRefusal("stale-round", f"round {request.round} was worked on from another model")
        states = {each.slot.attempt: each for each in self.service.sums.attempts(request.slot)}
        first = kept.about.attempt
        if first != request.attempt and first not in states:
            return None  # its state is lost, and with it the proof
        for number, state in states.items():
            if first <= number < request.attempt and state.terms is not None and not state.terms.dead(terms.adverts):
                return None
        self.check_charged(study.digest, _paid_for(kept.about))
        return kept

    def counts_given(self, study: Study, slot: Slot) -> bool:
        """True where this site may offer counts for a slot; not where a kept result of its round goes without them."""
        about = self.service.results.about(study.digest, slot.purpose)
        without = about is not None and about.round == slot.round and about.counts > 0 and not about.counted
        return self.service.config.policy.allow_evaluation_counts and not without

    def check_counts(self, request: Train | Evaluate, kept: Result | None, *, offered: bool) -> None:
        """Check that this site still adds the counts that it offered with its key, since the others rely on them.

        Zeros in place of counts that the others reckon with could leave one other site's counts alone in the sum.

        Args:
            kept: what would be masked, where it was made before.
            offered: whether these terms have counts of this site.

        Raises:
            PolicyRefusal: its policy has changed since, or its result goes without counts; the next attempt's key
                says so.
        """
        if not offered:
            if request.purpose == "evaluation":
                raise PolicyRefusal("sum", "too few sites of the cohort offer counts, and there is nothing else to add")
            return
        if not self.service.config.policy.allow_evaluation_counts:
            raise PolicyRefusal("sum", "this site offered counts with these keys, and lets none leave any more")
        if request.purpose == "training" and kept is not None and not kept.about.counted:
            raise PolicyRefusal("sum", "this site offered counts with these keys, and its result goes without any")

    def check_work(self, study: Study, plan: Plan, request: Train | Evaluate, state: SiteState) -> None:
        """Check that a round may be worked on, or be worked on anew.

        Without privacy each round is worked on once, each model once, and its counts are taken once: two sums of the
        same numbers, over other sites, would show whose are whose. With privacy each time has noise and a charge of
        its own.

        Raises:
            PolicyRefusal: not under these keys, or not a second time.
        """
        if state.result is not None:
            raise PolicyRefusal("sum", "what these keys mask is gone")
        seen, here = self.service.sums.session(study.digest).seen, _where(request)
        if isinstance(plan, NonPrivatePlan) and not seen and self._left_before(study, "update", "counts"):
            raise PolicyRefusal("sum", _LOST.format("models were worked on"))
        known = all(seen.get(what) in (None, here) for what in _what(study, request))
        if known and not (isinstance(plan, NonPrivatePlan) and self.left(request)):
            return
        if isinstance(plan, NonPrivatePlan):
            raise PolicyRefusal(
                "sum", "this round or this model was worked on without privacy, and that sum may be opened yet, or was"
            )
        log.warning("round %d is worked on anew: an earlier attempt may still be opened, or was", request.round)

    def check_frozen(self, study: Study, frozen: str) -> None:
        """Raises PolicyRefusal where what the study does not train is not what it was, by digest, in the first model
        that was worked on here."""
        known = self.service.sums.session(study.digest).frozen
        if known not in (None, frozen):
            raise PolicyRefusal("model", "what the study does not train is another than in the rounds before")

    def check_cohort(self, study: Study, terms: Terms, *, counted: bool) -> None:
        """Check that a sum of this cohort can be of the same sites as those before it, if the contract asks for that.

        Args:
            counted: whether those of the cohort that offer counts add them.

        Raises:
            PolicyRefusal: it could not, or what was signed before is lost.
        """
        if not study.aggregation.same_sites:
            return
        together, updates = self.service.sums.session(study.digest).together, terms.slot.purpose == "training"
        if not together and self._left_before(study, "signed"):
            raise PolicyRefusal("sum", _LOST.format("sites were added up"))
        known = together.get("updates" if updates else "counts", ())
        missing = [site for site in known if site not in terms.cohort]
        if missing:
            raise _other_sites(f"{', '.join(missing)} would be missing")
        if updates and known and counted:
            _same_counts(together, terms, known)

    def check_together(self, study: Study, terms: Terms, survivors: tuple[str, ...], *, counted: bool) -> Session:
        """Session with these survivors entered as the sites of every sum, as it is once they have been signed.

        Args:
            counted: whether those of them that offer counts have added some.

        Raises:
            PolicyRefusal: every sum of the study is to be of the same sites, and one was signed that was of others.
        """
        session, parts = self.service.sums.session(study.digest), {}
        if not study.aggregation.same_sites:
            return session
        if terms.slot.purpose == "training":
            parts["updates"] = survivors
            before = session.together.get("updates", survivors)
            if before != survivors:
                raise _other_sites(f"the updates of an earlier sum were of {', '.join(before)}")
        if counted and (counting := _same_counts(session.together, terms, survivors)):
            parts["counts"] = counting
        return session.model_copy(update={"together": {**session.together, **parts}})

    def note(self, study: Study, request: Train | Evaluate, frozen: str) -> None:
        """Record what was worked on and in which sum it is masked, before the first masked byte leaves."""
        session = self.service.sums.session(study.digest)
        seen = {**session.seen, **dict.fromkeys(_what(study, request), _where(request))}
        self.service.sums.put_session(study.digest, session.model_copy(update={"seen": seen, "frozen": frozen}))

    def left(self, request: Train | Evaluate | Survivors) -> bool:
        """True where anything left on the last charge for this round; after a crash between the two, nothing did."""
        about, kind = (request.study, request.round), "update" if request.purpose == "training" else "counts"
        for entry in reversed(self.service.ledger.entries):
            body = entry.body
            if isinstance(body, Release) and (body.study, body.round, body.message) == (*about, kind):
                return True
            if isinstance(body, Charge) and (body.study, body.round, body.purpose) == (*about, request.purpose):
                return False
        return False

    def _left_before(self, study: Study, *kinds: str) -> bool:
        """True where an answer of these kinds left for the study, in any round."""
        bodies = [entry.body for entry in self.service.ledger.entries if isinstance(entry.body, Release)]
        return any(body.study == study.digest and body.message in kinds for body in bodies)

    def signed_attempts(self, slot: Slot) -> set[int]:
        """Attempts at a round in which this site's signature over survivors has left, by the ledger."""
        return {
            entry.body.attempt
            for entry in self.service.ledger.entries
            if isinstance(entry.body, Release)
            and (entry.body.study, entry.body.round, entry.body.message) == (slot.study, slot.round, "signed")
            and entry.body.attempt is not None
        }

    def settle(self, study: Study, plan: Plan, kept: Result) -> None:
        """Settle the charges behind a kept result that a crash left unsettled: all of it ran."""
        account = self.service.estimates.account(study, plan)
        for use in _paid_for(kept.about):
            self.service.charges.settle_kept(account, use)

    def check_evaluated(self, study: Study, number: int) -> None:
        """Check that counts may leave in a sum of their own: after a round that may be the last, and once.

        Raises:
            PolicyRefusal: for any other round, or where the policy lets none leave.
        """
        if not self.service.config.policy.allow_evaluation_counts:
            raise PolicyRefusal("policy", "this site lets no evaluation counts leave")
        if not (study.may_end(number) and study.evaluated_rounds):
            raise PolicyRefusal("policy", f"round {number} is none after which the study evaluates in a sum of its own")
        last = self.service.responses.latest(study.digest, "update")
        if last is None or round_of(last) != number:
            raise PolicyRefusal("policy", f"this site did not train round {number}, so it counts nothing there")

    def check_charged(self, study: str, uses: Iterable[Use]) -> None:
        """Raises IntegrityError where the ledger has no charge for a use of the data."""
        for use in uses:
            if not self.service.spending.attempts(study, use.round, use.purpose):
                folders = f"{self.service.results.folder} and {self.service.responses.folder}"
                raise IntegrityError(
                    f"the ledger has no {use.purpose} charge for what was worked on in round {use.round}: an older "
                    f"ledger was put back. Move {folders} away; with privacy the round's next attempt is then worked "
                    "on and charged anew"
                )


_LOST = "this site has lost what it kept of the study (sums/…/session.json), and cannot tell any more which {}"


def _other_sites(why: str) -> PolicyRefusal:
    return PolicyRefusal("sum", f"every round of this study is of the same sites (aggregation.same_sites): {why}")


def _same_counts(together: Mapping[str, tuple[str, ...]], terms: Terms, survivors: tuple[str, ...]) -> tuple[str, ...]:
    """Survivors whose counts are in the sum; raises PolicyRefusal where an earlier sum had those of others."""
    counting = tuple(site for site in survivors if terms.adverts[site].counts)
    before = together.get("counts", counting)
    if counting and before != counting:
        raise _other_sites(f"the counts of an earlier sum were of {', '.join(before)}, now of {', '.join(counting)}")
    return counting


def _paid_for(about: About) -> list[Use]:
    """The uses of the data behind a result."""
    uses = [Use(about.purpose, about.round, about.model)]
    if about.purpose == "training" and about.counts and about.counted:
        uses.append(Use("evaluation", about.round - 1, about.model))
    return uses


def _where(request: Train | Evaluate) -> str:
    return f"{request.purpose}.{request.round}.{request.attempt}"


def _what(study: Study, request: Train | Evaluate) -> list[str]:
    """Digests of what is worked on: the round, the model, and the model's counts."""
    model = request.payload.sha256
    found = [["round", request.purpose, str(request.round)]]
    if request.purpose == "training":
        found.append(["training", model])
    if request.purpose == "evaluation" or counts_with(study, request.round):
        apart = ["test"] if request.purpose == "evaluation" and study.evaluation.keep is not None else []
        found.append(["counts", model, *apart])  # those for validation are other patients
    return [canonical_digest(each) for each in found]
