"""Home folder of a prediction service: predict.yaml, keys, tokens, models, and the record of predictions.

predict.yaml              what the hospital decides
keys/record.pem           signs the record of predictions
keys/pseudonym.key        32 bytes; turns patients' identifiers into pseudonyms
tokens.json               SHA-256 of each token, by the name of who has it
models/<study>/           VERSION.zip, a verified bundle; state.json, which of them answers
records/                  the record of predictions
dicom/                    images and reports that wait
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import secrets
from functools import cached_property
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from consilium_serve.dicom_settings import Dicom
from consilium_serve.fhir import Codes
from consilium_shared.config import Strict, load_yaml
from consilium_shared.errors import ConfigurationError, IntegrityError
from consilium_shared.fields import Name
from consilium_shared.files import write_atomically
from consilium_shared.identity import Identity, write_secret

TEMPLATE = """\
# What this hospital decides about its prediction service. consilium-predict serve reads it when it starts.
coordinator: "FINGERPRINT"   # fingerprint of the coordinator whose models may answer; compare it by telephone
listen:
  address: 127.0.0.1           # any other address takes a certificate
  port: 8470
  # certificate: tls.pem       # PEM files, relative to this folder
  # key: tls.key
  # client_ca: clients.pem     # then only clients with a certificate of this CA are answered
thresholds: {}                 # study: probability from which the second class is said; 0.5 where none is given
retention_days: 3650           # older predictions are deleted from the record
limits:
  requests_per_minute: 600     # of one client
  body_bytes: 33554432
  at_once: 2                   # requests that are computed at a time; each may hold body_bytes several times
  waiting: 32                  # requests that wait for that; more are turned away
  records: 256                 # records in one request
