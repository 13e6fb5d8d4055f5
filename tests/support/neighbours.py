"""The other hospitals of a secure sum in tests of the agent, and a sum that is made with them.

They run the real state machines and have nothing to add. ``clinic-c`` stands below ``hospital-a`` in the order of
names and ``hospital-b`` above it, so the agent meets both sides of the handshake.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from consilium_shared.errors import PeerError
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.models.vector import width
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import (
    Advertise,
    Advertised,
    Evaluate,
    Handshake,
    Open,
    Payload,
    Survivors,
    Train,
)
from consilium_shared.protocol.summand import Opened, fixed_point, read, segments
from consilium_shared.secagg import prg, ring
from consilium_shared.secagg.handshake import (
    Bundle,
    Encapsulated,
    SessionKeys,
    decode_encapsulated,
    encode_bundles,
)
from consilium_shared.secagg.server import ServerSum
from consilium_shared.secagg.site import Contribution, SitePart, SiteState
from consilium_shared.secagg.terms import Advert, Slot, Terms, tolerated
from consilium_shared.study import Study

HERE = "hospital-a"


class Whole:
    """Bytes as what has arrived."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def pieces(self, size: int) -> Iterator[bytes]:
        return (self.data[start : start + size] for start in range(0, self.size, size))


def identities(coordinator: Any) -> dict[str, PublicIdentity]:
    """Of the roster."""
    members = coordinator.home.roster().members
    return {member.site: PublicIdentity.from_hex(member.identity) for member in members}


def terms_of(request: Train | Evaluate, study: Study) -> Terms:
    """As both ends make them."""
    return Terms(
        slot=request.slot,
        model=request.payload.sha256,
        segments=segments(study, request.purpose, request.round, width(study)),
        adverts=request.adverts,
        threat_model=study.aggregation.threat_model,
        corrupt=tolerated(study.aggregation, 3),
    )


def nothing(study: Study, terms: Terms, contribution: Contribution) -> bytes:
    """What a hospital sends whose update is zero, with weight 1 and no counts."""
    found, sites = b"", len(terms.cohort)
    for segment in terms.segments:
        vector = np.zeros(segment.length, dtype=ring.DTYPES[segment.bits])
        if segment.name == "update":
            fixed_point(study, sites).encode(np.zeros(segment.length, dtype=np.float32), vector)
        elif segment.name == "weight" or terms.adds_counts(2):
            vector[0] = 1  # the weight, or that it counted
        prg.apply(vector, *contribution.mask_keys(segment))
        found += vector.tobytes()
    return found + contribution.trailer


class Neighbour:
    """One other hospital."""

    def __init__(self, site: str, identity: Identity) -> None:
        self.site, self.identity = site, identity
        self.states: dict[Slot, SiteState] = {}
        self.secrets: dict[tuple[str, str], bytes] = {}
        """Study and peer to the secret that both have."""
        self.counts = True
        """Whether it offers counts with its keys."""
        self._seed = secrets.token_bytes(32)

    def keys(self, coordinator: Any, study: Study) -> SessionKeys:
        """Its long-lived keys."""
        return SessionKeys(self._seed, study.digest, coordinator.common(study)["roster"], self.site, self.identity)

    def part(self, coordinator: Any, study: str) -> SitePart:
        """Its state machine."""
        shared = {peer: secret for (of, peer), secret in self.secrets.items() if of == study}
        return SitePart(self.identity, identities(coordinator), 2, shared)

    def advert(self, coordinator: Any, slot: Slot, abandons: bool) -> Advert:
        """Its key for a slot. Unless it ``abandons`` earlier attempts it says that it signed in those it masked in."""
        part = self.part(coordinator, slot.study)
        if slot not in self.states:
            signed = []
            for earlier, state in list(self.states.items()):
                if earlier.attempt >= slot.attempt or earlier.model_copy(update={"attempt": slot.attempt}) != slot:
                    continue
                if state.stage in ("signed", "released") or not abandons:
                    signed.append(earlier.attempt)
                else:
                    self.states[earlier] = part.abandon(state)
            seed = secrets.token_bytes(32)
            told = tuple(sorted(signed))
            self.states[slot], _ = part.advertise(slot, self.site, seed, signed=told, counts=self.counts)
        return part.advert(self.states[slot])

    def mask(self, coordinator: Any, terms: Terms) -> Contribution:
        """Agree to the terms; raises PeerError where its key was used for others, or was given up."""
        part = self.part(coordinator, terms.slot.study)
        self.states[terms.slot], contribution = part.mask(self.states[terms.slot], terms)
        return contribution


