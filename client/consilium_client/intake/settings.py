"""The ``intake:`` of site.yaml: where data of the hospital's systems comes from, and what is made of it."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from consilium_client.intake.certificates import Certificates, Column, Port
from consilium_client.intake.fhir_server import FhirServer
from consilium_client.intake.sql_settings import SqlExport
from consilium_shared.config import Strict
from consilium_shared.fields import Name

AeTitle = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]([A-Za-z0-9_.\- ]{0,14}[A-Za-z0-9_.\-])?$")]
"""Application entity title (PS3.8): at most 16 characters, as both ends have been told."""
Host = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[A-Za-z0-9.:\-_]+$")]


class Peer(Strict):
    """An archive or a modality that may send: its title together with where it sends from."""

    ae_title: AeTitle
    addresses: Annotated[list[str], Field(min_length=1, max_length=64)]
    """IP addresses or networks (``10.1.2.0/24``)."""

    @field_validator("addresses")
    @classmethod
    def _networks(cls, addresses: list[str]) -> list[str]:
        for address in addresses:
            try:
                ipaddress.ip_network(address)
            except ValueError as error:
                raise ValueError(f"not an IP address or network: {error}") from None
        return addresses

    def sends_from(self, address: str) -> bool:
        """True where this peer may send from an IP address.

        >>> Peer(ae_title="PACS", addresses=["10.1.2.0/24"]).sends_from("10.1.2.7")
        True
        """
        found = ipaddress.ip_address(address.split("%")[0])
        mapped = getattr(found, "ipv4_mapped", None) or found
        return any(mapped in ipaddress.ip_network(network) for network in self.addresses)


class Receive(Strict):
    """The storage SCP of this site, ``consilium-site receive``."""

    ae_title: AeTitle = "CONSILIUM"
    host: Host = "0.0.0.0"  # noqa: S104  (a receiver listens where the archives reach it; the allow-list decides)
    port: Port = 11112
    peers: Annotated[list[Peer], Field(min_length=1, max_length=256)]
    """Peers that may send. Others are turned away: by address before a byte is read, by title at the association."""
    tls: Certificates | None = None
    """TLS files; each peer must show a certificate that ``ca`` signed."""
    associations: Annotated[int, Field(ge=1, le=100)] = 10
    """Connections at once, associated or not."""
    timeout: Annotated[float, Field(gt=0, le=3600)] = 60.0
    """Seconds without progress after which a connection is closed."""
    unit: bool = False
    """True: the receiver is started apart, as by a unit with an account of its own; ``consilium-site up`` leaves it."""

    def knows(self, title: str, address: str) -> bool:
        """True where a peer of this title may send from an IP address."""
        return any(peer.ae_title == title and peer.sends_from(address) for peer in self.peers)

    def at(self, base: Path) -> Receive:
        """Copy of the settings whose paths start from the folder ``base``."""
        return self.model_copy(update={"tls": None if self.tls is None else self.tls.at(base)})

    @model_validator(mode="after")
    def _own_certificate(self) -> Self:
        if self.tls is not None and self.tls.certificate is None:
            raise ValueError("tls: a receiver needs certificate and key")
        return self


class Limits(Strict):
    """Bounds of what comes in, whichever way it comes."""

    object_mib: Annotated[int, Field(ge=1, le=65536)] = 4096
    """Largest instance, MiB."""
    inbox_gib: Annotated[float, Field(gt=0)] = 500.0
    """Most that the inbox may hold, GiB."""
    keep_free_gib: Annotated[float, Field(ge=0)] = 10.0
    """Space that stays free on the inbox's disk, GiB."""


class DimseArchive(Strict):
    """An archive asked by C-FIND and C-GET or C-MOVE."""

    kind: Literal["dimse"]
    ae_title: AeTitle
    host: Host
    port: Port
    retrieve: Literal["get", "move"] = "get"
    """``move``: the archive sends to ``receive``'s title and port, which it must know."""
    calling: AeTitle = "CONSILIUM"
    """Title under which this site asks."""
    tls: Certificates | None = None
    timeout: Annotated[float, Field(gt=0, le=3600)] = 60.0

    def at(self, base: Path) -> DimseArchive:
        """Copy of the archive whose paths start from the folder ``base``."""
        return self.model_copy(update={"tls": None if self.tls is None else self.tls.at(base)})


