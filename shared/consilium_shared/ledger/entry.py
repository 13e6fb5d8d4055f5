"""One entry of a site's ledger: its fields, its kinds, and its one encoding as a line of bytes.

    {"body": {…}, "kind": "charge", "prev": "<sha-256 of the line before>", "seq": 7, "sig": "<Ed25519>", "time": "…Z"}

in canonical JSON (RFC 8785), one entry a line. Kinds and their fields only ever grow: an old ledger must verify
under every later program. Nothing in a body comes from a patient's record, except
the noised number of patients in the plan of an ``approve``.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from consilium_shared import limits
from consilium_shared.canonical import canonical_bytes, digest, parse_canonical
from consilium_shared.config import Strict
from consilium_shared.errors import LedgerError, PeerError
from consilium_shared.identity import Identity

DOMAIN = "ledger-entry"
"""Label under which a site signs the canonical bytes of an entry without ``sig``."""

LINE_BYTES = 32 * 1024
"""Longest line; every field of every kind is bounded, and the heads of 100 ledgers take half of it."""

LARGEST = 2**53 - 1
"""Largest integer that canonical JSON carries."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[str, Field(min_length=1, max_length=limits.NAME_CHARACTERS)]
Person = Annotated[str, Field(min_length=1, max_length=200)]
Sentence = Annotated[str, Field(max_length=limits.DETAIL_CHARACTERS)]
Code = Annotated[str, Field(pattern=r"^[a-z0-9-]{1,64}$")]
Round = Annotated[int, Field(ge=0, le=limits.ROUNDS)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Steps = Annotated[int, Field(ge=1, le=limits.STEPS_PER_ROUND)]
Positive = Annotated[float, Field(gt=0)]
Delta = Annotated[float, Field(gt=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Epsilon = Annotated[float, Field(ge=0)] | None
"""None stands for infinity, which JSON cannot write."""
Purpose = Literal["training", "evaluation", "count"]


class Body(Strict):
    """Base of every body: no conversions either ("1" is not 1).

    A field that a later version added has a default and is absent from older entries: a body is written with exactly
    the fields that it was given, so their signatures still hold.
    """

    model_config = ConfigDict(strict=True)


class DpSgd(Body):
    """A ``privacy.event.DpSgdEvent``."""

    kind: Literal["dp-sgd"]
    sampling_rate: Rate
    noise_multiplier: Positive
    steps: Steps


class DpSgdShared(DpSgd):
    """A ``privacy.event.SharedDpSgdEvent``."""

    kind: Literal["dp-sgd-shared"]  # type: ignore[assignment]
    honest_sites: Annotated[int, Field(ge=2, le=limits.SITES)]
    colluding_sites: Annotated[int, Field(ge=1, le=limits.SITES)]


class Gaussian(Body):
    """A ``privacy.event.GaussianEvent``."""

    kind: Literal["gaussian"]
    noise_multiplier: Positive


class NonPrivate(Body):
    """A ``privacy.event.NonPrivateEvent``."""

    kind: Literal["non-private"]


class DpSgdPlan(Body):
    """A ``privacy.plan.PrivacyPlan``."""

    kind: Literal["dp-sgd"]
    unit: Literal["patient"]
    sampling_rate: Rate
    clipping_norm: Positive
    noise_multiplier: Positive
    steps_per_round: Steps
    rounds: Annotated[int, Field(ge=1, le=limits.ROUNDS)]
    delta: Delta
    epsilon: Positive
    records_per_patient: Annotated[int, Field(ge=1, le=limits.RECORDS_PER_PATIENT)] = 1
    patients: Annotated[int, Field(ge=1, le=LARGEST)] | None = None
    count_noise: Positive | None = None
    evaluations: Annotated[int, Field(ge=0, le=limits.ROUNDS)] = 0
    evaluation_noise: Positive | None = None
    honest_sites: Annotated[int, Field(ge=1, le=limits.SITES)] = 1
    """Sites whose noise together is the whole; of more than 1, that is shared."""
    colluding_sites: Annotated[int, Field(ge=0, le=limits.SITES)] = 0


class NonPrivatePlan(Body):
    """A ``privacy.plan.NonPrivatePlan``."""

    kind: Literal["non-private"]
    steps_per_round: Steps
    rounds: Annotated[int, Field(ge=1, le=limits.ROUNDS)]


class Open(Body):
    """Budget of an asset from this entry on; the first one opens the asset, a later one needs a reason."""

    asset: Name
    unit: Literal["patient"]
    epsilon: Epsilon
    delta: Delta
    policy: Sha256
    reason: Sentence


class Approve(Body):
    """Approval of a study by somebody at the hospital, with this plan, at most at this cost."""

    study: Sha256
    name: Name
    asset: Name
    epsilon: Epsilon
    by: Person
    plan: Annotated[DpSgdPlan | NonPrivatePlan, Field(discriminator="kind")]
    roster: Sha256 | None = None
    """Digest of the roster that whoever approved was shown: with whom, and with which keys."""
    epsilon_alone: Epsilon = None
    """ε of the whole study should this site's own share of the noise be all that protects it; for readers, of plans
    with shared noise."""


class Reject(Body):
    """Rejection of a study by somebody at the hospital, or withdrawal of an approval."""

    study: Sha256
    name: Name
    by: Person
    reason: Sentence


class Charge(Body):
    """Charge, recorded before the computation it pays for. ``epsilon_after`` is for readers; programs recompute it.

    ``purpose``: a round's training; the evaluation counts after a round; or, in round 0, the noised number of patients.
    """

    study: Sha256
    name: Name
    asset: Name
    round: Round
    attempt: Annotated[int, Field(ge=1, le=LARGEST)]
    event: Annotated[DpSgd | DpSgdShared | Gaussian | NonPrivate, Field(discriminator="kind")]
    delta: Delta
    epsilon_after: Epsilon
    purpose: Purpose = "training"
    epsilon_alone_after: Epsilon = None
    """ε of the same should this site's own shares be all that protects what shared its noise; written where something
    did. For readers."""


class Settle(Body):
    """Settlement of the charge in entry ``charge_seq``: ``steps`` ran. A charge without a settlement counts in full."""

    charge_seq: Annotated[int, Field(ge=1, le=LARGEST)]
    steps: Annotated[int, Field(ge=0, le=limits.STEPS_PER_ROUND)]


class Refuse(Body):
    """Refusal of a request."""

    study: Sha256 | None
    round: Round | None
    reason: Code
    detail: Sentence


class Release(Body):
    """Release of a message about to leave: SHA-256 of its header (which names the payload's) and the bytes of both."""

    study: Sha256
    round: Round | None
    message: Code
    sha256: Sha256
    bytes: Count
    counts: bool = False
    """An update that carries evaluation counts of the round before; they have a charge of their own."""
    attempt: Annotated[int, Field(ge=1, le=limits.ATTEMPTS)] | None = None
    """Attempt of a signature over survivors."""
    again: bool = False
    """True for an update, or counts, that left before under other masks, in an attempt that was abandoned unopened."""


class Recover(Body):
    """Recovery after a crash: an incomplete last line was cut off; SHA-256 and length of what was cut."""

    sha256: Sha256
    bytes: Annotated[int, Field(ge=1, le=LARGEST)]


class Policy(Body):
    """Policy of the site from this entry on."""

    digest: Sha256
    reason: Sentence


class Head(Body):
    """The last entry of a site's ledger at some time."""

    seq: Annotated[int, Field(ge=0, le=LARGEST)]
    sha256: Sha256


class Witness(Body):
    """The coordinator showed the heads of the participants' ledgers that it signed into the record of a round."""

    study: Sha256
    round: Annotated[int, Field(ge=1, le=limits.ROUNDS)]
    record: Sha256
    """SHA-256 of the signed record's bytes."""
    heads: Annotated[dict[Name, Head], Field(max_length=limits.SITES)]


class Audit(Body):
    """One-run audit of a study's plan at this site with canaries and without any patient (``privacy/canaries.py``)."""

    study: Sha256
    name: Name
    canaries: Annotated[int, Field(ge=1, le=limits.CANARIES)]
    guesses: Annotated[int, Field(ge=0, le=limits.CANARIES)]
    correct: Annotated[int, Field(ge=0, le=limits.CANARIES)]
    plan: Sha256
    """SHA-256 of the canonical plan that ran."""
    by: Person

    @model_validator(mode="after")
    def _ordered(self) -> Audit:
        if not self.correct <= self.guesses <= self.canaries:
            raise ValueError("of the canaries some were guessed, and of the guesses some were correct")
        return self


KINDS: dict[str, type[Body]] = {
    "open": Open,
    "approve": Approve,
    "reject": Reject,
    "charge": Charge,
    "settle": Settle,
    "refuse": Refuse,
    "release": Release,
    "recover": Recover,
    "policy": Policy,
    "witness": Witness,
    "audit": Audit,
}
"""The closed registry of kinds."""


class Envelope(Body):
    """An entry as a line has it, whatever its kind; ``Entry`` is the decoded one."""

    seq: Annotated[int, Field(ge=1, le=LARGEST)]
    time: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}[.][0-9]{3}Z$")]
    kind: Literal[tuple(KINDS)]  # type: ignore[valid-type]
    body: dict[str, Any]
    prev: Sha256
    sig: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]


_envelope = TypeAdapter(Envelope)


@dataclass(frozen=True)
class Entry:
    """A decoded entry.

    Attributes:
        seq: 1 for the first line.
        time: UTC with milliseconds, RFC 3339; sorts as text.
        kind: a key of ``KINDS``.
        body: an instance of ``KINDS[kind]``.
        prev: SHA-256 of the line before, without its newline; the genesis for the first.
        sig: the site's signature, 128 hex digits.
    """

    seq: int
    time: str
    kind: str
    body: Body
    prev: str
    sig: str

    def signed_bytes(self) -> bytes:
        """Bytes that the signature covers: the canonical ones of everything but ``sig``."""
        return _signed_bytes(self.seq, self.time, self.kind, self.body, self.prev)

    def line(self) -> bytes:
        """The entry's line, without a newline."""
        return canonical_bytes({**_unsigned(self.seq, self.time, self.kind, self.body, self.prev), "sig": self.sig})


def sign_entry(seq: int, time: str, body: Body, prev: str, identity: Identity) -> Entry:
    """The entry with the site's signature."""
    kind = kind_of(body)
    signature = identity.sign(DOMAIN, _signed_bytes(seq, time, kind, body, prev))
    return Entry(seq=seq, time=time, kind=kind, body=body, prev=prev, sig=signature.hex())


def make_body(kind: str, fields: dict[str, Any]) -> Body:
    """The body of that kind.

    Raises:
        LedgerError: no such kind, or not exactly its fields with values of their types and ranges.
    """
    if kind not in KINDS:
        raise LedgerError(f"unknown kind of entry {kind!r}; this program is older than the ledger, or it was altered")
    try:
        return KINDS[kind].model_validate(fields)
    except ValidationError as error:
        raise LedgerError(f"{kind}: {_first(error)}") from error


def decode_json(line: bytes) -> Any:
    """The value of a line; raises LedgerError unless it is canonical JSON of at most ``LINE_BYTES``."""
    if len(line) > LINE_BYTES:
        raise LedgerError(f"longer than {LINE_BYTES} bytes")
    try:
        return parse_canonical(line)
    except PeerError as error:
        raise LedgerError(str(error)) from error


def decode_entry(value: Any) -> Entry:
    """The entry of a line's value; raises LedgerError unless it has exactly the fields of an entry and of its kind."""
    try:
        envelope = _envelope.validate_python(value)
        datetime.fromisoformat(envelope.time)
    except ValidationError as error:
        raise LedgerError(_first(error)) from error
    except ValueError as error:
        raise LedgerError(f"time: {error}") from error
    body = make_body(envelope.kind, envelope.body)
    return Entry(envelope.seq, envelope.time, envelope.kind, body, envelope.prev, envelope.sig)


def line_digest(line: bytes) -> str:
    """Digest that the next entry carries as ``prev``."""
    return digest(line)


def timestamp(moment: datetime) -> str:
    """``moment`` (with a time zone) as an entry writes it."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def kind_of(body: Body) -> str:
    """The kind whose body this is."""
    return next(kind for kind, model in KINDS.items() if type(body) is model)


def _unsigned(seq: int, time: str, kind: str, body: Body, prev: str) -> dict[str, Any]:
    return {
        "seq": seq,
        "time": time,
        "kind": kind,
        "body": body.model_dump(mode="json", exclude_unset=True),
        "prev": prev,
    }


def _signed_bytes(seq: int, time: str, kind: str, body: Body, prev: str) -> bytes:
    return canonical_bytes(_unsigned(seq, time, kind, body, prev))


def _first(error: ValidationError) -> str:
    finding = error.errors(include_input=False, include_url=False)[0]
    where = ".".join(str(part) for part in finding["loc"])
    return f"{where}: {finding['msg']}"
