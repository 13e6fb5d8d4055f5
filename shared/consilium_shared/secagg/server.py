"""The coordinator's part in one secure sum, as a pure state machine: it adds up masked vectors and opens only the sum.

    taking vectors ──close──► taking signatures ──► taking shares ──open──► the sum

One running total, whatever the number of sites; a vector is added piece by piece, and only when it is whole. A method
that raises PeerError has changed nothing; after another error (the disk's) the object is of no use any more.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from consilium_shared.errors import IntegrityError, PeerError
from consilium_shared.identity import PublicIdentity
from consilium_shared.secagg import keys, prg, ring, shamir
from consilium_shared.secagg.keys import KEY_BYTES
from consilium_shared.secagg.site import commitment, sealed_bytes, trailer_bytes
from consilium_shared.secagg.terms import SURVIVORS_DOMAIN, Terms

PIECE_BYTES = 1 << 20
"""Bytes of a vector that are added at a time."""

SUBSETS = 10_000
"""Sets of shares that are tried before a sum is given up: some sites' shares may be wrong. It finds 6 wrong ones of
20 sites and 5 of 100; that takes at most half a minute."""

Totals = dict[str, npt.NDArray[np.unsignedinteger[Any]]]
"""Segment's name to its integers modulo 2^bits."""


class Received(Protocol):
    """A vector that has arrived whole, wherever it lies."""

    @property
    def size(self) -> int:
        """Bytes."""

    def pieces(self, size: int) -> Iterator[bytes]:
        """All of it from the beginning, in pieces of ``size`` bytes, the last one shorter."""


