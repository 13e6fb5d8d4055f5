"""Handshake: once a study, each pair of sites agrees on a secret that a later quantum computer cannot recover.

X25519 and ML-KEM-768 (FIPS 203) together: the secret holds as long as one of them does. It goes into every seed that
the two share, so whoever records a study's messages today cannot unmask them when X25519 is broken one day. The
signatures are Ed25519: they need to hold only while the study runs.

    both      publish signed keys (``Bundle``)
    lower     (of the two names) encapsulates to the higher one's key, signs that (``Encapsulated``)
    higher    opens it
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Annotated, Any

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from pydantic import AfterValidator, Field, TypeAdapter

from consilium_shared import limits
from consilium_shared.canonical import canonical_bytes, canonical_digest, parse_canonical
from consilium_shared.config import Strict, validated
from consilium_shared.documents import signature_bytes
from consilium_shared.errors import PeerError
from consilium_shared.fields import Hex32, Hex64, Name
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.secagg import keys

BUNDLE_DOMAIN = "secagg-bundle"
ENCAPSULATION_DOMAIN = "secagg-encapsulation"
PUBLIC_BYTES = 1184
CIPHERTEXT_BYTES = 1088
SEED_BYTES = 32


def _base64_of(length: int) -> AfterValidator:
    def check(text: str) -> str:
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError("not base64") from error
        if len(data) != length or base64.b64encode(data).decode() != text:
            raise ValueError(f"not {length} bytes in base64")
        return text

    return AfterValidator(check)


class Bundle(Strict):
    """A site's public keys for one study."""

    agreement: Hex32
    """X25519."""
    encapsulation: Annotated[str, Field(max_length=2 * PUBLIC_BYTES), _base64_of(PUBLIC_BYTES)]
    """ML-KEM-768 encapsulation key, base64."""
    signature: Hex64

    @property
    def digest(self) -> str:
        """SHA-256 of the whole, 64 hex digits: with which keys a secret was agreed."""
        return canonical_digest(self.model_dump(mode="json"))

    def verify(self, study: str, roster: str, site: str, public: PublicIdentity) -> None:
        """Verify that ``site``, with this identity, made the bundle for this study and roster.

        Raises:
            SignatureError: it did not.
            PeerError: a key is of no use.
        """
        signed = _bundled(study, roster, site, self.agreement, self.encapsulation)
        public.verify(BUNDLE_DOMAIN, signed, signature_bytes(self.signature))
        keys.check_public(bytes.fromhex(self.agreement))
        self.encapsulation_key()

    def encapsulation_key(self) -> MLKEM768PublicKey:
        """The ML-KEM-768 key; raises PeerError for one of no use."""
        try:
            return MLKEM768PublicKey.from_public_bytes(base64.b64decode(self.encapsulation))
        except ValueError as error:
            raise PeerError("an ML-KEM key of no use") from error


class Encapsulated(Strict):
    """Encapsulated secret, from the lower to the higher of two sites by name."""

    ciphertext: Annotated[str, Field(max_length=2 * CIPHERTEXT_BYTES), _base64_of(CIPHERTEXT_BYTES)]
    """ML-KEM-768, base64."""
    signature: Hex64

    def verify(
        self, study: str, roster: str, low: tuple[str, Bundle], high: tuple[str, Bundle], public: PublicIdentity
    ) -> str:
        """The digest of all that the two have said; raises SignatureError unless the lower one, with this identity,
        made this for the higher one, with these keys."""
        transcript = _transcript(study, roster, low, high, self.ciphertext)
        public.verify(ENCAPSULATION_DOMAIN, transcript.encode(), signature_bytes(self.signature))
        return transcript


