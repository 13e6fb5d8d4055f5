"""Records that the coordinator signs about a study, for whoever checks it: one a round, and the card of its model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError, model_validator

from consilium_shared import documents
from consilium_shared.config import Strict
from consilium_shared.errors import PeerError
from consilium_shared.fields import Hex32, Hex64, Name
from consilium_shared.identity import PublicIdentity
from consilium_shared.keeping import Kept
from consilium_shared.limits import CARD_BYTES, FILE_BYTES, PARAMETERS, PAYLOAD_BYTES, ROUNDS, SITES
from consilium_shared.privacy.measured_noise import MeasuredNoise
from consilium_shared.protocol.messages import CanaryAudit, Head, Protocol
from consilium_shared.schema import check_protocol
from consilium_shared.secagg.terms import Advert, Attempt

RECORD_DOMAIN = "round-record"
CARD_DOMAIN = "model-card"

Signed = TypeVar("Signed", bound=Strict)

Round = Annotated[int, Field(ge=1, le=ROUNDS)]
Sites = Annotated[tuple[Name, ...], Field(max_length=SITES)]
Epsilon = Annotated[float, Field(ge=0)] | None
"""None stands for infinity: without privacy."""


class OpenedSum(Strict):
    """Opening of a secure sum: all of its terms that the record and the contract do not tell, and who signed."""

    attempt: Attempt
    """1 where the first attempt was opened; those before it were abandoned unopened."""
    adverts: Annotated[dict[Name, Advert], Field(min_length=2, max_length=SITES)]
    """The cohort's keys for this sum, as its sites signed them, by site."""
    parameters: Annotated[int, Field(ge=1, le=PARAMETERS)]
    """Coordinates of the update: the trained part of the model."""
    signatures: Annotated[dict[Name, Hex64], Field(max_length=SITES)]
    """Signatures of survivors, over the terms and the set of survivors; at least the threshold's number."""


class RoundRecord(Strict):
    """One finished round."""

    study: Hex32
    federation: Hex32
    roster: Hex32
    round: Round
    model_before: Hex32
    """SHA-256 of the safetensors bytes that the sites trained from."""
    model_after: Hex32
    participants: Sites
    """Sites whose updates went into the model, sorted."""
    away: dict[Name, str]
    refused: dict[Name, tuple[str, str]]
    """Site to (reason code, sentence)."""
    epsilon: dict[Name, Epsilon]
    """ε that each participant says the study has spent there so far, at the study's δ."""
    heads: dict[Name, Head]
    """Head of each participant's ledger when it answered: the round's charge, or an entry after it."""
    seconds: Annotated[float, Field(ge=0)]
    metrics: dict[str, Any] | None
    """Metrics of ``model_after``, from counts in a sum of their own; after the last round alone."""
    metrics_before: dict[str, Any] | None = None
    """Metrics of ``model_before``, from the counts that rode on this round's updates. Metrics are as reported by the
    sites; of noised counts they have ``interval``: metric to (low, high), which holds that of the true counts in 95 of
    100 cases."""
    no_metrics: str | None = None
    """Reason why opened counts gave no ``metrics``: no honest sites could have given them."""
    no_metrics_before: str | None = None
    """Reason why opened counts gave no ``metrics_before``."""
    weight: Annotated[int, Field(ge=1)] | None = None
    """Σ of the participants' weights, where that is noised numbers of patients; else None."""
    update_norm: Annotated[float, Field(ge=0)] | None = None
    """L2 norm of the mean update; None in records of versions that did not say it, and where the sum was spoilt."""
    step_norm: Annotated[float, Field(ge=0)] | None = None
    """L2 norm of what the round moved the model by; None in records of versions that did not say it."""
    noise: MeasuredNoise | None = None
    """Noise that the sum's empty coordinates show; None where the study has none, and where the sum was spoilt."""
    opened: OpenedSum | None = None
    """The sum of this round's updates; None in records of versions that had no secure sums."""
    implausible: str | None = None
    """Reason why honest sites could not have given this sum; no step was taken then."""
    opened_counts: OpenedSum | None = None
    """The sum of the counts behind ``metrics``."""
    previous: Hex32 | None = None
    """SHA-256 of the record of the round before, of all its bytes; None for the first."""
    answers: Annotated[dict[Name, Hex32], Field(default_factory=dict)]
    """SHA-256 of the header of each participant's update: its ledger must say that it left."""
    counts: Annotated[dict[Name, Hex32], Field(default_factory=dict)]
    """SHA-256 of the header of each site's evaluation counts, of those behind ``metrics``."""
    countersigned: Annotated[dict[Name, Hex64], Field(default_factory=dict)]
    """Signatures of this round's participants over ``previous``."""
    remarks: Annotated[dict[Name, tuple[str, ...]], Field(default_factory=dict, max_length=SITES)]
    """Further events of a site in this round: refusals and absences before it took part, or in earlier attempts."""
    kept: Kept | None = None
    """Best model so far, where the contract keeps one (``evaluation.keep``); the last record's is published, and
    ``metrics`` are of it."""
    protocol: Protocol = 1

    @property
    def published(self) -> str:
        """SHA-256 of the model that is published where this is the last record."""
        return self.model_after if self.kept is None else self.kept.model

    @model_validator(mode="after")
    def _complete(self) -> RoundRecord:
        if list(self.participants) != sorted(set(self.participants)):
            raise ValueError("participants must be sorted by name, each once")
        if set(self.epsilon) != set(self.participants) or set(self.heads) != set(self.participants):
            raise ValueError("a record has an epsilon and a ledger's head of each participant, and of nobody else")
        return self