class ServerSum:
    """One sum under way. Every method raises PeerError for what is not allowed now, or is not what honest sites send.

    Attributes:
        terms: of the sum.
        survivors: the sites in the sum: so far, or after ``close`` for ever, sorted.
    """

    def __init__(
        self, terms: Terms, identities: Mapping[str, PublicIdentity], survivors: tuple[str, ...] | None = None
    ) -> None:
        """
        Args:
            identities: site to identity key, of the pinned roster.
            survivors: after a restart, the set that was closed: the same vectors are taken again, and no others.
        """
        self.terms = terms
        self.survivors: tuple[str, ...] = ()
        self._wanted = set(terms.cohort if survivors is None else survivors)
        self._identities = identities
        self._closed = self._opened = False
        self._totals: Totals = {s.name: np.zeros(s.length, dtype=ring.DTYPES[s.bits]) for s in terms.segments}
        self._trailers: dict[str, bytes] = {}
        self._signatures: dict[str, bytes] = {}
        self._shares: dict[str, bytes] = {}

    @property
    def payload_bytes(self) -> int:
        """Bytes of what each site sends: its masked vector and ``site.Contribution.trailer``."""
        return self.terms.masked_bytes + trailer_bytes(self.terms)

    def fold(self, site: str, received: Received) -> None:
        """Add one site's masked vector and keep its sealed shares."""
        if self._closed:
            raise PeerError("the set of survivors is closed")
        if site not in self._wanted or site in self._trailers:
            raise PeerError("not in the cohort, or in the sum already")
        if received.size != self.payload_bytes:
            raise PeerError(f"a contribution has {self.payload_bytes} bytes, this one {received.size}")
        reader = _Reader(received)
        for segment in self.terms.segments:
            total = self._totals[segment.name]
            step = PIECE_BYTES // total.itemsize
            for start in range(0, segment.length, step):
                piece = total[start : start + step]
                np.add(piece, np.frombuffer(reader.take(piece.nbytes), dtype=total.dtype), out=piece)
        self._trailers[site] = reader.take(trailer_bytes(self.terms))
        self.survivors = tuple(sorted(self._trailers))

    def missing(self) -> tuple[str, ...]:
        """Sites whose vectors are waited for."""
        return tuple(sorted(self._wanted - set(self._trailers)))

    def close(self, minimum: int) -> tuple[str, ...]:
        """Take no more vectors; the set is final. ``minimum``: fewest sites, and fewest whose counts are added up."""
        minimum = max(minimum, self.terms.least)
        least = max(self.terms.threshold, minimum)
        if len(self.survivors) < least:
            raise PeerError(f"{len(self.survivors)} sites have answered, and at least {least} are needed")
        self.terms.check_counts(self.survivors, minimum)
        self._closed = True
        return self.survivors

    def sealed_for(self, site: str) -> bytes:
        """The shares that the other survivors sealed to this one, in order."""
        if not self._closed or site not in self.survivors:
            raise PeerError("not a survivor of a closed set")
        size, cohort = sealed_bytes(self.terms), self.terms.cohort
        found = []
        for sender in self.survivors:
            if sender != site:
                place = cohort.index(site) - (cohort.index(site) > cohort.index(sender))
                found.append(self._trailers[sender][place * size : (place + 1) * size])
        return b"".join(found)

    def sign(self, site: str, signature: bytes) -> None:
        """Keep a survivor's signature over the set."""
        if not self._closed or site not in self.survivors:
            raise PeerError("not a survivor of a closed set")
        self._identities[site].verify(SURVIVORS_DOMAIN, self.terms.survivors_signed(self.survivors), signature)
        self._signatures[site] = signature

    @property
    def signatures(self) -> dict[str, bytes]:
        """Survivor to its signature over the set, in order; ``share`` needs those of the threshold."""
        return {site: self._signatures[site] for site in sorted(self._signatures)}

    def share(self, site: str, shares: bytes) -> None:
        """Keep what a survivor released."""
        if len(self._signatures) < self.terms.threshold or site not in self.survivors:
            raise PeerError("shares of a set that is not signed by enough, or by no survivor")
        expected = KEY_BYTES * len(self.survivors) * (1 + len(self._gone()))
        if len(shares) != expected:
            raise PeerError(f"a survivor's shares have {expected} bytes, these {len(shares)}")
        self._shares[site] = shares

    @property
    def sharers(self) -> tuple[str, ...]:
        """Survivors whose shares are here; ``open`` needs the threshold's number, and more where some are wrong."""
        return tuple(sorted(self._shares))

    def open(self) -> Totals:
        """The sums of all segments, once; they are this object's no longer.

        Raises:
            PeerError: too few shares, or no set of them gives the seeds that were committed to; nothing was opened.
        """
        if self._opened:
            raise PeerError("opened already")
        seeds = self._seeds()
        self._opened = True
        gone = self._gone()
        for segment in self.terms.segments:
            added: list[bytes] = []
            subtracted: list[bytes] = []
            for site in self.survivors:
                own, *paired = (keys.derive(seed, "mask", self.terms.digest, segment.name) for seed in seeds[site])
                added.append(own)
                for peer, key in zip(gone, paired, strict=True):
                    (added if site < peer else subtracted).append(key)
            prg.apply(self._totals[segment.name], plus=subtracted, minus=added)
        return self._totals

    def _gone(self) -> list[str]:
        return [site for site in self.terms.cohort if site not in self.survivors]

    def _seeds(self) -> dict[str, list[bytes]]:
        """Survivor to the seed of its self mask and those shared with each site that is gone; each as committed to."""
        found: dict[str, list[bytes]] = {}
        size = KEY_BYTES * (1 + len(self._gone()))
        for holders in self._subsets():
            secrets = shamir.combine({self.terms.point(holder): self._shares[holder] for holder in holders})
            for place, site in enumerate(self.survivors):
                ends = range(place * size, (place + 1) * size, KEY_BYTES)
                seeds = [secrets[at : at + KEY_BYTES] for at in ends]
                if site not in found and self._as_committed(site, seeds):
                    found[site] = seeds
            if len(found) == len(self.survivors):
                return found
        wrong = ", ".join(site for site in self.survivors if site not in found)
        raise PeerError(f"no {self.terms.threshold} shares give the seeds that were committed to by: {wrong}")

    def _as_committed(self, site: str, seeds: list[bytes]) -> bool:
        cohort, trailer = self.terms.cohort, self._trailers[site]
        commitments = trailer[-KEY_BYTES * len(cohort) :]
        for peer, seed in zip([site, *self._gone()], seeds, strict=True):
            place = cohort.index(peer) * KEY_BYTES
            if commitments[place : place + KEY_BYTES] != commitment(self.terms, site, peer, seed):
                return False
        return True

    def _subsets(self) -> Iterator[tuple[str, ...]]:
        """Sets of as many holders of shares as it takes, the first ones first, then others at random."""
        holders, needed = list(self.sharers), self.terms.threshold
        if len(holders) < needed:
            raise PeerError(f"{len(holders)} sites have released shares, and {needed} are needed")
        if math.comb(len(holders), needed) <= SUBSETS:
            yield from itertools.combinations(holders, needed)
            return
        yield tuple(holders[:needed])
        choose = random.Random(self.terms.digest)  # noqa: S311 - which shares are tried is no secret
        for _ in range(SUBSETS):
            yield tuple(sorted(choose.sample(holders, needed)))


class _Reader:
    """Cuts what arrives in pieces of one size into parts of others."""

    def __init__(self, received: Received) -> None:
        self._pieces = received.pieces(PIECE_BYTES)
        self._rest = b""

    def take(self, size: int) -> bytes:
        if not self._rest:
            self._rest = self._next()
        if len(self._rest) == size:  # nearly always: nothing is copied
            taken, self._rest = self._rest, b""
            return taken
        while len(self._rest) < size:
            self._rest += self._next()
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def _next(self) -> bytes:
        piece = next(self._pieces, b"")
        if not piece:
            raise IntegrityError("a vector that had arrived cannot be read to its end; the sum must be made again")
        return piece
