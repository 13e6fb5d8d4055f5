"""Every message between the coordinator and a site: fields, sizes, who signs; strict decoding.

A message is a header (canonical JSON, signed) and a payload (raw bytes: a model, an update, counts) whose length and
SHA-256 stand in the header. Nothing in a request changes when it is asked again, so the same question is the same
bytes, and a site can answer it again with the same bytes.

The messages of a study are of the protocol with the number of its contract's schema, and an answer is of its request's:
who approved a contract can read them (``schema.py``). Protocol 1 is that of release 0.1; its messages carry no number.
A new field is marked ``Since`` and has a default: in older protocols it is not sent.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter, model_validator

from consilium_shared import limits
from consilium_shared.canonical import canonical_bytes, digest, parse_canonical
from consilium_shared.config import Strict, validated
from consilium_shared.documents import signature_bytes
from consilium_shared.errors import PeerError
from consilium_shared.fields import Hex32, Hex64, Name
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.protocol.reasons import Reason
from consilium_shared.schema import SCHEMA, Since, check_protocol, written_out
from consilium_shared.secagg.handshake import Bundle, Encapsulated
from consilium_shared.secagg.terms import Advert, Attempt, Purpose, Slot

REQUEST_DOMAIN = "request"
ANSWER_DOMAIN = "answer"
COUNTERSIGNATURE_DOMAIN = "round-record-countersignature"
"""Label under which a site signs the 32 bytes of a record's SHA-256 that it has witnessed."""

UNREAD = "0" * 64
"""Placeholder for the study in a refusal of a request that could not be read."""

Round = Annotated[int, Field(ge=1, le=limits.ROUNDS)]
Protocol = Annotated[int, Field(ge=1, le=SCHEMA), Since(2)]
"""Number of a message's protocol; absent for 1. Set by ``encode``."""


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a character that cannot be printed")
    return text


Detail = Annotated[str, Field(max_length=limits.DETAIL_CHARACTERS), AfterValidator(_printable)]
"""One line; no terminal escape of a peer reaches a screen."""


class Payload(Strict):
    """Hash and length that the payload must have."""

    sha256: Hex32
    size: Annotated[int, Field(ge=0, le=limits.PAYLOAD_BYTES)]
    """Length in bytes."""

    @classmethod
    def of(cls, data: bytes) -> Payload:
        """Description of ``data``."""
        return cls(sha256=digest(data), size=len(data))

    def check(self, data: bytes) -> None:
        """Raises PeerError unless ``data`` is the payload described."""
        if len(data) != self.size or digest(data) != self.sha256:
            raise PeerError("the payload is not the one that the header describes")


NO_PAYLOAD = Payload.of(b"")


class Head(Strict):
    """The last entry of a site's ledger when the answer was made."""

    seq: Annotated[int, Field(ge=0, le=2**53 - 1)]
    sha256: Hex32


class Recorded(Strict):
    """Record of an earlier round, as the coordinator signed it, shown to the sites for their ledgers."""

    round: Round
    record: Hex32
    """SHA-256 of the signed record's bytes."""
    heads: Annotated[dict[Name, Head], Field(max_length=limits.SITES)]
    """Ledger heads of that round's participants, as they stand in the record."""


class _Request(Strict):
    federation: Hex32
    study: Hex32
    roster: Hex32
    payload: Payload = NO_PAYLOAD
    protocol: Protocol = 1


class Propose(_Request):
    """Proposal of a study. Carries the whole contract and the signed roster."""

    kind: Literal["propose"] = "propose"
    contract: dict[str, Any]
    roster_document: dict[str, Any]
    """``{"body": …, "signature": …}`` as ``documents.seal`` makes it."""


class _Sum(_Request):
    """A request about one secure sum: a round's updates, or the counts on the model after round ``round``."""

    round: Round
    attempt: Attempt

    @property
    @abstractmethod
    def purpose(self) -> Purpose:
        """Purpose of the sum."""

    @property
    def slot(self) -> Slot:
        """Slot whose keys are meant."""
        return Slot(
            federation=self.federation,
            study=self.study,
            roster=self.roster,
            purpose=self.purpose,
            round=self.round,
            attempt=self.attempt,
        )


class _OfSum(_Sum):
    of: Purpose

    @property
    def purpose(self) -> Purpose:
        """Purpose of the sum."""
        return self.of


