"""A site's part in one secure sum, as a pure state machine: state and message in, state and answer out.

No clock, no files, no randomness of its own: everything secret in a slot follows from one seed that the caller gives,
so a state of a few kilobytes is all that a restart needs, and the same message gets the same bytes.

    advertised ──mask──► masked ──sign──► signed ──release──► released
         ╰────abandon────────┴──► abandoned

Double masking after Bonawitz et al. 2017 (protocol 4) with two changes: the seeds of this slot are shared, never a
private key, so that the shares travel with the masked vector; and every share is committed to, so that a wrong one is
found. A site signs one set of survivors in a slot, ever, and releases shares only for a set that enough others signed.
Of one peer it gives either its share of the self mask's seed (survivor) or of the pairwise seeds (gone), never both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import ValidationError

from consilium_shared.canonical import canonical_bytes, digest, parse_canonical
from consilium_shared.config import Strict
from consilium_shared.errors import IntegrityError, PeerError
from consilium_shared.fields import Hex32, Name
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.secagg import keys, shamir
from consilium_shared.secagg.keys import KEY_BYTES, TAG_BYTES
from consilium_shared.secagg.terms import SURVIVORS_DOMAIN, Advert, Segment, Slot, Terms

Stage = Literal["advertised", "masked", "signed", "released", "abandoned"]


class SiteState(Strict):
    """State of one slot, which a site must not lose. ``to_bytes`` has the secret seed: for the site's store alone."""

    slot: Slot
    site: Name
    seed: Hex32
    """Secret. Everything random in the slot follows from it."""
    signed: tuple[int, ...]
    """Earlier attempts in which this site has signed (``Advert``)."""
    counts: bool
    stage: Stage
    terms: Terms | None = None
    """Terms agreed to, from ``masked`` on; of an abandoned attempt, if it had come so far."""
    survivors: tuple[Name, ...] | None = None
    """Set of survivors that was signed, from ``signed`` on."""
    result: Hex32 | None = None
    """SHA-256 of the result that these masks hide, with its weight. They hide no other: masked twice, two results would
    show their difference."""
    counted: bool | None = None
    """True where its counts are under these masks, False for zeros; None where nothing is, and in older states."""

    def __repr__(self) -> str:
        return f"SiteState({self.slot.purpose} {self.slot.round}.{self.slot.attempt}, {self.stage}, seed hidden)"

    __str__ = __repr__

    def to_bytes(self) -> bytes:
        """The state as canonical JSON."""
        return canonical_bytes(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls, data: bytes) -> SiteState:
        """The inverse of ``to_bytes``; raises IntegrityError for anything else."""
        try:
            state = cls.model_validate(parse_canonical(data))
        except (PeerError, ValidationError) as error:
            raise IntegrityError("the state of a secure sum is damaged") from error
        signed = state.stage in ("signed", "released")
        if state.stage != "abandoned" and (state.stage != "advertised") != (state.terms is not None):
            raise IntegrityError("the state of a secure sum contradicts itself")
        if signed != (state.survivors is not None):
            raise IntegrityError("the state of a secure sum contradicts itself")
        return state


@dataclass(frozen=True)
class Contribution:
    """Data that a site sends under the terms of a sum besides the vector, and the keys that mask the vector.

    Attributes:
        terms: of the sum.
        trailer: for each other site of the cohort, in order, the share of every seed sealed to it; then for each site
            of the cohort a commitment to the seed shared with it (for itself: of the self mask).
    """

    terms: Terms
    trailer: bytes
    _plus: tuple[bytes, ...] = field(repr=False)
    _minus: tuple[bytes, ...] = field(repr=False)

    def mask_keys(self, segment: Segment) -> tuple[list[bytes], list[bytes]]:
        """Keys whose keystreams (``prg.apply``) are added to the encoded segment, and those that are subtracted."""
        name, about = segment.name, self.terms.digest
        plus = [keys.derive(seed, "mask", about, name) for seed in self._plus]
        return plus, [keys.derive(seed, "mask", about, name) for seed in self._minus]


