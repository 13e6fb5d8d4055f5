"""Secure sum of a round at the coordinator: exchange by exchange, attempt by attempt, until it is opened.

    advertise (handshake)     who takes part, with which keys; the keys of a next sum come with the shares of this one
    train or evaluate         masked vectors, added up as they arrive
    survivors                 the set of those in the sum is closed, and signed by them
    open                      shares of the masks' seeds; the sum, and nothing else, is unmasked

An attempt that too few answer is abandoned unopened, and made again with fresh keys.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from consilium_server.state.pending_sum import PendingSum, PendingSumFile
from consilium_server.study.convening import Abandoned, Convening, NotOpened, place
from consilium_server.study.exchange_state import ExchangeState
from consilium_server.study.exchanges import Accept, Exchange, Exchanges
from consilium_server.transport.exchange import Answer as Arrival
from consilium_shared import limits
from consilium_shared.canonical import digest
from consilium_shared.errors import PeerError
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import (
    Counts,
    Evaluate,
    Open,
    Payload,
    Shares,
    Signed,
    Survivors,
    Train,
    Update,
)
from consilium_shared.protocol.summand import Opened, counts_with, read, segments
from consilium_shared.secagg.handshake import Encapsulated
from consilium_shared.secagg.keys import KEY_BYTES
from consilium_shared.secagg.server import ServerSum
from consilium_shared.secagg.terms import Advert, Purpose, Slot, Terms, least_sites, tolerated
from consilium_shared.study import Study
from consilium_shared.transport.upload import Upload

log = logging.getLogger("consilium.study")

IN_VAIN = 2
"""Consecutive attempts without any reply after which a sum is given up: more of them would change nothing."""
RETRY_SECONDS = 1.0

Contribution = Update | Counts


@dataclass(frozen=True)
class SumSpec:
    """Specification of a sum.

    Attributes:
        purpose, number: which sum.
        model: safetensors bytes that every site is sent, in memory or in a file.
        sha256: of the model.
        request: what one site is asked, given attempt, adverts of the cohort and secrets from others for it.
        check: of an answer, besides what every sum needs; raises PeerError.
        attempts: after so many it is given up.
        together: the sites of every sum, where the contract wants the same ones; they are waited for.
    """

    purpose: Purpose
    number: int
    model: bytes | Upload
    sha256: str
    request: Callable[[int, dict[str, Advert], dict[str, Encapsulated]], Train | Evaluate]
    check: Callable[[Contribution], None]
    attempts: int = limits.ATTEMPTS
    together: frozenset[str] | None = None


@dataclass(frozen=True)
class SumResult:
    """A sum that was opened.

    Attributes:
        opened: what it tells.
        answers: survivor to its answer, and the SHA-256 of that answer's header.
        state: who answered, who refused, who was away.
        record: how it was opened, as ``records.OpenedSum`` has it.
        model: SHA-256 of the model that the sites were sent.
    """

    opened: Opened
    answers: dict[str, tuple[Contribution, str]]
    state: ExchangeState
    record: dict[str, Any]
    model: str


class Summation:
    """The sums of one study, one after the other."""

    def __init__(self, exchanges: Exchanges, parameters: int) -> None:
        """``parameters``: those that the study trains."""
        self._exchanges, self._context, self._parameters = exchanges, exchanges.context, parameters
        self._study, self._file = exchanges.context.study, PendingSumFile(exchanges.folder.root)
        self.keys = Convening(exchanges)
        about = self._study.aggregation, len(exchanges.context.roster.members)
        self._least, self._tolerated = least_sites(*about), tolerated(*about)

    def run(self, asked: SumSpec, awaited: frozenset[str]) -> SumResult:
        """Run a sum, attempt after attempt, until one is opened.

        Args:
            awaited: sites that are waited for as long as ``round_timeout`` allows; others must come at once.

        Raises:
            NotOpened: too few sites are left, or no attempt succeeded.
            Halted: somebody stopped the study.
        """
        under_way = self._file.read(asked.purpose, asked.number)
        attempt, earlier, in_vain = 1 if under_way is None else under_way.attempt, None, 0
        only = asked.together
        while True:
            try:
                if under_way is None:
                    slot = self.keys.slot(asked.purpose, asked.number, attempt)
                    under_way = self.keys.convene(slot, awaited, earlier, only, everybody=asked.together is not None)
                    self._file.write(under_way)
                return self._attempt(asked, under_way)
            except Abandoned as abandoned:
                why, awaited = str(abandoned), abandoned.present
                only = awaited if abandoned.without_others else asked.together
            log.warning("round %d, attempt %d is abandoned unopened: %s", asked.number, attempt, why)
            self._exchanges.folder.event("abandoned", round=asked.number, attempt=attempt, why=why)
            in_vain = 0 if awaited else in_vain + 1
            if attempt >= asked.attempts or in_vain == IN_VAIN:
                raise NotOpened(f"given up after attempt {attempt}: {why}")
            if under_way is not None and asked.purpose == "training":
                earlier = self._terms(asked, under_way)
            attempt, under_way = attempt + 1, None
            self._context.pause(RETRY_SECONDS)

    # -- one attempt

    def _terms(self, asked: SumSpec, under_way: PendingSum) -> Terms:
        return Terms(
            slot=self.keys.slot(asked.purpose, asked.number, under_way.attempt),
            model=asked.sha256,
            segments=segments(self._study, asked.purpose, asked.number, self._parameters),
            threat_model=self._study.aggregation.threat_model,
            adverts=under_way.adverts,
            corrupt=self._tolerated,
        )

    def _attempt(self, asked: SumSpec, under_way: PendingSum) -> SumResult:
        terms = self._terms(asked, under_way)
        slot = terms.slot
        total = ServerSum(terms, self.keys.identities, under_way.survivors)
        collected, answers = self._collect(asked, under_way, total)
        if under_way.survivors is not None and total.missing():
            why = f"after a restart {', '.join(total.missing())} did not give again what went into the sum"
            raise Abandoned(why, collected.answered)
        if asked.together is not None and total.missing():
            why = f"every sum is of the same sites, and {', '.join(total.missing())} gave nothing"
            raise Abandoned(why, collected.answered)
        try:
            survivors = total.close(self._least)
        except PeerError as error:
            # So many that the sum could be opened, but for the counts of a few. Among these sites alone too few offer
            # some, so that nobody adds any, and the round goes on without; with the absent, it might never.
            enough = len(total.survivors) >= max(terms.threshold, self._least)
            raise Abandoned(str(error), collected.answered, without_others=enough) from error
        if under_way.survivors is None:
            self._file.write(under_way.model_copy(update={"survivors": survivors}))
        self._sign(slot, total)
        self._release(slot, total)
        try:
            totals = total.open()
        except PeerError as error:
            raise Abandoned(str(error), list(total.sharers)) from error
        counting = terms.counting(survivors) if terms.adds_counts(self._least) else 0
        opened = read(self._study, asked.purpose, len(terms.cohort), len(survivors), totals, counting)
        record = {
            "attempt": under_way.attempt,
            "adverts": {site: advert.model_dump(mode="json") for site, advert in terms.adverts.items()},
            "parameters": self._parameters,
            "signatures": {site: signature.hex() for site, signature in total.signatures.items()},
        }
        return SumResult(opened, answers, collected, record, asked.sha256)

    def _collect(
        self, asked: SumSpec, under_way: PendingSum, total: ServerSum
    ) -> tuple[ExchangeState, dict[str, tuple[Contribution, str]]]:
        """Masked vectors, added up as they arrive."""
        answers: dict[str, tuple[Contribution, str]] = {}
        kind = Update if asked.purpose == "training" else Counts

        def accept(answer: messages.Answer, arrival: Arrival) -> None:
            if not isinstance(answer, kind) or (answer.round, answer.attempt) != (asked.number, under_way.attempt):
                raise PeerError("not an answer to this question")
            asked.check(answer)
            total.fold(answer.site, arrival.payload)
            answers[answer.site] = answer, digest(arrival.header)
            for low, _ in under_way.encapsulated[answer.site].items():
                self.keys.note_known(answer.site, low)

        sites = under_way.survivors or tuple(under_way.adverts)
        requests = {}
        for site in sites:
            request = asked.request(under_way.attempt, under_way.adverts, under_way.encapsulated[site])
            requests[site] = self._context.encode(request), asked.model
        all_of_them = under_way.survivors is not None or asked.together is not None
        needed = len(sites) if all_of_them else max(total.terms.threshold, self._least)
        # Too few wait for the others, unless they can prove that this attempt is dead: else nobody could go on.
        least = None if all_of_them else total.terms.enough_to_abandon
        least = 0 if asked.purpose == "evaluation" else least
        exchange = Exchange(
            asked.purpose,
            asked.number,
            requests,
            accept,
            needed,
            total.payload_bytes,
            least=least,
            aside=self.keys.ahead(total.terms.slot, total.terms.cohort),
        )
        return self._exchanges.run(exchange), answers

    def _sign(self, slot: Slot, total: ServerSum) -> None:
        """The survivors' signatures over the set."""

        def accept(answer: messages.Answer, _: Arrival) -> None:
            if not isinstance(answer, Signed) or (answer.of, answer.round, answer.attempt) != place(slot):
                raise PeerError("not an answer to this question")
            total.sign(answer.site, bytes.fromhex(answer.signature))

        def request(sealed: Payload) -> Survivors:
            return Survivors(**self._context.common, **_of(slot), survivors=total.survivors, payload=sealed)

        requests = self._sealed(total, total.survivors, request)
        self._ask_survivors("survivors", slot, total, requests, 0, accept)

    def _release(self, slot: Slot, total: ServerSum) -> None:
        """The signers' shares, and their keys for the next sum."""
        shares_bytes = KEY_BYTES * len(total.survivors) * len(total.terms.cohort)

        def accept(answer: messages.Answer, arrival: Arrival) -> None:
            if not isinstance(answer, Shares) or (answer.of, answer.round, answer.attempt) != place(slot):
                raise PeerError("not an answer to this question")
            total.share(answer.site, arrival.payload.read())
            if answer.next is not None:
                self.keys.keep_next(slot, answer.site, answer.next)

        signatures = {site: signature.hex() for site, signature in total.signatures.items()}

        def request(sealed: Payload) -> Open:
            return Open(**self._context.common, **_of(slot), signatures=signatures, payload=sealed)

        requests = self._sealed(total, tuple(signatures), request)
        self._ask_survivors("opening", slot, total, requests, shares_bytes, accept)

    def _sealed(
        self, total: ServerSum, sites: tuple[str, ...], make: Callable[[Payload], Survivors | Open]
    ) -> dict[str, tuple[bytes, bytes]]:
        """Each site's request, with the shares that were sealed to it."""
        found = {}
        for site in sites:
            sealed = total.sealed_for(site)
            found[site] = self._context.encode(make(Payload.of(sealed))), sealed
        return found

    def _ask_survivors(
        self,
        phase: str,
        slot: Slot,
        total: ServerSum,
        requests: Mapping[str, tuple[bytes, bytes]],
        answer_bytes: int,
        accept: Accept,
    ) -> None:
        """Ask the survivors until enough have answered; do not wait long for the others.

        For enough one waits as long as it takes, since who has signed can go on with no other set of the same update;
        but for counts on the last model, without which it can be published.
        """
        exchange = Exchange(
            phase,
            slot.round,
            requests,
            accept,
            total.terms.threshold,
            answer_bytes,
            awaited=frozenset(),
            least=0 if slot.purpose == "evaluation" else None,
            aside=self.keys.ahead(slot, total.survivors),
        )
        state = self._exchanges.run(exchange)
        if not state.enough():
            raise Abandoned(
                f"{len(state.answered)} of {len(total.survivors)} survivors answered ({phase}), and "
                f"{state.minimum} are needed",
                state.answered,
            )


def counted(study: Study, records: Iterable[Mapping[str, Any]], least: int) -> frozenset[str]:
    """The sites whose counts were first in a sum of updates, by the records; none where no sum had any.

    Args:
        least: fewest whose counts are added up (``least_sites``).
    """
    for record in records:
        adverts = record["opened"]["adverts"]
        if counts_with(study, record["round"]) and sum(advert["counts"] for advert in adverts.values()) >= least:
            found = frozenset(site for site in record["participants"] if adverts[site]["counts"])
            if found:
                return found
    return frozenset()


class _OfSum(TypedDict):
    """Fields by which a request names its sum."""

    of: Purpose
    round: int
    attempt: int


def _of(slot: Slot) -> _OfSum:
    return _OfSum(of=slot.purpose, round=slot.round, attempt=slot.attempt)
