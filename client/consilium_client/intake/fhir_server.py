"""Settings of a FHIR server that gives bulk exports to programs (SMART Backend Services)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from consilium_client.intake.certificates import Certificates
from consilium_shared.config import Strict

Url = Annotated[str, Field(pattern=r"^https://[^\s?#@]+$", max_length=1000)]


class FhirServer(Strict):
    """A FHIR R4 server, and how this site shows it who it is: a signed assertion, as SMART Backend Services has it."""

    url: Url
    """Address of the service, such as ``https://fhir.hospital/r4``."""
    token_url: Url
    """Address that gives access tokens; the assertion goes there and nowhere else."""
    client_id: Annotated[str, Field(min_length=1, max_length=200)]
    """Name under which the server knows this site."""
    key: Path
    """PEM file with the private key whose public half was registered there: RSA (RS384) or P-384 (ES384)."""
    key_id: Annotated[str, Field(min_length=1, max_length=200)]
    """Name of that key (``kid``), as it was registered."""
    scope: Annotated[str, Field(pattern=r"^[\x21-\x7e]+( [\x21-\x7e]+)*$", max_length=1000)] = "system/*.rs"
    group: Annotated[str, Field(pattern=r"^[A-Za-z0-9.\-]{1,64}$")] | None = None
    """The group of patients to export; None: all patients that the server lets this site see."""
    since: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}T[\d:.]+(Z|[+-]\d{2}:\d{2})$")] | None = None
    """Only resources that changed since, as ``2026-01-01T00:00:00Z``."""
    files_from: list[Annotated[str, Field(pattern=r"^[A-Za-z0-9.\-]+(:\d+)?$", max_length=300)]] = Field(
        default_factory=list
    )
    """Further hosts (``host`` or ``host:port``) that its files may lie at. They get no token."""
    tls: Certificates
    timeout: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Seconds for one answer."""
    patience_hours: Annotated[float, Field(gt=0, le=240)] = 12.0
    """Hours for which the export is waited for."""

    def at(self, base: Path) -> FhirServer:
        """Copy of the settings whose paths start from the folder ``base``."""
        return self.model_copy(update={"key": base / self.key, "tls": self.tls.at(base)})

    @model_validator(mode="after")
    def _hosts(self) -> Self:
        for url in (self.url, self.token_url):
            if not urlsplit(url).hostname:
                raise ValueError(f"{url} names no host")
        return self