def sealed_bytes(terms: Terms) -> int:
    """Bytes of the sealed shares from one site to another."""
    return KEY_BYTES * len(terms.cohort) + TAG_BYTES


def trailer_bytes(terms: Terms) -> int:
    """Bytes of ``Contribution.trailer``."""
    others = len(terms.cohort) - 1
    return others * sealed_bytes(terms) + KEY_BYTES * len(terms.cohort)


def commitment(terms: Terms, one: str, other: str, seed: bytes) -> bytes:
    """32 bytes that bind to a seed and, since it is random, tell nothing of it; for a self mask both names are one."""
    about = [terms.digest, min(one, other), max(one, other), seed.hex()]
    return bytes.fromhex(digest(canonical_bytes(["consilium-secagg/1", "commitment", *about])))


class SitePart:
    """Transitions of a site's state. Each returns the next state and what to send; one that raises changes nothing.

    Every method raises PeerError for a message that is not allowed in this state, or is not what honest peers send.
    """

    def __init__(
        self,
        identity: Identity,
        identities: Mapping[str, PublicIdentity],
        minimum: int,
        secrets: Mapping[str, bytes],
        honest: int = 1,
    ) -> None:
        """
        Args:
            identity: this site's signing key.
            identities: site to identity key, of the pinned roster.
            minimum: fewest sites whose vectors may be added up; of the contract or of this site's policy, the larger.
                Where the terms ask for more (``Terms.least``), that holds.
            honest: number of honest sites whose noise together is the whole; no sum is masked, signed or opened that
                need not hold theirs (``Terms.check_shares``).
            secrets: peer to the 32 bytes that ``handshake`` gave; a cohort with a site that is missing here is refused.
        """
        self._identity, self._identities, self.minimum, self._secrets = identity, identities, minimum, secrets
        self._honest = honest

    def advertise(
        self, slot: Slot, site: str, seed: bytes, *, signed: tuple[int, ...] = (), counts: bool = False
    ) -> tuple[SiteState, Advert]:
        """Make fresh keys for a slot, and promise to sign survivors in no earlier attempt but those ``signed``.

        Args:
            seed: 32 secret bytes that were never used before.
            signed, counts: as in ``Advert``.
        """
        if len(seed) != KEY_BYTES:
            raise ValueError(f"a seed has {KEY_BYTES} bytes")
        state = SiteState(slot=slot, site=site, seed=seed.hex(), signed=signed, counts=counts, stage="advertised")
        return state, self.advert(state)

    def advert(self, state: SiteState) -> Advert:
        """Advertisement that ``advertise`` sent: the same bytes."""
        public = _private(state).public_key().public_bytes_raw()
        return Advert.sign(state.slot, state.site, public, self._identity, signed=state.signed, counts=state.counts)

    def mask(self, state: SiteState, terms: Terms) -> tuple[SiteState, Contribution]:
        """Agree to a sum. In ``masked`` and after, the same terms again give the same contribution."""
        if state.stage == "abandoned":
            raise PeerError("this attempt was abandoned")
        if state.terms is not None:
            if state.terms != terms:
                raise PeerError("these keys were used for another sum")
            return state, self._contribution(state, terms)
        if terms.slot != state.slot:
            raise PeerError("a sum for another slot than these keys were advertised for")
        if terms.adverts.get(state.site) != self.advert(state):
            raise PeerError("the cohort has not this site's advertisement as it was sent")
        least = self._least(terms)
        if len(terms.cohort) < least:
            raise PeerError(f"{len(terms.cohort)} sites, fewer than the {least} whose sum may be seen")
        terms.check_shares(max(terms.threshold, least), self._honest)
        terms.check(self._identities)
        missing = [peer for peer in terms.cohort if peer != state.site and peer not in self._secrets]
        if missing:
            raise PeerError(f"no handshake with {', '.join(missing)}")
        return _next(state, stage="masked", terms=terms), self._contribution(state, terms)

    def bind(self, state: SiteState, result: str, *, counted: bool) -> SiteState:
        """Bind the masks to one result, before the first masked byte is sent; the same result again changes nothing.

        Args:
            result: SHA-256 of what the update, the weight and the counts are read from.
            counted: whether those counts are masked, or zeros in their place.
        """
        _terms(state, "masked", "signed", "released")
        if state.result is None:
            return _next(state, result=result, counted=counted)
        if (state.result, state.counted) != (result, counted):
            raise PeerError("these masks were used for another result, or for other counts")
        return state

    def adds_counts(self, state: SiteState, terms: Terms) -> bool:
        """True where this site adds counts under these terms: it has offered them, and so have enough others."""
        return state.counts and terms.adds_counts(self._least(terms))

    def sign(self, state: SiteState, survivors: tuple[str, ...], sealed: bytes) -> tuple[SiteState, bytes]:
        """Sign the set of sites whose vectors are in the sum, once every one's shares for this site are at hand.

        Args:
            survivors: sorted by name.
            sealed: the shares sealed to this site, of each other survivor in order.

        Returns:
            The signature, 64 bytes; for the same set again the same.
        """
        terms = _terms(state, "masked", "signed", "released")
        if state.survivors is not None and survivors != state.survivors:
            raise PeerError("another set of survivors was signed here")
        if list(survivors) != sorted(set(survivors)) or not set(survivors) <= set(terms.cohort):
            raise PeerError("a set of survivors is sorted, each once, and within the cohort")
        if state.site not in survivors:
            raise PeerError("this site is said to be gone, and was asked")
        least = max(terms.threshold, self._least(terms))
        if len(survivors) < least:
            raise PeerError(f"{len(survivors)} survivors, and at least {least} are needed")
        terms.check_shares(len(survivors), self._honest)
        terms.check_counts(survivors, self._least(terms))
        self._unsealed(state, terms, survivors, sealed, self._agreed(state, terms))
        signature = self._identity.sign(SURVIVORS_DOMAIN, terms.survivors_signed(survivors))
        if state.stage != "masked":
            return state, signature
        return _next(state, stage="signed", survivors=survivors), signature

    def release(self, state: SiteState, signatures: Mapping[str, bytes], sealed: bytes) -> tuple[SiteState, bytes]:
        """Shares of this site that open the sum over the set that it signed, and nothing else.

        Args:
            signatures: survivor to its signature over the set; of at least the threshold.
            sealed: as for ``sign``.

        Returns:
            For each survivor in order, 32 bytes each: the share of its self mask's seed, then of its seeds with each
            site that is gone, in order.
        """
        terms = _terms(state, "signed", "released")
        survivors = state.survivors or ()
        if len(signatures) < terms.threshold:
            raise PeerError(f"{len(signatures)} signatures over the survivors, and {terms.threshold} are needed")
        terms.check_shares(len(survivors), self._honest)
        signed = terms.survivors_signed(survivors)
        for site, signature in signatures.items():
            if site not in survivors:
                raise PeerError(f"{site} signed a set of survivors that it is not in")
            self._identities[site].verify(SURVIVORS_DOMAIN, signed, signature)
        agreed = self._agreed(state, terms)
        shares = self._unsealed(state, terms, survivors, sealed, agreed)
        own = self._shares(state, terms, self._seeds(state, terms, agreed))
        shares[state.site] = own[terms.point(state.site)]
        gone = [terms.cohort.index(site) for site in terms.cohort if site not in survivors]
        wanted = {site: [terms.cohort.index(site), *gone] for site in survivors}
        answer = b"".join(
            shares[site][KEY_BYTES * place : KEY_BYTES * (place + 1)] for site in survivors for place in wanted[site]
        )
        return (state if state.stage == "released" else _next(state, stage="released")), answer

    def abandon(self, state: SiteState) -> SiteState:
        """Promise never to sign a set of survivors in this slot; not after one was signed."""
        if state.stage in ("signed", "released"):
            raise PeerError("this site has signed a set of survivors in this attempt")
        return _next(state, stage="abandoned")

    def _least(self, terms: Terms) -> int:
        return max(self.minimum, terms.least)

    # -- what follows from a seed and the terms

    def _agreed(self, state: SiteState, terms: Terms) -> dict[str, bytes]:
        """Other site of the cohort to what only the two know: this slot's agreement and the study's secret."""
        private, found = _private(state), {}
        for peer, advert in terms.adverts.items():
            if peer != state.site:
                with _said_of(peer):
                    found[peer] = keys.agree(private, bytes.fromhex(advert.key)) + self._secrets[peer]
        return found

    def _seeds(self, state: SiteState, terms: Terms, agreed: Mapping[str, bytes]) -> dict[str, bytes]:
        """Site of the cohort to the seed that is shared with it; for this site, of the self mask."""
        own, about = keys.derive(bytes.fromhex(state.seed), "self", terms.digest), ("pair", terms.digest)
        return {
            peer: own
            if peer == state.site
            else keys.derive(agreed[peer], *about, min(peer, state.site), max(peer, state.site))
            for peer in terms.cohort
        }

    def _shares(self, state: SiteState, terms: Terms, seeds: Mapping[str, bytes]) -> dict[int, bytes]:
        """Point of each site of the cohort to its share of all this site's seeds, one after the other."""
        secret = b"".join(seeds[site] for site in terms.cohort)
        length = len(secret) * (terms.threshold - 1)
        randomness = keys.stream(bytes.fromhex(state.seed), length, "shares", terms.digest)
        return shamir.split(secret, terms.threshold, range(1, len(terms.cohort) + 1), randomness)

    def _contribution(self, state: SiteState, terms: Terms) -> Contribution:
        agreed = self._agreed(state, terms)
        seeds = self._seeds(state, terms, agreed)
        shares = self._shares(state, terms, seeds)
        sealed = b""
        for peer, secret in agreed.items():
            key = keys.derive(secret, "share", terms.digest, state.site, peer)
            sealed += keys.seal(key, shares[terms.point(peer)], _about(terms, state.site, peer))
        commitments = b"".join(commitment(terms, state.site, peer, seeds[peer]) for peer in terms.cohort)
        return Contribution(
            terms=terms,
            trailer=sealed + commitments,
            _plus=tuple(seeds[peer] for peer in terms.cohort if peer >= state.site),
            _minus=tuple(seeds[peer] for peer in terms.cohort if peer < state.site),
        )

    def _unsealed(
        self, state: SiteState, terms: Terms, survivors: tuple[str, ...], sealed: bytes, agreed: Mapping[str, bytes]
    ) -> dict[str, bytes]:
        """Other survivor to its share for this site."""
        others, size = [site for site in survivors if site != state.site], sealed_bytes(terms)
        if len(sealed) != size * len(others):
            raise PeerError("not exactly the sealed shares of the other survivors")
        found = {}
        for number, peer in enumerate(others):
            key = keys.derive(agreed[peer], "share", terms.digest, peer, state.site)
            text = sealed[number * size : (number + 1) * size]
            with _said_of(peer):
                found[peer] = keys.unseal(key, text, _about(terms, peer, state.site))
        return found


@contextmanager
def _said_of(peer: str) -> Iterator[None]:
    try:
        yield
    except PeerError as error:
        raise PeerError(f"{peer}: {error}") from error


def _private(state: SiteState) -> X25519PrivateKey:
    return keys.private_key(bytes.fromhex(state.seed), "agreement")


def _terms(state: SiteState, *stages: Stage) -> Terms:
    if state.stage not in stages or state.terms is None:
        raise PeerError(f"not in an attempt that is {state.stage}")
    return state.terms


def _next(state: SiteState, **changes: object) -> SiteState:
    return SiteState.model_validate({**{name: getattr(state, name) for name in SiteState.model_fields}, **changes})


def _about(terms: Terms, sender: str, receiver: str) -> bytes:
    return canonical_bytes([terms.digest, sender, receiver])
