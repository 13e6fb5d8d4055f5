"""Settings that several sources of data have: files for TLS, ports, names of columns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from consilium_shared.config import Strict

Port = Annotated[int, Field(ge=1, le=65535)]
Column = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_.\-]{0,63}$")]
"""Name of a column of a table that is written."""


class Certificates(Strict):
    """PEM files for TLS, relative to the home folder."""

    certificate: Path | None = None
    """Certificate of this site, with its chain."""
    key: Path | None = None
    ca: Path
    """Authorities that may have signed the other end's certificate, no others: the system's own list is not used."""

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key go together")
        return self

    def at(self, base: Path) -> Certificates:
        """Copy whose paths start from the folder ``base``."""
        return Certificates(
            certificate=None if self.certificate is None else base / self.certificate,
            key=None if self.key is None else base / self.key,
            ca=base / self.ca,
        )
