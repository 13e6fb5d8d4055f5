"""Secure sum under way: its cohort and, once closed, its survivors. On the disk before any site learns of it.

So a study's process that dies in the middle asks exactly the same again, and gets the same answers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError

from consilium_shared import limits
from consilium_shared.canonical import canonical_bytes, parse_canonical
from consilium_shared.config import Strict
from consilium_shared.errors import IntegrityError, PeerError
from consilium_shared.fields import Name
from consilium_shared.files import write_atomically
from consilium_shared.secagg.handshake import Encapsulated
from consilium_shared.secagg.terms import Advert, Purpose


class PendingSum(Strict):
    """One attempt at a sum."""

    purpose: Purpose
    round: Annotated[int, Field(ge=1, le=limits.ROUNDS)]
    attempt: Annotated[int, Field(ge=1, le=limits.ATTEMPTS)]
    adverts: dict[Name, Advert]
    """Advertisements of the cohort."""
    encapsulated: dict[Name, dict[Name, Encapsulated]]
    """Site to what it is given from others with which it has no secret yet."""
    survivors: tuple[Name, ...] | None = None
    """Once the set is closed."""


class PendingSumFile:
    """``sum.json`` in a study's folder."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "sum.json"

    def read(self, purpose: Purpose, number: int) -> PendingSum | None:
        """The last attempt at this sum; None where there was none yet.

        Raises:
            IntegrityError: the file is damaged.
        """
        try:
            found = PendingSum.model_validate(parse_canonical(self._file.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, PeerError, ValidationError) as error:
            raise IntegrityError(f"{self._file}: damaged; restore the folder from a backup") from error
        return found if (found.purpose, found.round) == (purpose, number) else None

    def write(self, opened: PendingSum) -> None:
        """Keep an attempt durably, in place of the one before."""
        write_atomically(self._file, canonical_bytes(opened.model_dump(mode="json")))