# fhir:                        # of each study: how the hospital's FHIR server codes its columns and variables
#   NAME:
#     codes: {hr: {system: http://loinc.org, code: 8867-4, unit: /min}}   # values: {CODE: CATEGORY} for categories
#     age: age                 # column of the age in years, from Patient.birthDate
#     gender: sex              # column of Patient.gender
#     genders: {female: f, male: m}
# dicom:                       # take images from the archive, and give it reports
#   study: NAME                # whose model answers
#   ae_title: CONSILIUM
#   address: 10.1.2.9          # of this machine
#   port: 11112
#   peers: [{ae_title: PACS, address: 10.1.2.3}]            # who may send; an address may be a network
#   archive: {ae_title: PACS, address: 10.1.2.3, port: 104} # where the reports go
"""


MOST_RECORDS = 100_000
"""Records in one request, whatever predict.yaml permits."""


class Listen(Strict):
    """Address of the service."""

    address: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8470
    certificate: Path | None = None
    key: Path | None = None
    client_ca: Path | None = None

    @model_validator(mode="after")
    def _protected(self) -> Listen:
        try:
            local = ipaddress.ip_address(self.address).is_loopback
        except ValueError:
            raise ValueError("address is an IP address, such as 127.0.0.1 or 0.0.0.0") from None
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together")
        if self.certificate is None and (not local or self.client_ca is not None):
            raise ValueError("other machines are answered over TLS alone: give certificate and key")
        return self


class Limits(Strict):
    """Bounds of what clients may ask for."""

    requests_per_minute: Annotated[int, Field(ge=1, le=1_000_000)] = 600
    body_bytes: Annotated[int, Field(ge=1024, le=2**30)] = 2**25
    at_once: Annotated[int, Field(ge=1, le=64)] = 2
    waiting: Annotated[int, Field(ge=0, le=10_000)] = 32
    records: Annotated[int, Field(ge=1, le=MOST_RECORDS)] = 256


class Settings(Strict):
    """Settings of ``predict.yaml``."""

    coordinator: str
    listen: Listen = Listen()
    thresholds: Annotated[dict[Name, Annotated[float, Field(gt=0, lt=1)]], Field(default_factory=dict)]
    retention_days: Annotated[int, Field(ge=1, le=36_500)] = 3650
    limits: Limits = Limits()
    dicom: Dicom | None = None
    fhir: Annotated[dict[Name, Codes], Field(default_factory=dict)]


class Home:
    """A prediction service's folder.

    Attributes:
        root: the folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def models(self) -> Path:
        """Folder of installed bundles."""
        return self.root / "models"

    @property
    def records(self) -> Path:
        """Folder of the record of predictions."""
        return self.root / "records"

    @property
    def images(self) -> Path:
        """Folder of images that came by DICOM and wait."""
        return self.root / "dicom" / "images"

    @property
    def asked(self) -> Path:
        """Folder of images that came as a request's body, while they are read."""
        return self.root / "dicom" / "asked"

    @property
    def arriving(self) -> Path:
        """Folder of images that arrive now, not whole yet."""
        return self.root / "dicom" / "arriving"

    @property
    def reports(self) -> Path:
        """Folder of reports that wait for the archive."""
        return self.root / "dicom" / "reports"

    def begin(self, fingerprint: str) -> None:
        """Make the folder with new keys; raises ConfigurationError where there is one already."""
        from consilium_shared.protocol.bundle import plain

        plain(fingerprint)
        if (self.root / "predict.yaml").exists():
            raise ConfigurationError(f"{self.root} is a prediction service's home already")
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        Identity.generate().save(self.root / "keys" / "record.pem")
        write_secret(self.root / "keys" / "pseudonym.key", secrets.token_bytes(32))
        write_atomically(self.root / "predict.yaml", TEMPLATE.replace("FINGERPRINT", fingerprint).encode())

    def settings(self) -> Settings:
        """Contents of predict.yaml; raises ConfigurationError with file, line and key."""
        file = self.root / "predict.yaml"
        if not file.exists():
            raise ConfigurationError(
                f"{self.root} is no prediction service's home; consilium-predict init makes one (or give --home)"
            )
        return load_yaml(file, Settings)

    def identity(self) -> Identity:
        """Key that signs the record."""
        return Identity.load(self.root / "keys" / "record.pem")

    def pseudonym(self, data: bytes) -> str:
        """Pseudonym of an identifier, 32 hex digits: the same for the same one, and without the key nobody's."""
        return hmac.new(self._pseudonym_key, data, hashlib.sha256).hexdigest()[:32]

    @cached_property
    def _pseudonym_key(self) -> bytes:
        file = self.root / "keys" / "pseudonym.key"
        try:
            key = file.read_bytes()
        except OSError as error:
            raise ConfigurationError(f"cannot read {file}: {error.strerror}; restore it from the backup") from error
        if len(key) != 32:
            raise IntegrityError(f"{file} is damaged; restore it from the backup")
        return key

    def tokens(self) -> dict[str, str]:
        """SHA-256 of each token, by the name of who has it; raises IntegrityError."""
        file = self.root / "tokens.json"
        try:
            found = json.loads(file.read_bytes()) if file.exists() else {}
            return {str(name): str(digest) for name, digest in found.items() if str(digest).isascii()}
        except (ValueError, AttributeError, OSError) as error:
            raise IntegrityError(f"{file} is damaged; delete it and make new tokens") from error

    def new_token(self, name: str) -> str:
        """A token of a client; a second one under the same name replaces the first."""
        token = secrets.token_urlsafe(32)
        kept = {**self.tokens(), name: hashlib.sha256(token.encode()).hexdigest()}
        write_atomically(self.root / "tokens.json", json.dumps(kept, indent=2, sort_keys=True).encode() + b"\n")
        return token

    def revoke(self, name: str) -> None:
        """Forget a client's token; raises ConfigurationError where there is none."""
        kept = self.tokens()
        if kept.pop(name, None) is None:
            raise ConfigurationError(f"no token of {name!r}; there are {', '.join(sorted(kept)) or 'none'}")
        write_atomically(self.root / "tokens.json", json.dumps(kept, indent=2, sort_keys=True).encode() + b"\n")
