"""One secure sum, exchange by exchange, attempt by attempt, until it is opened.

    advertise (handshake)     who takes part, with which keys; the keys of a next sum come with the shares of this one
    train or evaluate         masked vectors, added up as they arrive
    survivors                 the set of those in the sum is closed, and signed by them
    open                      shares of the masks' seeds; the sum, and nothing else, is unmasked

An attempt that too few answer is abandoned unopened, and made again with fresh keys.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from consilium_server.asking import Accept, Asking
from consilium_server.exchange import Answer as Arrival
from consilium_server.open_sum import OpenSum, OpenSumFile
from consilium_server.rounds import Question
from consilium_shared import limits, messages
from consilium_shared.canonical import digest
from consilium_shared.errors import PeerError
from consilium_shared.identity import PublicIdentity
from consilium_shared.messages import (
    Advertise,
    Advertised,
    Counts,
    Evaluate,
    Handshake,
    Handshaken,
    Open,
    Payload,
    Shares,
    Signed,
    Survivors,
    Train,
    Update,
)
from consilium_shared.secagg.handshake import Bundle, Encapsulated, decode_encapsulated, encode_bundles
from consilium_shared.secagg.keys import KEY_BYTES, check_public
from consilium_shared.secagg.server import ServerSum
from consilium_shared.secagg.terms import Advert, Purpose, Slot, Terms
from consilium_shared.summand import Opened, read, segments

log = logging.getLogger("consilium.study")

IN_VAIN = 2
"""After so many attempts in a row in which nobody answered, a sum is given up: more of them would change nothing."""
RETRY_SECONDS = 1.0

Contribution = Update | Counts


class NotOpened(Exception):
    """No attempt could be opened; the text says why."""


class _Abandoned(Exception):
    """This attempt cannot be opened; the text says why.

    Attributes:
        present: sites that answered until then.
        without_others: whether the next attempt is for them alone.
    """

    def __init__(self, why: str, present: list[str], *, without_others: bool = False) -> None:
        super().__init__(why)
        self.present, self.without_others = frozenset(present), without_others


@dataclass(frozen=True)
class Asked:
    """What is summed.

    Attributes:
        purpose, number: which sum.
        model: safetensors bytes that every site is sent.
        request: what one site is asked, given attempt, adverts of the cohort and secrets from others for it.
        check: of an answer, besides what every sum needs; raises PeerError.
        attempts: after so many it is given up.
    """

    purpose: Purpose
    number: int
    model: bytes
    request: Callable[[int, dict[str, Advert], dict[str, Encapsulated]], Train | Evaluate]
    check: Callable[[Contribution], None]
    attempts: int = limits.ATTEMPTS


@dataclass(frozen=True)
class Summed:
    """A sum that was opened.

    Attributes:
        opened: what it tells.
        answers: survivor to its answer, and the SHA-256 of that answer's header.
        question: who answered, who refused, who was away.
        record: how it was opened, as ``records.OpenedSum`` has it.
    """

    opened: Opened
    answers: dict[str, tuple[Contribution, str]]
    question: Question
    record: dict[str, Any]


class Summation:
    """The sums of one study, one after the other."""

    def __init__(self, asking: Asking, parameters: int) -> None:
        """``parameters``: those that the study trains."""
        self._asking, self._talk, self._parameters = asking, asking.talk, parameters
        self._study, self._file = asking.talk.study, OpenSumFile(asking.folder.root)
        self._adverts: dict[Slot, dict[str, Advert]] = {}
        self._bundles: dict[str, Bundle] = {}
        self._known: dict[str, dict[str, str]] = {}
        """Site to those with which it has a secret, and the digest of the keys with which they agreed on it."""
        self._identities = {
            member.site: PublicIdentity.from_hex(member.identity) for member in asking.talk.roster.members
        }

    def run(self, asked: Asked, awaited: frozenset[str]) -> Summed:
        """Attempt after attempt.

        Args:
            awaited: sites that are waited for as long as ``round_timeout`` allows; others must come at once.

        Raises:
            NotOpened: too few sites are left, or no attempt succeeded.
            Halted: somebody stopped the study.
        """
        under_way = self._file.read(asked.purpose, asked.number)
        attempt, earlier, in_vain = 1 if under_way is None else under_way.attempt, None, 0
        only: frozenset[str] | None = None
        while True:
            try:
                if under_way is None:
                    under_way = self._convene(asked, attempt, awaited, earlier, only)
                return self._attempt(asked, under_way)
            except _Abandoned as abandoned:
                why, awaited = str(abandoned), abandoned.present
                only = awaited if abandoned.without_others else None
            log.warning("round %d, attempt %d is abandoned unopened: %s", asked.number, attempt, why)
            self._asking.folder.event("abandoned", round=asked.number, attempt=attempt, why=why)
            in_vain = 0 if awaited else in_vain + 1
            if attempt >= asked.attempts or in_vain == IN_VAIN:
                raise NotOpened(f"given up after attempt {attempt}: {why}")
            if under_way is not None and asked.purpose == "training":
                earlier = self._terms(asked, under_way)
            attempt, under_way = attempt + 1, None
            self._talk.pause(RETRY_SECONDS)

    # -- who takes part

    def _slot(self, asked: Asked, attempt: int) -> Slot:
        common = self._talk.common
        return Slot(**common, purpose=asked.purpose, round=asked.number, attempt=attempt)

    def _convene(
        self,
        asked: Asked,
        attempt: int,
        awaited: frozenset[str],
        earlier: Terms | None,
        only: frozenset[str] | None = None,
    ) -> OpenSum:
        """Keys of everybody who comes, or ``only`` of these, and secrets between each two of them.

        After an earlier attempt at least so many of its cohort must come that it is dead; else nobody could go on.
        """
        slot, minimum = self._slot(asked, attempt), self._study.aggregation.min_sites
        adverts = self._adverts.setdefault(slot, {})
        approved = self._approved(only)
        missing = tuple(site for site in approved if site not in adverts or site not in self._bundles)
        if missing:
            have = len(approved) - len(missing)
            request = Advertise(**self._talk.common, of=asked.purpose, round=asked.number, attempt=attempt)

            def accept(answer: messages.Answer, _: Arrival) -> None:
                if not isinstance(answer, Advertised) or (answer.of, answer.round, answer.attempt) != _place(slot):
                    raise PeerError("not an answer to this question")
                self._check_advert(slot, answer.site, answer.advert)
                answer.bundle.verify(slot.study, slot.roster, answer.site, self._identities[answer.site])
                adverts[answer.site], self._bundles[answer.site] = answer.advert, answer.bundle
                self._known[answer.site] = dict(answer.known)

            header = messages.encode(request, self._talk.coordinator)
            needed = max(minimum - have, 0) if asked.purpose == "training" else 0
            question = self._asking.question(asked.number, "keys", missing, needed, awaited=awaited & set(missing))
            self._asking.ask(question, asked.number, dict.fromkeys(missing, (header, b"")), 0, accept)
            if earlier is not None and not earlier.dead(adverts):
                late = tuple(site for site in question.open() if site in earlier.cohort)
                lacking = earlier.enough_to_abandon - earlier.promised(adverts)
                question = self._asking.question(asked.number, "keys", late, lacking, awaited=frozenset())
                self._asking.ask(question, asked.number, dict.fromkeys(late, (header, b"")), 0, accept)
        cohort = sorted(site for site in self._approved(only) if site in adverts)
        encapsulated = self._shake_hands(asked.number, cohort)
        cohort = [site for site in cohort if site in encapsulated]
        if len(self._approved(None)) < minimum:
            raise NotOpened(f"{len(cohort)} sites can take part, and {minimum} are needed")
        if len(cohort) < minimum:
            raise _Abandoned(f"{len(cohort)} sites have given keys, and {minimum} are needed", cohort)
        under_way = OpenSum(
            purpose=asked.purpose,
            round=asked.number,
            attempt=attempt,
            adverts={site: adverts[site] for site in cohort},
            encapsulated={site: encapsulated[site] for site in cohort},
        )
        self._file.write(under_way)
        self._adverts = {slot: adverts}
        return under_way

    def _approved(self, only: frozenset[str] | None) -> tuple[str, ...]:
        approved = self._asking.recruitment.sites("approved")
        return tuple(site for site in approved if only is None or site in only)

    def _shake_hands(self, number: int, cohort: list[str]) -> dict[str, dict[str, Encapsulated]]:
        """Site to what it needs from others to share a secret with each; who does not answer is left out."""
        needed: dict[str, dict[str, Encapsulated]] = {site: {} for site in cohort}
        bundles = {site: self._bundles[site] for site in cohort}
        digests = {site: bundle.digest for site, bundle in bundles.items()}

        def strange(one: str, other: str) -> bool:
            return self._known[one].get(other) != digests[other]

        if not any(strange(one, other) for one in cohort for other in cohort if one != other):
            return needed
        payload = encode_bundles(bundles)
        request = Handshake(**self._talk.common, payload=Payload.of(payload))
        header = messages.encode(request, self._talk.coordinator)
        sent: dict[str, dict[str, Encapsulated]] = {}

        def accept(answer: messages.Answer, arrival: Arrival) -> None:
            if not isinstance(answer, Handshaken):
                raise PeerError("not an answer to this question")
            found, low = decode_encapsulated(arrival.payload.read()), (answer.site, bundles[answer.site])
            for high in (site for site in cohort if site > answer.site):
                if high not in found:
                    raise PeerError(f"a handshake without {high}")
                about = self._talk.common["study"], self._talk.common["roster"]
                found[high].verify(*about, low, (high, bundles[high]), self._identities[answer.site])
            sent[answer.site] = found

        question = self._asking.question(number, "handshake", tuple(cohort), 0)
        requests = dict.fromkeys(cohort, (header, payload))
        self._asking.ask(question, number, requests, limits.HEADER_BYTES, accept)
        for low, found in sent.items():
            for high in (site for site in sent if site > low):
                if strange(high, low) or strange(low, high):
                    needed[high][low] = found[high]
                self._known[low][high] = digests[high]
        return {site: needed[site] for site in sent}

    # -- one attempt

    def _terms(self, asked: Asked, under_way: OpenSum) -> Terms:
        return Terms(
            slot=self._slot(asked, under_way.attempt),
            model=digest(asked.model),
            segments=segments(self._study, asked.purpose, asked.number, self._parameters),
            threat_model=self._study.aggregation.threat_model,
            adverts=under_way.adverts,
        )

    def _attempt(self, asked: Asked, under_way: OpenSum) -> Summed:
        terms = self._terms(asked, under_way)
        slot = terms.slot
        total = ServerSum(terms, self._identities, under_way.survivors)
        collected, answers = self._collect(asked, under_way, total)
        if under_way.survivors is not None and total.missing():
            why = f"after a restart {', '.join(total.missing())} did not give again what went into the sum"
            raise _Abandoned(why, collected.answered)
        try:
            survivors = total.close(self._study.aggregation.min_sites)
        except PeerError as error:
            # So many that the sum could be opened, but for the counts of a few. Among these sites alone too few offer
            # some, so that nobody adds any, and the round goes on without; with the absent, it might never.
            enough = len(total.survivors) >= max(terms.threshold, self._study.aggregation.min_sites)
            raise _Abandoned(str(error), collected.answered, without_others=enough) from error
        if under_way.survivors is None:
            self._file.write(under_way.model_copy(update={"survivors": survivors}))
        self._sign(slot, total)
        self._release(slot, total)
        try:
            totals = total.open()
        except PeerError as error:
            raise _Abandoned(str(error), list(total.sharers)) from error
        opened = read(self._study, asked.purpose, len(terms.cohort), len(total.survivors), totals)
        record = {
            "attempt": under_way.attempt,
            "adverts": {site: advert.model_dump(mode="json") for site, advert in terms.adverts.items()},
            "parameters": self._parameters,
            "signatures": {site: signature.hex() for site, signature in total.signatures.items()},
        }
        return Summed(opened, answers, collected, record)

    def _collect(
        self, asked: Asked, under_way: OpenSum, total: ServerSum
    ) -> tuple[Question, dict[str, tuple[Contribution, str]]]:
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
                self._note_known(answer.site, low)

        sites = under_way.survivors or tuple(under_way.adverts)
        requests = {}
        for site in sites:
            request = asked.request(under_way.attempt, under_way.adverts, under_way.encapsulated[site])
            requests[site] = messages.encode(request, self._talk.coordinator), asked.model
        needed = len(sites) if under_way.survivors else max(total.terms.threshold, self._study.aggregation.min_sites)
        # Too few wait for the others, unless they can prove that this attempt is dead: else nobody could go on.
        least = None if under_way.survivors else total.terms.enough_to_abandon
        least = 0 if asked.purpose == "evaluation" else least
        question = self._asking.question(asked.number, asked.purpose, sites, needed, least=least)
        self._asking.ask(question, asked.number, requests, total.payload_bytes, accept)
        return question, answers

    def _note_known(self, site: str, other: str) -> None:
        if other in self._bundles:
            known = self._known.setdefault(site, {})
            known[other] = self._bundles[other].digest

    def _sign(self, slot: Slot, total: ServerSum) -> None:
        """The survivors' signatures over the set."""

        def accept(answer: messages.Answer, _: Arrival) -> None:
            if not isinstance(answer, Signed) or (answer.of, answer.round, answer.attempt) != _place(slot):
                raise PeerError("not an answer to this question")
            total.sign(answer.site, bytes.fromhex(answer.signature))

        about: dict[str, Any] = {**_about(slot), "survivors": total.survivors}
        requests = self._sealed(total, total.survivors, lambda p: Survivors(**self._talk.common, **about, payload=p))
        self._ask_survivors("survivors", slot, total, requests, 0, accept)

    def _release(self, slot: Slot, total: ServerSum) -> None:
        """The signers' shares, and their keys for the next sum."""
        shares_bytes = KEY_BYTES * len(total.survivors) * len(total.terms.cohort)

        def accept(answer: messages.Answer, arrival: Arrival) -> None:
            if not isinstance(answer, Shares) or (answer.of, answer.round, answer.attempt) != _place(slot):
                raise PeerError("not an answer to this question")
            total.share(answer.site, arrival.payload.read())
            if answer.next is not None:
                self._keep_next(slot, answer.site, answer.next)

        signatures = {site: signature.hex() for site, signature in total.signatures.items()}
        about: dict[str, Any] = {**_about(slot), "signatures": signatures}
        requests = self._sealed(total, tuple(signatures), lambda p: Open(**self._talk.common, **about, payload=p))
        self._ask_survivors("opening", slot, total, requests, shares_bytes, accept)

    def _sealed(
        self, total: ServerSum, sites: tuple[str, ...], make: Callable[[Payload], Survivors | Open]
    ) -> dict[str, tuple[bytes, bytes]]:
        """Each site's request, with the shares that were sealed to it."""
        found = {}
        for site in sites:
            sealed = total.sealed_for(site)
            found[site] = messages.encode(make(Payload.of(sealed)), self._talk.coordinator), sealed
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
        """Enough of them suffice: whoever is away is not waited for long.

        For enough one waits as long as it takes, since who has signed can go on with no other set of the same update;
        but for counts on the last model, without which it can be published.
        """
        least = 0 if slot.purpose == "evaluation" else None
        question = self._asking.question(
            slot.round, phase, tuple(requests), total.terms.threshold, awaited=frozenset(), least=least
        )
        self._asking.ask(question, slot.round, requests, answer_bytes, accept)
        if not question.enough():
            raise _Abandoned(
                f"{len(question.answered)} of {len(total.survivors)} survivors answered ({phase}), and "
                f"{question.minimum} are needed",
                question.answered,
            )

    def _keep_next(self, slot: Slot, site: str, advert: Advert) -> None:
        if slot.purpose == "training" and slot.round < self._study.training.rounds:
            following = slot.model_copy(update={"round": slot.round + 1, "attempt": 1})
        else:
            following = slot.model_copy(update={"purpose": "evaluation", "attempt": 1})
        self._check_advert(following, site, advert)
        self._adverts.setdefault(following, {})[site] = advert

    def _check_advert(self, slot: Slot, site: str, advert: Advert) -> None:
        """Whoever sends a key of no use is found here, and not by all the others."""
        advert.verify(slot, site, self._identities[site])
        check_public(bytes.fromhex(advert.key))
        if any(each.key == advert.key for other, each in self._adverts.get(slot, {}).items() if other != site):
            raise PeerError("this key is another site's")


def _about(slot: Slot) -> dict[str, Any]:
    return {"of": slot.purpose, "round": slot.round, "attempt": slot.attempt}


def _place(slot: Slot) -> tuple[Purpose, int, int]:
    return slot.purpose, slot.round, slot.attempt
