"""Cohort of a secure sum: key agreement with every site that comes, and a secret between each two of them.

Keys of a next sum come with the shares of this one. Whoever is not in this one is asked for a key for the next while
the others work: so a site comes back as soon as it can, however far away it is, and nobody waits for it.
"""

from __future__ import annotations

from collections.abc import Collection

from consilium_server.state.pending_sum import PendingSum
from consilium_server.study.exchanges import Accept, Aside, Exchange, Exchanges
from consilium_server.transport.exchange import Answer as Arrival
from consilium_shared import limits
from consilium_shared.errors import PeerError
from consilium_shared.identity import PublicIdentity
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import Advertise, Advertised, Handshake, Handshaken, Payload
from consilium_shared.secagg.handshake import Bundle, Encapsulated, decode_encapsulated, encode_bundles
from consilium_shared.secagg.keys import check_public
from consilium_shared.secagg.terms import Advert, Purpose, Slot, Terms, fewest_sites


class NotOpened(Exception):
    """No attempt could be opened; the text says why."""


class Abandoned(Exception):
    """Attempt that cannot be opened; the text says why.

    Attributes:
        present: sites that answered until then.
        without_others: whether the next attempt is for them alone.
    """

    def __init__(self, why: str, present: Collection[str], *, without_others: bool = False) -> None:
        super().__init__(why)
        self.present, self.without_others = frozenset(present), without_others


def place(slot: Slot) -> tuple[Purpose, int, int]:
    """Purpose, round and attempt, by which the answers about a sum name it."""
    return slot.purpose, slot.round, slot.attempt