class CardRoster(Strict):
    """The roster, in short."""

    digest: Hex32
    version: int
    sites: Sites


class CardModel(Strict):
    """The model's file."""

    sha256: Hex32
    bytes: Annotated[int, Field(ge=1, le=PAYLOAD_BYTES)]
    architecture: str


class CardRound(Strict):
    """A round's record, in short."""

    round: Round
    participants: Sites
    away: dict[Name, str]
    refused: dict[Name, tuple[str, str]]
    seconds: Annotated[float, Field(ge=0)]
    model_after: Hex32

    @classmethod
    def of(cls, record: RoundRecord) -> CardRound:
        """Entry of a card on that record."""
        return cls.model_validate({name: getattr(record, name) for name in cls.model_fields})


class Measured(CanaryAudit):
    """Canary audit of a site: what it measured, and what that proves: beside ``epsilon``, which is proven."""

    epsilon_at_least: Annotated[float, Field(ge=0)]
    """Lower bound of ε at the study's δ."""
    confidence: Annotated[float, Field(gt=0, lt=1)]

    @classmethod
    def of(cls, audit: CanaryAudit, delta: float) -> Measured:
        """Computed from the outcome (``privacy/canaries.py``)."""
        from consilium_shared.privacy.canaries import CONFIDENCE, Outcome, lower_bound

        outcome = Outcome(audit.canaries, audit.guesses, audit.correct)
        return cls(**asdict(outcome), epsilon_at_least=lower_bound(outcome, delta), confidence=CONFIDENCE)


class ModelCard(Strict):
    """Card of a finished model: how it came to be, and what it cost."""

    study: Name
    version: int
    study_digest: Hex32
    contract: dict[str, Any]
    federation: Hex32
    roster: CardRoster
    model: CardModel
    rounds: Annotated[tuple[CardRound, ...], Field(max_length=ROUNDS)]
    epsilon: dict[Name, Epsilon]
    """Last ε that each site said that ever took part."""
    delta: float | None
    epsilon_alone: Epsilon = None
    """ε of the study by a site's own share of the noise alone; None where each site's noise is the whole."""
    metrics: dict[str, Any] | None
    """Metrics of the last evaluated round."""
    measured: Annotated[dict[Name, Measured], Field(default_factory=dict)]
    """By the sites that audited their training with canaries, beside the proven ``epsilon``."""
    privacy: str
    limits: str
    software: dict[str, str]
    kept: Kept | None = None
    """Model that was kept, as the last record has it; None where the last round's is published."""
    chosen: str = ""
    """Sentence on which round's model this is, and why."""
    protocol: Protocol = 1


def open_record(data: bytes, coordinator: PublicIdentity) -> RoundRecord:
    """The record of a signed document.

    Raises:
        SignatureError: not signed by this coordinator, or edited since.
        VersionError: of a protocol that came after this release.
        PeerError: malformed.
    """
    return _opened(RoundRecord, data, RECORD_DOMAIN, coordinator, FILE_BYTES)


def open_card(data: bytes, coordinator: PublicIdentity) -> ModelCard:
    """The model card of a signed document; raises as ``open_record`` does."""
    return _opened(ModelCard, data, CARD_DOMAIN, coordinator, CARD_BYTES)


def _opened(model: type[Signed], data: bytes, domain: str, coordinator: PublicIdentity, limit: int) -> Signed:
    body, signature = documents.parse(data, limit)
    documents.verify(body, signature, domain, coordinator)
    check_protocol(body)
    try:
        return model.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PeerError(f"{where}: {first['msg']}" if where else first["msg"]) from error