class Advertise(_OfSum):
    """Request for the key that the site takes for this sum. Whatever it sent in the attempt before is given up."""

    kind: Literal["advertise"] = "advertise"


class Handshake(_Request):
    """Request to agree on long-lived secrets with these sites; payload: canonical JSON, site to ``Bundle``."""

    kind: Literal["handshake"] = "handshake"


class _Contribute(_Sum):
    adverts: Annotated[dict[Name, Advert], Field(min_length=2, max_length=limits.SITES)]
    """Advertisements of the cohort, this site's own among them."""
    encapsulated: Annotated[dict[Name, Encapsulated], Field(max_length=limits.SITES)]
    """Encapsulations from sites of the cohort with which this one has no secret yet."""


class Train(_Contribute):
    """Request to train round ``round`` from the payload, the global model (safetensors)."""

    kind: Literal["train"] = "train"
    recorded: Recorded | None = None
    """Record of the round before; None for the first."""

    @property
    def purpose(self) -> Purpose:
        """Purpose of the sum."""
        return "training"


class Evaluate(_Contribute):
    """Request to evaluate the payload, the global model after the last round, on held-back patients."""

    kind: Literal["evaluate"] = "evaluate"

    @property
    def purpose(self) -> Purpose:
        """Purpose of the sum."""
        return "evaluation"


class Survivors(_OfSum):
    """Request to sign that these sites' vectors are in the sum. Payload: shares that the others sealed to this site."""

    kind: Literal["survivors"] = "survivors"
    survivors: Annotated[tuple[Name, ...], Field(min_length=2, max_length=limits.SITES)]


class Open(_OfSum):
    """Request to release the shares that open the sum, as enough have signed. Payload: as with ``Survivors``."""

    kind: Literal["open"] = "open"
    signatures: Annotated[dict[Name, Hex64], Field(min_length=2, max_length=limits.SITES)]


class Close(_Request):
    """Request to witness the record of the study's last round."""

    kind: Literal["close"] = "close"
    recorded: Recorded


class CanaryAudit(Strict):
    """Outcome of a site's one-run audit (``privacy/canaries.py``): what it measured is recomputed from it."""

    canaries: Annotated[int, Field(ge=1, le=limits.CANARIES)]
    guesses: Annotated[int, Field(ge=0, le=limits.CANARIES)]
    correct: Annotated[int, Field(ge=0, le=limits.CANARIES)]

    @model_validator(mode="after")
    def _ordered(self) -> CanaryAudit:
        if not self.correct <= self.guesses <= self.canaries:
            raise ValueError("of the canaries some were guessed, and of the guesses some were correct")
        return self


class _Answer(Strict):
    federation: Hex32
    study: Hex32
    site: Name
    request: Hex32
    """SHA-256 of the request's header."""
    head: Head
    payload: Payload = NO_PAYLOAD
    protocol: Protocol = 1


class ApprovalStatus(_Answer):
    """Status of the proposal at this hospital; a hospital that says no sends a ``Refusal``."""

    kind: Literal["standing"] = "standing"
    state: Literal["pending", "approved"]


class Advertised(_Answer):
    """Key of this site for a sum, and its keys for the study."""

    kind: Literal["advertised"] = "advertised"
    round: Round
    attempt: Attempt
    of: Purpose
    advert: Advert
    bundle: Bundle
    known: Annotated[dict[Name, Hex32], Field(max_length=limits.SITES)]
    """Sites with which there is a secret, each with the digest of the ``Bundle`` that it was agreed with."""


class Handshaken(_Answer):
    """Payload: canonical JSON, site to ``Encapsulated``, of every site asked about whose name is the higher one."""

    kind: Literal["handshaken"] = "handshaken"


class Update(_Answer):
    """Update of the round; payload: the masked vector (``summand.py``), then ``secagg.site.Contribution.trailer``."""

    kind: Literal["update"] = "update"
    round: Round
    attempt: Attempt
    epsilon: Annotated[float, Field(ge=0)] | None
    """ε that the study has spent at this site so far, at the study's δ; None without privacy."""
    countersignature: Hex64 | None = None
    """The site's signature over ``recorded.record`` of the request, under ``COUNTERSIGNATURE_DOMAIN``."""