class SessionKeys:
    """One site's private keys for one study; both follow from a secret seed."""

    def __init__(self, seed: bytes, study: str, roster: str, site: str, identity: Identity) -> None:
        """``seed``: 32 secret bytes, for this study alone. ``study``, ``roster``: their digests."""
        if len(seed) != SEED_BYTES:
            raise ValueError(f"a seed has {SEED_BYTES} bytes")
        self._study, self._roster, self._site, self._identity = study, roster, site, identity
        self._agreement = keys.private_key(seed, "session-agreement")
        self._encapsulation = MLKEM768PrivateKey.from_seed_bytes(keys.stream(seed, 64, "session-encapsulation"))
        agreement = self._agreement.public_key().public_bytes_raw().hex()
        encapsulation = base64.b64encode(self._encapsulation.public_key().public_bytes_raw()).decode()
        signed = _bundled(study, roster, site, agreement, encapsulation)
        self.bundle = Bundle(
            agreement=agreement,
            encapsulation=encapsulation,
            signature=identity.sign(BUNDLE_DOMAIN, signed).hex(),
        )
        """The public half, always the same bytes."""

    def encapsulate(self, peer: str, bundle: Bundle, public: PublicIdentity) -> tuple[Encapsulated, bytes]:
        """Encapsulation for a peer of a higher name, and the 32-byte secret shared with it: fresh at every call.

        Raises:
            PeerError: the peer's name is not the higher one, or its key is of no use.
            SignatureError: the bundle is not the peer's.
        """
        if not self._site < peer:
            raise PeerError(f"the lower of two sites encapsulates, and {peer} is not above {self._site}")
        bundle.verify(self._study, self._roster, peer, public)
        shared, ciphertext = bundle.encapsulation_key().encapsulate()
        text = base64.b64encode(ciphertext).decode()
        transcript = _transcript(self._study, self._roster, (self._site, self.bundle), (peer, bundle), text)
        signature = self._identity.sign(ENCAPSULATION_DOMAIN, transcript.encode()).hex()
        return Encapsulated(ciphertext=text, signature=signature), self._secret(bundle, shared, transcript)

    def decapsulate(self, peer: str, bundle: Bundle, sent: Encapsulated, public: PublicIdentity) -> bytes:
        """The secret shared with a peer of a lower name, from what it sent.

        Raises:
            PeerError: the peer's name is not the lower one.
            SignatureError: the bundle or the encapsulation is not the peer's, or was made for other keys.
        """
        if not peer < self._site:
            raise PeerError(f"the lower of two sites encapsulates, and {peer} is not below {self._site}")
        bundle.verify(self._study, self._roster, peer, public)
        transcript = sent.verify(self._study, self._roster, (peer, bundle), (self._site, self.bundle), public)
        return self._secret(bundle, self._encapsulation.decapsulate(base64.b64decode(sent.ciphertext)), transcript)

    def _secret(self, bundle: Bundle, shared: bytes, transcript: str) -> bytes:
        agreed = keys.agree(self._agreement, bytes.fromhex(bundle.agreement))
        return keys.derive(agreed + shared, "session-secret", transcript)


_bundles = TypeAdapter(Annotated[dict[Name, Bundle], Field(max_length=limits.SITES)])
_encapsulated = TypeAdapter(Annotated[dict[Name, Encapsulated], Field(max_length=limits.SITES)])


def encode_bundles(bundles: Mapping[str, Bundle]) -> bytes:
    """Site to its keys, as bytes for the wire."""
    return canonical_bytes(_bundles.dump_python(dict(bundles), mode="json"))


def decode_bundles(payload: bytes) -> dict[str, Bundle]:
    """The inverse of ``encode_bundles``, nothing verified yet; raises PeerError for anything else."""
    found: dict[str, Bundle] = _decoded(_bundles, payload)
    return found


def encode_encapsulated(encapsulated: Mapping[str, Encapsulated]) -> bytes:
    """Site to what it is sent, as bytes for the wire."""
    return canonical_bytes(_encapsulated.dump_python(dict(encapsulated), mode="json"))


def decode_encapsulated(payload: bytes) -> dict[str, Encapsulated]:
    """The inverse of ``encode_encapsulated``, nothing verified yet; raises PeerError for anything else."""
    found: dict[str, Encapsulated] = _decoded(_encapsulated, payload)
    return found


def _decoded(adapter: TypeAdapter[Any], payload: bytes) -> Any:
    if len(payload) > limits.HEADER_BYTES:
        raise PeerError(f"keys of {len(payload)} bytes, more than {limits.HEADER_BYTES}")
    return validated(adapter, parse_canonical(payload))


def _bundled(study: str, roster: str, site: str, agreement: str, encapsulation: str) -> bytes:
    about = {"study": study, "roster": roster, "site": site}
    return canonical_bytes({**about, "agreement": agreement, "encapsulation": encapsulation})


def _transcript(study: str, roster: str, low: tuple[str, Bundle], high: tuple[str, Bundle], ciphertext: str) -> str:
    ends = [[site, bundle.agreement, bundle.encapsulation] for site, bundle in (low, high)]
    return canonical_digest({"study": study, "roster": roster, "ends": ends, "ciphertext": ciphertext})