class WebArchive(Strict):
    """An archive asked by DICOMweb: QIDO-RS and WADO-RS."""

    kind: Literal["dicomweb"]
    url: Annotated[str, Field(pattern=r"^https?://[^\s?#@]+$", max_length=1000)]
    """Address of the service, such as ``https://pacs.hospital/dicom-web``."""
    tls: Certificates | None = None
    token: Path | None = None
    """File with a bearer token. Read at each start, so that another program may renew it."""
    password: Path | None = None
    """File with ``user:password``."""
    timeout: Annotated[float, Field(gt=0, le=3600)] = 60.0

    def at(self, base: Path) -> WebArchive:
        """Copy of the archive whose paths start from the folder ``base``."""
        return self.model_copy(
            update={
                "tls": None if self.tls is None else self.tls.at(base),
                "token": None if self.token is None else base / self.token,
                "password": None if self.password is None else base / self.password,
            }
        )

    @model_validator(mode="after")
    def _protected(self) -> Self:
        if self.token is not None and self.password is not None:
            raise ValueError("give token or password, not both")
        if self.url.startswith("http://"):
            host = self.url.removeprefix("http://").split("/")[0].rsplit(":", 1)[0]
            if host not in {"127.0.0.1", "localhost", "[::1]"}:
                raise ValueError("url: https is needed; http is for an archive on this machine alone")
        elif self.tls is None:
            raise ValueError("tls: name the file of the CA that signed the archive's certificate, as tls: {ca: FILE}")
        return self


Archive = Annotated[DimseArchive | WebArchive, Field(discriminator="kind")]

ShiftDays = Annotated[int, Field(ge=1, le=36500)]
Option = Literal["patient-characteristics", "device", "times"]
Suspect = Literal["secondary-capture", "derived-secondary", "ultrasound"]


class LabelTable(Strict):
    """A CSV table of the hospital's whose people, images and dates get the same new names as the images."""

    source: Path
    to: Path
    patient: str
    """Column with the PatientID."""
    uids: list[str] = Field(default_factory=list)
    """Columns with study, series or instance UIDs: they become the new ones."""
    dates: list[str] = Field(default_factory=list)
    """Columns with dates (YYYY-MM-DD or YYYYMMDD): shifted as the patient's images are."""
    numbers: list[str] = Field(default_factory=list)
    """Columns with numbers, whose decimal mark becomes a point. What is no number is left empty, and counted."""
    keep: list[str] = Field(default_factory=list)
    """Columns that stay as they are. All other columns are left out."""
    delimiter: Literal[",", ";", "\t", "|"] = ","
    decimal: Literal[".", ","] = "."
    """Decimal mark of ``numbers``; the other of the two may stand between thousands."""
    encoding: Literal["utf-8", "cp1252", "iso-8859-1", "utf-16"] = "utf-8"

    def at(self, base: Path) -> LabelTable:
        """Copy of the table whose paths start from the folder ``base``."""
        return self.model_copy(update={"source": base / self.source, "to": base / self.to})


class Deidentify(Strict):
    """Rules of de-identification: what of an instance stays, and where it goes."""

    to: Path
    """Folder for the de-identified files: an asset's ``path``."""
    retain: list[Option] = Field(default_factory=list)
    """Options of PS3.15 Annex E: sex, age, size and weight; the device's make; times of day."""
    permit: list[Suspect] = Field(default_factory=list)
    """Kinds of image that would be set aside for text that may stand in their pixels, and that somebody looked at."""
    originals: Literal["delete", "keep"] = "delete"
    """Fate of a file in the inbox once its de-identified form is on the disk."""
    tables: list[LabelTable] = Field(default_factory=list)

    def at(self, base: Path) -> Deidentify:
        """Copy of the settings whose paths start from the folder ``base``."""
        tables = [table.at(base) for table in self.tables]
        return self.model_copy(update={"to": base / self.to, "tables": tables})


Code = Annotated[str, Field(pattern=r"^[^\s|]+\|[^\s|]+$", max_length=300)]
"""``system|code``, as ``http://loinc.org|2345-7``."""
Unit = Annotated[str, Field(min_length=1, max_length=60)]