class Neighbours:
    """The rest of the cohort, and what passes between the agent and them."""

    def __init__(self, members: Mapping[str, Neighbour]) -> None:
        self.members = members
        self._met: dict[tuple[str, str], Bundle] = {}
        """Study and neighbour to the agent's keys of their handshake."""
        self._sent: dict[tuple[str, str], Encapsulated] = {}
        """Study and neighbour to what it has for the agent."""

    def meet(
        self, coordinator: Any, slot: Slot, study: Study, others: tuple[str, ...], abandons: bool
    ) -> tuple[dict[str, Advert], dict[str, Encapsulated], bool]:
        """The advertisements for a slot, secrets for hospital-a, and whether it gave its key; if not, it gets a false
        one for its own."""
        about: dict[str, Any] = {"of": slot.purpose, "round": slot.round, "attempt": slot.attempt}
        answer, _ = self._ask(coordinator, Advertise(**coordinator.common(study), **about))
        given = isinstance(answer, Advertised)
        if isinstance(answer, Advertised):
            self._shake_hands(coordinator, study, answer.bundle, others)
        own = answer.advert if isinstance(answer, Advertised) else _stand_in(slot)
        adverts = {site: self.members[site].advert(coordinator, slot, abandons) for site in others}
        sent = {site: self._sent[study.digest, site] for site in others if (study.digest, site) in self._sent}
        return dict(sorted({HERE: own, **adverts}.items())), sent, given

    def agree(self, coordinator: Any, request: Train | Evaluate, study: Study) -> None:
        """The neighbours get the request too; whose key was used already stays away."""
        terms = terms_of(request, study)
        for site in terms.cohort:
            if site != HERE:
                with suppress(PeerError):
                    self.members[site].mask(coordinator, terms)

    def _shake_hands(self, coordinator: Any, study: Study, agent: Bundle, others: tuple[str, ...]) -> None:
        if all(self._met.get((study.digest, site)) == agent for site in others):
            return
        public = identities(coordinator)
        sessions = {site: self.members[site].keys(coordinator, study) for site in others}
        bundles = {HERE: agent, **{site: keys.bundle for site, keys in sessions.items()}}
        request = Handshake(**coordinator.common(study), payload=Payload.of(encode_bundles(bundles)))
        _, body = self._ask(coordinator, request, encode_bundles(bundles))
        sent = decode_encapsulated(body)
        for site, keys in sessions.items():
            mine = self.members[site].secrets
            if site > HERE:
                mine[study.digest, HERE] = keys.decapsulate(HERE, agent, sent[site], public[HERE])
            else:
                given, mine[study.digest, HERE] = keys.encapsulate(HERE, agent, public[HERE])
                self._sent[study.digest, site] = given
            for peer in (peer for peer in others if peer > site):
                given, mine[study.digest, peer] = keys.encapsulate(peer, bundles[peer], public[peer])
                secret = sessions[peer].decapsulate(site, bundles[site], given, public[site])
                self.members[peer].secrets[study.digest, site] = secret
            self._met[study.digest, site] = agent

    @staticmethod
    def _ask(coordinator: Any, request: Any, payload: bytes = b"") -> tuple[messages.Answer, bytes]:
        answer = coordinator.agent(messages.encode(request, coordinator.key), payload)
        return coordinator.read(answer), answer[1]


class Sum:
    """The sum of what the agent answered to a request, and of its neighbours' nothing."""

    def __init__(
        self,
        coordinator: Any,
        header: bytes,
        answer: tuple[bytes, bytes],
        study: Study,
        without: tuple[str, ...] = (),
    ) -> None:
        """``without``: neighbours whose vectors are left out."""
        request = messages.decode_request(header, coordinator.key.public)
        assert isinstance(request, Train | Evaluate)
        self.coordinator, self.study, self.terms = coordinator, study, terms_of(request, study)
        others = [site for site in self.terms.cohort if site not in (HERE, *without)]
        self.others = {site: coordinator.neighbours.members[site] for site in others}
        self.total = ServerSum(self.terms, identities(coordinator))
        self.total.fold(HERE, Whole(answer[1]))
        for site, neighbour in self.others.items():
            contribution = neighbour.mask(coordinator, self.terms)
            self.total.fold(site, Whole(nothing(study, self.terms, contribution)))
        self.total.close(2)
        self.about = {"of": request.purpose, "round": request.round, "attempt": request.attempt}

    def survivors(self, named: tuple[str, ...] | None = None) -> tuple[bytes, bytes]:
        """The request to sign, with other survivors where they are named; and its payload."""
        sealed = self.total.sealed_for(HERE)
        fields: dict[str, Any] = {**self.coordinator.common(self.study), **self.about, "payload": Payload.of(sealed)}
        survivors = self.total.survivors if named is None else named
        return messages.encode(Survivors(**fields, survivors=survivors), self.coordinator.key), sealed

    def open(self, signature: str) -> tuple[bytes, bytes]:
        """The request for shares, given the agent's signature; the neighbours sign, and release theirs."""
        self.total.sign(HERE, bytes.fromhex(signature))
        slot = self.terms.slot
        parts = {site: each.part(self.coordinator, slot.study) for site, each in self.others.items()}
        for site, part in parts.items():
            sealed = self.total.sealed_for(site)
            state, signed = part.sign(self.others[site].states[slot], self.total.survivors, sealed)
            self.others[site].states[slot] = state
            self.total.sign(site, signed)
        for site, part in parts.items():
            sealed = self.total.sealed_for(site)
            state, shares = part.release(self.others[site].states[slot], self.total.signatures, sealed)
            self.others[site].states[slot] = state
            self.total.share(site, shares)
        sealed = self.total.sealed_for(HERE)
        signatures = {site: each.hex() for site, each in self.total.signatures.items()}
        fields: dict[str, Any] = {**self.coordinator.common(self.study), **self.about, "payload": Payload.of(sealed)}
        return messages.encode(Open(**fields, signatures=signatures), self.coordinator.key), sealed

    def read(self, shares: bytes) -> Opened:
        """What the sum tells, with the agent's shares."""
        self.total.share(HERE, shares)
        cohort, survivors = len(self.terms.cohort), len(self.total.survivors)
        return read(self.study, self.terms.slot.purpose, cohort, survivors, self.total.open())


def _stand_in(slot: Slot) -> Advert:
    return Advert.sign(slot, HERE, secrets.token_bytes(32), Identity.generate())
