"""Settings of a database, or a folder of its exported tables: which rows are records and which samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from consilium_client.data.dialect import PLAIN, Dialect
from consilium_client.intake.certificates import Certificates, Column, Port
from consilium_shared.config import Strict
from consilium_shared.fields import Positive
from consilium_shared.inputs import UnitName

TableName = Annotated[str, Field(min_length=1, max_length=128, pattern=r'^[^."\x00-\x1f]+(\.[^."\x00-\x1f]+)?$')]
"""Name of a table or view, or ``schema.name``."""
Ref = Annotated[str, Field(min_length=1, max_length=256, pattern=r'^[^."\x00-\x1f]+(\.[^."\x00-\x1f]+)?$')]
"""Name of a column of the table that is read, or ``table.column`` of one that is joined."""
Word = str | int | float | bool
TimeUnit = Literal["milliseconds", "seconds", "minutes", "hours", "days", "timestamp"]
Concept = Annotated[int, Field(ge=0)]


class Between(Strict):
    """Range of a column; numbers are compared as numbers, text as text."""

    at_least: Word | None = None
    below: Word | None = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.at_least is None and self.below is None:
            raise ValueError("give at_least or below")
        return self


class Join(Strict):
    """A table joined to those before it."""

    table: TableName
    match: Annotated[dict[Ref, Ref], Field(min_length=1)]
    """Column of a table before it -> column of this one."""
    keep: bool = False
    """True: rows without a partner stay."""


class Rows(Strict):
    """Rows that are read: a table, others joined to it, and conditions that all hold."""

    table: TableName
    join: list[Join] = Field(default_factory=list)
    where: dict[Ref, Word | list[Word] | Between] = Field(default_factory=dict)


class Records(Rows):
    """Records, a row each: a patient, or a stay of one."""

    patient: Ref
    record: Ref | None = None
    """Column that identifies a record, where a patient may have several; all of a patient are one unit of privacy."""
    start: Ref | None = None
    """Moment (or offset) from which samples' times count; without it they are offsets from the record's start."""
    end: Ref | None = None
    """Moment (or offset) at which a record ends: later samples are not its."""
    columns: dict[Column, Ref] = Field(default_factory=dict)
    """Columns of the records' table, targets and constants of a record, as the source writes them."""


class Samples(Rows):
    """Samples: a row each (``value``, with ``item`` and ``items``), or a row a moment (``values``)."""

    record: Ref
    """Column with the record; with the patient where records have none of their own."""
    time: Ref
    time_unit: TimeUnit = "timestamp"
    item: Ref | None = None
    items: dict[Column, list[Word]] = Field(default_factory=dict)
    """Variable -> what stands in ``item`` for it."""
    value: Ref | None = None
    unit: Ref | None = None
    values: dict[Column, Ref] = Field(default_factory=dict)
    """Variable -> the column with its values."""

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        long = self.item is not None and self.value is not None and bool(self.items)
        if long == bool(self.values) or (self.values and (self.item or self.value or self.items or self.unit)):
            raise ValueError("give either item, items and value (with unit, if there is one), or values")
        words = [str(word) for some in self.items.values() for word in some]
        if len(set(words)) < len(words):
            raise ValueError("items: one item stands for two variables")
        return self


class Variable(Strict):
    """Unit and bounds of a variable."""

    unit: UnitName | None = None
    """Unit of the table that is written, in UCUM's spelling; values in another are converted. None: as they are."""
    molar_mass: Positive | None = None
    spellings: dict[Annotated[str, Field(max_length=60)], UnitName] = Field(default_factory=dict)
    """Units as the source writes them -> UCUM's; the empty text is a value without a unit."""
    low: float | None = None
    high: float | None = None


class Concepts(Strict):
    """A variable of OMOP: the measurements or observations of these concepts."""

    measurements: list[Concept] = Field(default_factory=list)
    observations: list[Concept] = Field(default_factory=list)

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.measurements and not self.observations:
            raise ValueError("give measurements or observations: ids of concepts")
        return self


class Outcome(Strict):
    """A column of 1 and 0: does one of these conditions begin within the days after the index date?

    Empty where nobody can know: none did, and the patient was not observed so long.
    """

    conditions: Annotated[list[Concept], Field(min_length=1)]
    within_days: Annotated[int, Field(ge=1, le=36500)]


class Index(Strict):
    """Records of OMOP: each visit of these concepts, or each person's first of these conditions."""

    visits: list[Concept] = Field(default_factory=list)
    conditions: list[Concept] = Field(default_factory=list)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if bool(self.visits) == bool(self.conditions):
            raise ValueError("give visits or conditions: ids of concepts")
        return self


