"""The other hospital of a secure sum in tests of the agent: the real state machine with nothing to add."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any

import numpy as np

from consilium_shared import messages
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.messages import (
    Advertise,
    Advertised,
    Evaluate,
    Handshake,
    Open,
    Payload,
    Shares,
    Signed,
    Survivors,
    Train,
)
from consilium_shared.models.vector import width
from consilium_shared.secagg import prg, ring
from consilium_shared.secagg.handshake import SessionKeys, decode_encapsulated, encode_bundles
from consilium_shared.secagg.server import ServerSum
from consilium_shared.secagg.site import SitePart, SiteState
from consilium_shared.secagg.terms import Advert, Slot, Terms
from consilium_shared.study import Study
from consilium_shared.summand import Opened, fixed_point, read, segments

HERE, THERE = "hospital-a", "hospital-b"


class Whole:
    """Bytes as what has arrived."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def pieces(self, size: int) -> Iterator[bytes]:
        return (self.data[start : start + size] for start in range(0, self.size, size))


class Neighbour:
    """hospital-b."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.secrets: dict[str, bytes] = {}
        self.states: dict[Slot, SiteState] = {}
        self.bundles: dict[str, str] = {}
        self.seed = secrets.token_bytes(32)

    def meet(self, coordinator: Any, slot: Slot, study: Study) -> tuple[dict[str, Advert], bool]:
        """Both advertisements for a slot, and whether hospital-a gave its own; where not, another stands for it."""
        about = {"of": slot.purpose, "round": slot.round, "attempt": slot.attempt}
        answer = self._ask(coordinator, Advertise(**coordinator.common(study), **about))
        given = isinstance(answer, Advertised)
        if isinstance(answer, Advertised) and self.bundles.get(study.digest) != answer.bundle.agreement:
            self._shake_hands(coordinator, study, answer)
        if slot not in self.states:
            part, seed = self._part(coordinator, study), secrets.token_bytes(32)
            self.states[slot], _ = part.advertise(slot, THERE, seed, counts=True)
        advert = answer.advert if isinstance(answer, Advertised) else self._stand_in(slot)
        return {HERE: advert, THERE: self._part(coordinator, study).advert(self.states[slot])}, given

    def opened(self, coordinator: Any, header: bytes, answer: tuple[bytes, bytes], study: Study) -> Opened:
        """Complete the sum of the answer to ``header``."""
        request = messages.decode_request(header, coordinator.key.public)
        assert isinstance(request, Train | Evaluate)
        parts = segments(study, request.purpose, request.round, width(study))
        about = {"slot": request.slot, "model": request.payload.sha256, "segments": parts, "adverts": request.adverts}
        terms = Terms(**about, threat_model=study.aggregation.threat_model)
        total = ServerSum(terms, self._identities(coordinator))
        total.fold(HERE, Whole(answer[1]))
        part = self._part(coordinator, study)
        state, contribution = part.mask(self.states[request.slot], terms)
        total.fold(THERE, Whole(self._nothing(study, terms, contribution) + contribution.trailer))
        survivors = total.close(2)
        of = {"of": request.purpose, "round": request.round, "attempt": request.attempt}
        sealed = {site: total.sealed_for(site) for site in survivors}
        state, signature = part.sign(state, survivors, sealed[THERE])
        total.sign(THERE, signature)
        asked: Any = Survivors(
            **coordinator.common(study), **of, survivors=survivors, payload=Payload.of(sealed[HERE])
        )
        signed = self._ask(coordinator, asked, sealed[HERE])
        assert isinstance(signed, Signed), signed
        total.sign(HERE, bytes.fromhex(signed.signature))
        state, shares = part.release(state, total.signatures, sealed[THERE])
        total.share(THERE, shares)
        signatures = {site: each.hex() for site, each in total.signatures.items()}
        asked = Open(**coordinator.common(study), **of, signatures=signatures, payload=Payload.of(sealed[HERE]))
        released = coordinator.agent(messages.encode(asked, coordinator.key), sealed[HERE])
        assert isinstance(coordinator.read(released), Shares)
        total.share(HERE, released[1])
        return read(study, request.purpose, 2, 2, total.open())

    def _nothing(self, study: Study, terms: Terms, contribution: Any) -> bytes:
        found = b""
        for segment in terms.segments:
            vector = np.zeros(segment.length, dtype=ring.DTYPES[segment.bits])
            if segment.name == "update":
                fixed_point(study, 2).encode(np.zeros(segment.length, dtype=np.float32), vector)
            else:
                vector[0] = 1  # the weight, or that it counted
            prg.apply(vector, *contribution.mask_keys(segment))
            found += vector.tobytes()
        return found

    def _shake_hands(self, coordinator: Any, study: Study, answer: Advertised) -> None:
        keys = SessionKeys(self.seed, study.digest, coordinator.common(study)["roster"], THERE, self.identity)
        payload = encode_bundles({HERE: answer.bundle, THERE: keys.bundle})
        request = Handshake(**coordinator.common(study), payload=Payload.of(payload))
        _, body = coordinator.agent(messages.encode(request, coordinator.key), payload)
        sent = decode_encapsulated(body)[THERE]
        public = self._identities(coordinator)[HERE]
        self.secrets[study.digest] = keys.decapsulate(HERE, answer.bundle, sent, public)
        self.bundles[study.digest] = answer.bundle.agreement

    def _part(self, coordinator: Any, study: Study) -> SitePart:
        shared = {HERE: self.secrets.get(study.digest, bytes(32))}
        return SitePart(self.identity, self._identities(coordinator), 2, shared)

    @staticmethod
    def _stand_in(slot: Slot) -> Advert:
        return Advert.sign(slot, HERE, secrets.token_bytes(32), Identity.generate())

    @staticmethod
    def _identities(coordinator: Any) -> dict[str, PublicIdentity]:
        members = coordinator.home.roster().members
        return {member.site: PublicIdentity.from_hex(member.identity) for member in members}

    @staticmethod
    def _ask(coordinator: Any, request: Any, payload: bytes = b"") -> messages.Answer:
        header = messages.encode(request, coordinator.key)
        answer: messages.Answer = coordinator.read(coordinator.agent(header, payload))
        return answer
