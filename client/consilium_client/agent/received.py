"""A request as it was received, and the fields that every answer to it carries. Plain values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

from consilium_shared.canonical import digest
from consilium_shared.protocol.messages import Head, Request, SumRequest


class AnswerHeader(TypedDict):
    """Fields that every answer carries (``messages._Answer``) but its payload and its protocol."""

    federation: str
    study: str
    site: str
    request: str
    head: Head


class ReleaseMarks(TypedDict, total=False):
    """Optional fields of a ``release`` in the ledger (``ledger.entry.Release``)."""

    counts: bool
    again: bool
    attempt: int


@dataclass(frozen=True)
class Received:
    """A verified request.

    Attributes:
        request: the request.
        header: its signed bytes.
        payload: the bytes that came with it, not checked yet.
    """

    request: Request
    header: bytes
    payload: bytes

    @cached_property
    def sha256(self) -> str:
        """Digest of the header: by it an answer names its request."""
        return digest(self.header)

    @property
    def round(self) -> int | None:
        """Round that the request is about, where it is about a secure sum."""
        return self.request.round if isinstance(self.request, SumRequest) else None


@dataclass(frozen=True)
class Outgoing:
    """An answer that is about to leave.

    Attributes:
        study: digest of its study.
        round: number of its round, or None.
        kind: kind of message.
        header: its signed bytes.
        payload_bytes: length of its payload.
        marks: what its ``release`` in the ledger says besides.
    """

    study: str
    round: int | None
    kind: str
    header: bytes
    payload_bytes: int
    marks: ReleaseMarks
