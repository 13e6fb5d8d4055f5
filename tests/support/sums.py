"""A federation in memory: sites and a coordinator that follow the protocol, until a test makes one of them lie."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from consilium_shared.canonical import digest
from consilium_shared.identity import Identity
from consilium_shared.secagg import prg, ring
from consilium_shared.secagg.handshake import SessionKeys
from consilium_shared.secagg.server import ServerSum, Totals
from consilium_shared.secagg.site import Contribution, SitePart, SiteState
from consilium_shared.secagg.terms import Advert, Segment, Slot, Terms, corrupt
from consilium_shared.study import ThreatModel

SEGMENTS = (Segment(name="update", bits=32, length=6), Segment(name="counts", bits=64, length=2))
MODEL = digest(b"model")


class Whole:
    """Bytes as what has arrived."""

    def __init__(self, data: bytes) -> None:
        self.data, self.size = data, len(data)

    def pieces(self, size: int) -> Iterator[bytes]:
        return (self.data[start : start + size] for start in range(0, self.size, size))


def seed(*about: object) -> bytes:
    """32 bytes that follow from what they are for."""
    return bytes.fromhex(digest(repr(about).encode()))


def words(segment: Segment, *about: object) -> Any:
    """A vector of a segment's ring that follows from what it is for."""
    draw = np.random.default_rng(np.frombuffer(seed("vector", segment.name, *about), np.uint32))
    return draw.integers(0, 1 << segment.bits, segment.length, dtype=ring.DTYPES[segment.bits].newbyteorder("="))


class Federation:
    """Sites of one study, each with its keys and a secret with every other. They differ: every third adds no counts.

    Attributes:
        counting: those that offer counts.
        parts: site to its state machine.
        secrets: site to what it shares with each other.
    """

    def __init__(
        self,
        sites: int,
        threat_model: ThreatModel = "malicious-server",
        minimum: int = 2,
        handshake: bool = True,
        about: str = "one",
        tolerated: int | None = None,
    ) -> None:
        """``handshake``: the real one; else secrets from nowhere, which is faster. ``about``: which federation.
        ``tolerated``: how many of a cohort may lie, where the contract and the roster say so."""
        self.tolerated = tolerated
        self.names = tuple(f"site-{number:02}" for number in range(sites))
        self.threat_model, self.minimum, self.about = threat_model, minimum, about
        self.counting = frozenset(site for number, site in enumerate(self.names) if number % 3 != 2)
        self.identities = {site: Identity.generate() for site in self.names}
        self.public = {site: identity.public for site, identity in self.identities.items()}
        self.secrets: dict[str, dict[str, bytes]] = {site: {} for site in self.names}
        self.session = {site: self.session_keys(site) for site in self.names} if handshake else {}
        for low, high in itertools.combinations(self.names, 2):
            if handshake:
                sent, ours = self.session[low].encapsulate(high, self.session[high].bundle, self.public[high])
                theirs = self.session[high].decapsulate(low, self.session[low].bundle, sent, self.public[low])
            else:
                ours = theirs = seed(about, low, high)
            self.secrets[low][high], self.secrets[high][low] = ours, theirs
        self.parts = {site: self.part(site) for site in self.names}

    @property
    def corrupt(self) -> int:
        """How many sites may lie."""
        return corrupt(len(self.names), self.threat_model)

    def part(self, site: str, **changes: Any) -> SitePart:
        """A site's state machine."""
        about = {"minimum": self.minimum, "secrets": self.secrets[site], **changes}
        return SitePart(self.identities[site], self.public, **about)

    def session_keys(self, site: str, **changes: str) -> SessionKeys:
        """A site's keys for the study."""
        about = {"study": digest(b"study"), "roster": digest(self.about.encode()), **changes}
        return SessionKeys(seed("session", self.about, site), **about, site=site, identity=self.identities[site])

    def slot(self, **changes: Any) -> Slot:
        """The first attempt at the first round, but for the changes."""
        about = {"federation": digest(self.about.encode()), "study": digest(b"study"), "roster": digest(b"roster")}
        return Slot(**{**about, "purpose": "training", "round": 1, "attempt": 1, **changes})

    def sum(self, **changes: Any) -> Sum:
        """A sum for which every site has advertised; changes as ``Sum`` has them."""
        return Sum(self, **changes)