class Counts(_Answer):
    """Evaluation counts; payload: masked, as with ``Update``."""

    kind: Literal["counts"] = "counts"
    round: Round
    attempt: Attempt
    epsilon: Annotated[float, Field(ge=0)] | None
    """ε as in ``Update``, with these counts."""


class Signed(_Answer):
    """Signature of the site on the set of survivors, which it has checked."""

    kind: Literal["signed"] = "signed"
    round: Round
    attempt: Attempt
    of: Purpose
    signature: Hex64


class Shares(_Answer):
    """Shares that open the sum; payload: ``secagg.site.SitePart.release``."""

    kind: Literal["shares"] = "shares"
    round: Round
    attempt: Attempt
    of: Purpose
    next: Advert | None = None
    """Key of this site for the next sum, at its first attempt."""


class Closing(_Answer):
    """Closing answer of a site, which has witnessed the last record."""

    kind: Literal["closing"] = "closing"
    round: Round
    epsilon: Annotated[float, Field(ge=0)] | None
    """ε that the study has spent at this site in the end, evaluations included; None without privacy."""
    countersignature: Hex64
    """Countersignature as in ``Update``, over the last record."""
    audit: CanaryAudit | None = None


class Refusal(_Answer):
    """Refusal of a request by a site."""

    kind: Literal["refusal"] = "refusal"
    reason: Reason
    detail: Detail = ""


SumRequest = Advertise | Train | Evaluate | Survivors | Open
Request = Propose | Handshake | SumRequest | Close
Answer = ApprovalStatus | Advertised | Handshaken | Update | Counts | Signed | Shares | Closing | Refusal

_requests: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="kind")])
_answers: TypeAdapter[Answer] = TypeAdapter(Annotated[Answer, Field(discriminator="kind")])


def encode(message: Request | Answer, signer: Identity, protocol: int = SCHEMA) -> bytes:
    """The signed header of a message in that protocol, canonical JSON ``{"body": …, "signature": …}``.

    Raises:
        ValueError: larger than ``limits.HEADER_BYTES`` (a programming error: our own limits are smaller).
    """
    domain = REQUEST_DOMAIN if isinstance(message, _Request) else ANSWER_DOMAIN
    body = written_out(message.model_copy(update={"protocol": protocol}), protocol)
    signature = signer.sign(domain, canonical_bytes(body)).hex()
    header = canonical_bytes({"body": body, "signature": signature})
    if len(header) > limits.HEADER_BYTES:
        raise ValueError(f"header of {len(header)} bytes")
    return header


def decode_request(header: bytes, coordinator: PublicIdentity) -> Request:
    """A request, verified.

    Raises:
        SignatureError: not signed by this coordinator.
        VersionError: of a protocol that came after this release.
        PeerError: too large, not canonical, an unknown field or kind, a value out of bounds.
    """
    request: Request = validated(_requests, _verified_body(header, REQUEST_DOMAIN, coordinator))
    return request


def decode_answer(header: bytes, site: PublicIdentity) -> Answer:
    """An answer, verified; raises as ``decode_request`` does."""
    answer: Answer = validated(_answers, _verified_body(header, ANSWER_DOMAIN, site))
    return answer


def countersign(record: str, site: Identity) -> str:
    """The site's signature over a record, of which ``record`` is the SHA-256; 128 hex digits, always the same."""
    return site.sign(COUNTERSIGNATURE_DOMAIN, bytes.fromhex(record)).hex()


def verify_countersignature(signature: str, record: str, site: PublicIdentity) -> None:
    """Raises SignatureError unless ``signature`` is what ``countersign`` makes of that record at that site."""
    site.verify(COUNTERSIGNATURE_DOMAIN, bytes.fromhex(record), signature_bytes(signature))


def _verified_body(header: bytes, domain: str, signer: PublicIdentity) -> Any:
    if len(header) > limits.HEADER_BYTES:
        raise PeerError(f"a header has at most {limits.HEADER_BYTES} bytes")
    envelope = parse_canonical(header)
    if not isinstance(envelope, dict) or set(envelope) != {"body", "signature"}:
        raise PeerError("a header has a body and a signature")
    signer.verify(domain, canonical_bytes(envelope["body"]), signature_bytes(envelope["signature"]))
    check_protocol(envelope["body"])
    return envelope["body"]