class Omop(Strict):
    """Tables of the OMOP Common Data Model 5.x, as records and samples."""

    index: Index
    variables: dict[Column, Concepts] = Field(default_factory=dict)
    outcomes: dict[Column, Outcome] = Field(default_factory=dict)
    descendants: bool = True
    """Take concepts with all that stand below them in ``concept_ancestor``."""


class PostgreSql(Strict):
    """A PostgreSQL server, read in one transaction that cannot write."""

    kind: Literal["postgresql"]
    host: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^(/[^\x00,]*|[A-Za-z0-9.:\-_]+)$")]
    """Name or address; or the folder of its Unix socket."""
    port: Port = 5432
    database: Annotated[str, Field(min_length=1, max_length=63)]
    user: Annotated[str, Field(min_length=1, max_length=63)]
    password: Path | None = None
    """File with the password."""
    password_env: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]{0,63}$")] | None = None
    """Environment variable with the password."""
    db_schema: Annotated[str, Field(min_length=1, max_length=63, alias="schema")] = "public"
    """Schema of tables that are named without one."""
    tls: Certificates | None = None
    timeout: Annotated[int, Field(ge=1, le=86400)] = 3600
    """Seconds that one statement may take."""

    @model_validator(mode="after")
    def _protected(self) -> Self:
        if self.password is not None and self.password_env is not None:
            raise ValueError("give password or password_env, not both")
        here = self.host.startswith("/") or self.host in {"127.0.0.1", "::1", "localhost"}
        if not here and self.tls is None:
            raise ValueError("tls: name the file of the CA that signed the server's certificate, as tls: {ca: FILE}")
        return self

    def at(self, base: Path) -> PostgreSql:
        """Copy whose paths start from the folder ``base``."""
        password = None if self.password is None else base / self.password
        return self.model_copy(update={"password": password, "tls": None if self.tls is None else self.tls.at(base)})


class Folder(Strict):
    """A folder of exported tables, each ``NAME.csv``, ``NAME.csv.gz`` or ``NAME.parquet``, at any depth."""

    kind: Literal["folder"]
    path: Path
    csv: Dialect = PLAIN
    memory_mib: Annotated[int, Field(ge=256, le=2**20)] = 4096
    """Most memory for joins, MiB."""

    @model_validator(mode="after")
    def _readable(self) -> Self:
        if self.csv.encoding not in ("utf-8", "iso8859-1", "utf-16") or self.csv.decimal != ".":
            raise ValueError("csv: exported tables are UTF-8, latin-1 or utf-16, with decimal points")
        return self

    def at(self, base: Path) -> Folder:
        """Copy whose path starts from the folder ``base``."""
        return self.model_copy(update={"path": base / self.path})


class SqlExport(Strict):
    """Records and samples of a database, and the two tables that are made of them."""

    source: Annotated[PostgreSql | Folder, Field(discriminator="kind")]
    to: Path
    """Parquet file with a row a record: the ``table`` of a ``timeseries`` asset, or the ``path`` of a ``table``."""
    samples_to: Path | None = None
    """Parquet file with a row a sample: the ``series`` of a ``timeseries`` asset."""
    records: Records | None = None
    samples: list[Samples] = Field(default_factory=list)
    omop: Omop | None = None
    variables: dict[Column, Variable] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.records is None) == (self.omop is None):
            raise ValueError("give records (with samples), or omop")
        if self.omop is not None and self.samples:
            raise ValueError("samples go with records; omop has variables")
        if (self.samples_to is None) == bool(self.samples or (self.omop and self.omop.variables)):
            raise ValueError("samples_to is where samples are written: give it where there are some, and only there")
        columns = self.records.columns if self.records is not None else self.omop.outcomes if self.omop else {}
        own = {"patient", "record"} | ({"sex", "age"} if self.omop else set())
        if twice := sorted(own & columns.keys()):
            raise ValueError(f"two columns of the name {twice[0]!r}")
        if unknown := sorted(self.variables.keys() - self.names()):
            raise ValueError(f"variables: no sample is of {unknown[0]!r}")
        return self

    def names(self) -> set[str]:
        """Variables that the samples have."""
        if self.omop is not None:
            return set(self.omop.variables)
        return {name for some in self.samples for name in (*some.items, *some.values)}

    def at(self, base: Path) -> SqlExport:
        """Copy whose paths start from the folder ``base``."""
        samples_to = None if self.samples_to is None else base / self.samples_to
        return self.model_copy(update={"source": self.source.at(base), "to": base / self.to, "samples_to": samples_to})