class Sum:
    """One attempt at a sum.

    Attributes:
        states: site to its state.
        vectors: site to what it adds, by segment.
        sent: site to the bytes of its contribution.
        total: the coordinator's end.
    """

    def __init__(
        self,
        federation: Federation,
        slot: Slot | None = None,
        cohort: Iterable[str] | None = None,
        signed: Mapping[str, tuple[int, ...]] | None = None,
        vectors: Mapping[str, dict[str, Any]] | None = None,
        model: str = MODEL,
        segments: tuple[Segment, ...] = SEGMENTS,
        counting: Iterable[str] | None = None,
    ) -> None:
        self.federation, self.slot = federation, slot or federation.slot()
        self.cohort = tuple(cohort or federation.names)
        self.counting = federation.counting if counting is None else frozenset(counting)
        self.states: dict[str, SiteState] = {}
        self.adverts: dict[str, Advert] = {}
        for site in self.cohort:
            secret = seed("slot", repr(self.slot), site)
            self.states[site], self.adverts[site] = federation.parts[site].advertise(
                self.slot, site, secret, signed=(signed or {}).get(site, ()), counts=site in self.counting
            )
        self.terms = self.terms_with(model=model, segments=segments)
        self.vectors: dict[str, dict[str, Any]] = dict(vectors or {}) or {
            site: self._vector(site, segments) for site in self.cohort
        }
        self.sent: dict[str, bytes] = {}
        self.total = ServerSum(self.terms, federation.public)

    def _vector(self, site: str, segments: tuple[Segment, ...]) -> dict[str, Any]:
        """What an honest site adds: where too few offer counts, or it offers none, zeros in their place."""
        vector = {each.name: words(each, site, self.slot.round) for each in segments}
        if not self.federation.parts[site].adds_counts(self.states[site], self.terms):
            vector.update({name: np.zeros_like(vector[name]) for name in vector if name == "counts"})
        return vector

    def terms_with(self, **changes: Any) -> Terms:
        """The terms of the sum, but for the changes."""
        about = {"slot": self.slot, "model": MODEL, "segments": SEGMENTS, "adverts": self.adverts}
        about["corrupt"] = self.federation.tolerated
        return Terms(**{**about, "threat_model": self.federation.threat_model, **changes})

    def mask(self, *sites: str, terms: Terms | None = None) -> None:
        """These sites (all, if none is named) agree, and send their vectors."""
        for site in sites or self.cohort:
            part = self.federation.parts[site]
            self.states[site], contribution = part.mask(self.states[site], terms or self.terms)
            self.sent[site] = masked(contribution, self.vectors[site])

    def fold(self, *sites: str) -> None:
        """The vectors of these sites (all, if none is named) arrive."""
        for site in sites or self.cohort:
            if site not in self.sent:
                self.mask(site)
            self.total.fold(site, Whole(self.sent[site]))

    def close(self, *sites: str) -> tuple[str, ...]:
        """The vectors of these sites arrive, and no others."""
        self.fold(*sites)
        return self.total.close(self.federation.minimum)

    def sign(self, *sites: str) -> None:
        """These survivors (all, if none is named) sign the set."""
        for site in sites or self.total.survivors:
            part, sealed = self.federation.parts[site], self.total.sealed_for(site)
            self.states[site], signature = part.sign(self.states[site], self.total.survivors, sealed)
            self.total.sign(site, signature)

    def release(self, *sites: str) -> None:
        """These survivors (all, if none is named) release their shares."""
        for site in sites or self.total.survivors:
            part, sealed = self.federation.parts[site], self.total.sealed_for(site)
            self.states[site], shares = part.release(self.states[site], self.total.signatures, sealed)
            self.total.share(site, shares)

    def opened(self, *sites: str) -> Totals:
        """The sum over these sites (all, if none is named), nobody lying from here on."""
        self.close(*sites)
        self.sign()
        self.release()
        return self.total.open()

    def plain(self, *sites: str) -> Totals:
        """The sum of what these sites (all, if none is named) have, without any mask."""
        chosen = [self.vectors[site] for site in sites or self.cohort]
        first = chosen[0]
        return {name: np.sum([each[name] for each in chosen], axis=0, dtype=first[name].dtype) for name in first}


def masked(contribution: Contribution, vector: Mapping[str, Any]) -> bytes:
    """What a site sends."""
    sent = b""
    for segment in contribution.terms.segments:
        copy = vector[segment.name].copy()
        prg.apply(copy, *contribution.mask_keys(segment))
        sent += copy.tobytes()
    return sent + contribution.trailer


def same(one: Totals, other: Totals) -> bool:
    """Whether two sums are the same integers."""
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