class Convening:
    """Key agreement of one study: its sites' keys for each sum, and which of them share a secret."""

    def __init__(self, exchanges: Exchanges) -> None:
        self._exchanges, self._context = exchanges, exchanges.context
        self._study = exchanges.context.study
        self._adverts: dict[Slot, dict[str, Advert]] = {}
        self._bundles: dict[str, Bundle] = {}
        self._known: dict[str, dict[str, str]] = {}
        """Site to those with which it has a secret, and the digest of the keys with which they agreed on it."""
        self.identities = {
            member.site: PublicIdentity.from_hex(member.identity) for member in exchanges.context.roster.members
        }

    def slot(self, purpose: Purpose, number: int, attempt: int) -> Slot:
        """Slot that the keys of an attempt belong to."""
        return Slot(**self._context.common, purpose=purpose, round=number, attempt=attempt)

    def convene(
        self,
        slot: Slot,
        awaited: frozenset[str],
        earlier: Terms | None,
        only: frozenset[str] | None = None,
        *,
        everybody: bool = False,
    ) -> PendingSum:
        """Keys of everybody who comes, or ``only`` of these (``everybody``: of each), and secrets between each two.

        After an earlier attempt at least so many of its cohort must come that it is dead; else nobody could go on.

        Raises:
            NotOpened: too few sites are left.
            Abandoned: too few gave keys.
        """
        minimum = fewest_sites(self._study, self._context.roster.members)
        minimum = max(minimum, len(only)) if everybody and only else minimum
        adverts = self._adverts.setdefault(slot, {})
        approved = self._working(slot, minimum) if earlier is None and only is None else self._approved(only)
        missing = tuple(site for site in approved if site not in adverts or site not in self._bundles)
        if missing:
            have = len(approved) - len(missing)
            header, accept = self._question(slot)
            needed = max(minimum - have, 0) if slot.purpose == "training" else 0
            requests = dict.fromkeys(missing, (header, b""))
            keys = Exchange("keys", slot.round, requests, accept, needed, awaited=awaited & set(missing))
            state = self._exchanges.run(keys)
            if earlier is not None and not earlier.dead(adverts):
                late = {site: requests[site] for site in state.open() if site in earlier.cohort}
                lacking = earlier.enough_to_abandon - earlier.promised(adverts)
                self._exchanges.run(Exchange("keys", slot.round, late, accept, lacking, awaited=frozenset()))
        cohort = sorted(site for site in approved if site in adverts and site in self._approved(only))
        encapsulated = self._shake_hands(slot.round, cohort)
        cohort = [site for site in cohort if site in encapsulated]
        if len(self._approved(None)) < minimum:
            raise NotOpened(f"{len(cohort)} sites can take part, and {minimum} are needed")
        if len(cohort) < minimum:
            raise Abandoned(f"{len(cohort)} sites have given keys, and {minimum} are needed", cohort)
        self._adverts = {each: found for each, found in self._adverts.items() if each == slot or _after(each, slot)}
        return PendingSum(
            purpose=slot.purpose,
            round=slot.round,
            attempt=slot.attempt,
            adverts={site: adverts[site] for site in cohort},
            encapsulated={site: encapsulated[site] for site in cohort},
        )

    def _approved(self, only: frozenset[str] | None) -> tuple[str, ...]:
        approved = self._exchanges.recruitment.sites("approved")
        return tuple(site for site in approved if only is None or site in only)

    def _working(self, slot: Slot, minimum: int) -> tuple[str, ...]:
        """Approved sites but those that were late too often, if enough are left without them."""
        approved, resting = self._approved(None), self._exchanges.recruitment.resting(slot.round)
        working = tuple(site for site in approved if site not in resting)
        return working if slot.purpose == "training" and len(working) >= minimum else approved

    def _question(self, slot: Slot) -> tuple[bytes, Accept]:
        """The question for keys, and what takes an answer."""
        request = Advertise(**self._context.common, of=slot.purpose, round=slot.round, attempt=slot.attempt)

        def accept(answer: messages.Answer, _: Arrival) -> None:
            if not isinstance(answer, Advertised) or (answer.of, answer.round, answer.attempt) != place(slot):
                raise PeerError("not an answer to this question")
            self._check_advert(slot, answer.site, answer.advert)
            answer.bundle.verify(slot.study, slot.roster, answer.site, self.identities[answer.site])
            self._adverts.setdefault(slot, {})[answer.site] = answer.advert
            self._bundles[answer.site], self._known[answer.site] = answer.bundle, dict(answer.known)

        return self._context.encode(request), accept

    def ahead(self, slot: Slot, cohort: Collection[str]) -> Aside | None:
        """The question for keys for the round after ``slot``, to whoever is outside the cohort of this one."""
        following = self._following(slot)
        if slot.purpose != "training" or following.purpose != "training":
            return None
        header, accept = self._question(following)
        have = self._adverts.setdefault(following, {})

        def sites() -> tuple[str, ...]:
            return tuple(site for site in self._exchanges.recruitment.due(following.round, cohort) if site not in have)

        return Aside(following.round, header, sites, accept)

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
        common = self._context.common
        request = Handshake(**common, payload=Payload.of(payload))
        header = self._context.encode(request)
        sent: dict[str, dict[str, Encapsulated]] = {}

        def accept(answer: messages.Answer, arrival: Arrival) -> None:
            if not isinstance(answer, Handshaken):
                raise PeerError("not an answer to this question")
            found, low = decode_encapsulated(arrival.payload.read()), (answer.site, bundles[answer.site])
            for high in (site for site in cohort if site > answer.site):
                if high not in found:
                    raise PeerError(f"a handshake without {high}")
                found[high].verify(
                    common["study"], common["roster"], low, (high, bundles[high]), self.identities[answer.site]
                )
            sent[answer.site] = found

        requests = dict.fromkeys(cohort, (header, payload))
        self._exchanges.run(Exchange("handshake", number, requests, accept, 0, limits.HEADER_BYTES))
        for low, found in sent.items():
            for high in (site for site in sent if site > low):
                if strange(high, low) or strange(low, high):
                    needed[high][low] = found[high]
                self._known[low][high] = digests[high]
        return {site: needed[site] for site in sent}

    def note_known(self, site: str, other: str) -> None:
        """Note that ``site`` has taken the secret that ``other`` sent it."""
        if other in self._bundles:
            known = self._known.setdefault(site, {})
            known[other] = self._bundles[other].digest

    def keep_next(self, slot: Slot, site: str, advert: Advert) -> None:
        """The key for the sum after ``slot``, which came with the shares of this one.

        One of no use is not kept, and costs no share: that site is asked for a key of its own.
        """
        following = self._following(slot)
        try:
            self._check_advert(following, site, advert)
        except PeerError:
            return
        self._adverts.setdefault(following, {})[site] = advert

    def _following(self, slot: Slot) -> Slot:
        if slot.purpose == "training" and slot.round < self._study.training.rounds:
            return slot.model_copy(update={"round": slot.round + 1, "attempt": 1})
        return slot.model_copy(update={"purpose": "evaluation", "attempt": 1})

    def _check_advert(self, slot: Slot, site: str, advert: Advert) -> None:
        """Whoever sends a key of no use is found here, and not by all the others."""
        advert.verify(slot, site, self.identities[site])
        check_public(bytes.fromhex(advert.key))
        if any(each.key == advert.key for other, each in self._adverts.get(slot, {}).items() if other != site):
            raise PeerError("this key is another site's")


def _after(each: Slot, slot: Slot) -> bool:
    return each.purpose == "training" and each.round > slot.round
