"""One round of secure aggregation without a network: both state machines, and a site's vector piece by piece.

What is timed at a site is everything from its fresh keys to the shares that it releases, and at the server everything
from the advertisements to the mean. The handshake at a study's start is no part of a round.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from consilium_shared.identity import Identity
from consilium_shared.secagg import prg
from consilium_shared.secagg.ring import DTYPES, FixedPoint
from consilium_shared.secagg.server import ServerSum
from consilium_shared.secagg.site import Contribution, SitePart, SiteState
from consilium_shared.secagg.terms import Segment, Slot, Terms, threshold

PIECE_BYTES = 4 * prg.TILE
MAX_WEIGHT = 1000
THREAT_MODEL = "malicious-server"


class Round:
    """One round; afterwards its mean and its costs.

    Attributes:
        mean: float32 ``[d]``, the weighted mean of those who did not drop.
        server_s: seconds of the server.
        client_s: seconds of each site that did not drop, all steps together.
        path_s: the same, without what a site does while it trains: agreement, shares, and the masks themselves.
        bytes_up: of one site: masked vector, sealed shares and commitments, signature, released shares.
    """

    def __init__(self, update: np.ndarray, weights: list[int], dropped: int, bits: int = 32) -> None:
        """``update``: float32 ``[d]``, the same at every site; the last ``dropped`` sites leave before their upload.

        Raises:
            PeerError: fewer sites stay than the threshold.
        """
        self._seconds: dict[str, float] = {}
        names = [f"site-{number:03}" for number in range(len(weights))]
        staying = names[: len(names) - dropped]
        identities = {name: Identity.generate() for name in names}
        public = {name: identity.public for name, identity in identities.items()}
        secrets = {frozenset((one, other)): os.urandom(32) for one in names for other in names if one < other}
        parts = {
            name: SitePart(
                identities[name],
                public,
                2,
                {peer: secrets[frozenset((name, peer))] for peer in names if peer != name},
            )
            for name in names
        }
        slot = Slot(federation="0" * 64, study="1" * 64, roster="2" * 64, purpose="training", round=1, attempt=1)
        states: dict[str, SiteState] = {}
        adverts = {}
        for name in names:
            with self._timed(name):
                states[name], adverts[name] = parts[name].advertise(slot, name, os.urandom(32))
        with self._timed("server"):
            terms = Terms(
                slot=slot,
                model="3" * 64,
                segments=(
                    Segment(name="update", bits=bits, length=update.size),
                    Segment(name="integers", bits=64, length=1),
                ),
                threat_model=THREAT_MODEL,
                adverts=adverts,
            )
            terms.check(public)
            server = ServerSum(terms, public)
        encoding = FixedPoint(bits, len(names), 1.0)
        self.bytes_up = server.payload_bytes
        for name, weight in zip(staying, weights, strict=False):
            with self._timed(name, "ahead"):
                states[name], contribution = parts[name].mask(states[name], terms)
            upload = self._upload(name, update, weight, encoding, contribution)
            with self._timed("server"):
                server.fold(name, upload)
        with self._timed("server"):
            survivors = server.close(2)
            sealed = {name: server.sealed_for(name) for name in survivors}
        for name in survivors:
            with self._timed(name):
                states[name], signature = parts[name].sign(states[name], survivors, sealed[name])
            with self._timed("server"):
                server.sign(name, signature)
        signatures = server.signatures
        for name in survivors:
            with self._timed(name):
                states[name], shares = parts[name].release(states[name], signatures, sealed[name])
            with self._timed("server"):
                server.share(name, shares)
        self.bytes_up += len(signature) + len(shares)
        with self._timed("server"):
            totals = server.open()
            weight = int(totals["integers"].view(np.int64)[0])
            total = totals["update"]
            self.mean = total.view(np.float32) if bits == 32 else np.empty(total.size, np.float32)
            encoding.decode(total, self.mean, weight / MAX_WEIGHT)
        self.server_s = self._seconds["server"]
        self.path_s = [self._seconds[name] + self._seconds[name + " instead"] for name in staying]
        self.client_s = [self._seconds[name] + self._seconds[name + " ahead"] for name in staying]

    def _upload(
        self, name: str, update: np.ndarray, weight: int, encoding: FixedPoint, contribution: Contribution
    ) -> Upload:
        """Encode and mask piece by piece; where the masks are made ahead, the path has an addition instead."""
        upload, nothing = Upload(), np.zeros(PIECE_BYTES, np.uint8)
        of_update, of_integers = contribution.terms.segments
        with self._timed(name, "ahead"):
            plus, minus = contribution.mask_keys(of_update)
        dtype = DTYPES[of_update.bits]
        step, size = PIECE_BYTES // dtype.itemsize, PIECE_BYTES // prg.TILE
        for number, start in enumerate(range(0, of_update.length, step)):
            with self._timed(name):
                values = update[start : start + step]
                piece = np.empty(values.size, dtype)
                encoding.encode(values, piece, weight / MAX_WEIGHT)
            with self._timed(name, "ahead"):
                prg.apply(piece, plus, minus, first_tile=number * size)
            with self._timed(name, "instead"):
                piece += nothing.view(dtype)[: piece.size]
            with self._timed(name):
                upload.append(piece.tobytes())
        with self._timed(name):
            integers = np.array([weight], np.uint64)
            prg.apply(integers, *contribution.mask_keys(of_integers))
            upload.append(integers.tobytes())
            upload.append(contribution.trailer)
        return upload

    @contextmanager
    def _timed(self, who: str, when: str = "") -> Iterator[None]:
        start = time.process_time()
        yield
        key = f"{who} {when}".strip()
        self._seconds[key] = self._seconds.get(key, 0.0) + time.process_time() - start


class Upload:
    """A site's vector as it arrived, in memory."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def append(self, part: bytes) -> None:
        """Bytes as they are sent."""
        self._parts.append(part)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(map(len, self._parts))

    def pieces(self, size: int) -> Iterator[bytes]:
        """In pieces of ``size`` bytes, the last one shorter; what was sent in such pieces is not copied."""
        rest = b""
        for part in self._parts:
            rest = rest + part if rest else part
            while len(rest) >= size:
                yield rest[:size]
                rest = rest[size:]
        if rest:
            yield rest


def possible(sites: int, dropped: int) -> bool:
    """Whether enough sites stay."""
    return sites - dropped >= threshold(sites, THREAT_MODEL)