class Variable(Strict):
    """One variable of the tables: which observations give it, and in which unit."""

    codes: Annotated[list[Code], Field(min_length=1)]
    unit: Unit
    """The table's unit, in UCUM's spelling; values in another one are converted, or set aside where that cannot be."""
    molar_mass: Annotated[float, Field(gt=0)] | None = None
    """g/mol, where some values are amounts (mmol/L) and others masses (mg/dL)."""
    spellings: dict[Annotated[str, Field(max_length=60)], Unit] = Field(default_factory=dict)
    """Units that a source writes otherwise than UCUM -> UCUM's; the empty text is a value without a unit."""
    low: float | None = None
    high: float | None = None
    take: Literal["first", "last", "mean", "min", "max"] = "last"
    """The one value of a patient in the patients' table."""


class Flag(Strict):
    """A column of 0 and 1: does any resource of the patient's assert one of the codes?"""

    resource: Literal["Condition", "MedicationStatement", "DiagnosticReport"] = "Condition"
    codes: Annotated[list[Code], Field(min_length=1)]
    """Codes that set the flag; of a report, those of its conclusion."""


class Tables(Strict):
    """A folder of exported resources or messages, and the two tables that are made of it."""

    folder: Path
    patients: Path
    """CSV to write: a row a patient; the label table of a ``timeseries`` asset, or the ``path`` of a ``table``."""
    samples: Path
    """CSV to write: a row a sample; the ``series`` of a ``timeseries`` asset."""
    variables: dict[Column, Variable]
    flags: dict[Column, Flag] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_meaning(self) -> Self:
        own = {"patient", "sex", "age", "start"}
        twice = (own | self.variables.keys()) & self.flags.keys() or own & self.variables.keys()
        if twice:
            raise ValueError(f"two columns of the name {sorted(twice)[0]!r}")
        owners: dict[str, str] = {}
        for name, variable in self.variables.items():
            for code in variable.codes:
                if owners.setdefault(code, name) != name:
                    raise ValueError(f"{code} is declared for {owners[code]!r} and for {name!r}")
        return self

    def at(self, base: Path) -> Self:
        """Copy of the export whose paths start from the folder ``base``."""
        return self.model_copy(update={name: base / getattr(self, name) for name in ("folder", "patients", "samples")})


class FhirExport(Tables):
    """A folder of a FHIR R4 bulk export (NDJSON)."""

    identifier: Annotated[str, Field(min_length=1, max_length=300)] | None = None
    """System of the patients' identifier that the archive's PatientID is; without it their FHIR ``id`` counts."""
    server: FhirServer | None = None
    """Server that ``consilium-site pull-fhir`` asks for the export; None: somebody puts it into ``folder``."""

    def at(self, base: Path) -> FhirExport:
        """Copy of the export whose paths start from the folder ``base``."""
        server = None if self.server is None else self.server.at(base)
        return super().at(base).model_copy(update={"server": server})


class Hl7Export(Tables):
    """A folder of HL7 v2 messages with results (``*.hl7``), as an interface engine writes them."""

    identifier: Annotated[str, Field(min_length=1, max_length=300)]
    """Authority of the patients' identifier that the archive's PatientID is, as PID-3.4 has it: its name or its OID."""

    @model_validator(mode="after")
    def _diagnoses(self) -> Self:
        for name, flag in self.flags.items():
            if flag.resource != "Condition":
                raise ValueError(f"flags: {name}: messages have diagnoses (DG1) alone, as Condition")
        return self


class Intake(Strict):
    """Intake of data from the hospital's systems. Absent: it does not."""

    inbox: Path | None = None
    """Folder of received files, with the patients' names in them; ``intake/inbox`` in the home folder by default."""
    limits: Limits = Limits()
    receive: Receive | None = None
    archives: dict[Name, Archive] = Field(default_factory=dict)
    deidentify: Deidentify | None = None
    fhir: dict[Name, FhirExport] = Field(default_factory=dict)
    hl7: dict[Name, Hl7Export] = Field(default_factory=dict)
    sql: dict[Name, SqlExport] = Field(default_factory=dict)
    shift_days: ShiftDays = 3650
    """Dates of one patient all move back by one number of days, 1 … ``shift_days``; the site's key gives it."""
