"""Assets: where a site's own files lie and how they are named, the ``assets:`` of ``site.yaml``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from consilium_client.data.dialect import PLAIN, Dialect
from consilium_shared.config import Strict
from consilium_shared.fields import Positive
from consilium_shared.inputs import Selection, UnitName

ColumnName = Annotated[str, Field(min_length=1, max_length=256)]
TimeUnit = Literal["seconds", "minutes", "hours", "days", "timestamp"]


class Unit(Strict):
    """Unit of a variable at this site, in UCUM's spelling."""

    unit: UnitName
    molar_mass: Positive | None = None
    """Mass of a mole of the substance in g/mol, where an amount becomes a mass or the other way round."""


class _Asset(Strict):
    """Common part of every kind of asset: a table with one row a record or a patient, and this site's names."""

    patient: ColumnName = "patient"
    """Column that identifies the patient. Never leaves the data package: records carry patient numbers."""
    columns: dict[ColumnName, ColumnName] = Field(default_factory=dict)
    """The study's name of a column or variable -> this site's name, where the two differ."""
    csv: Dialect = PLAIN
    """Dialect of the asset's CSV files, and the sheet of its workbooks."""
    units: dict[ColumnName, UnitName | Unit] = Field(default_factory=dict)
    """The study's name of a numeric variable -> its unit here; it is converted to the study's."""
    missing: tuple[str, ...] = ()
    """Words and numbers that mean nothing is known, in every variable and target of a study."""
    missing_in: dict[ColumnName, tuple[str, ...]] = Field(default_factory=dict)
    """The study's name of a variable -> further such codes in it alone."""
    values: dict[ColumnName, dict[str, str]] = Field(default_factory=dict)
    """The study's name of a variable or target -> words here -> the study's words, or numbers."""

    def here(self, name: str) -> str:
        """Name at this site of the study's column or variable ``name``."""
        return self.columns.get(name, name)


class DicomAsset(_Asset):
    """A folder of DICOM files (searched to any depth) and a label table.

    An image is linked to its row by its PatientID; or, where the table has a row an image, by the column ``file`` (the
    file's name relative to ``path``) or ``instance`` (its SOPInstanceUID). Then the table's patient counts, and an
    image whose PatientID says otherwise is set aside; unless ``identity`` is ``table``: then the table alone says whose
    it is, as in research exports whose files carry another name or everybody's the same.
    """

    kind: Literal["dicom"]
    path: Path
    table: Path
    file: ColumnName | None = None
    instance: ColumnName | None = None
    series: ColumnName | None = None
    """Column with the SeriesInstanceUID, where the table has a row a series."""
    identity: Literal["both", "table"] = "both"
    select: Selection | None = None
    """Images of this asset that count, on top of what a study selects."""

    @model_validator(mode="after")
    def _one_link(self) -> Self:
        if sum(each is not None for each in (self.file, self.instance, self.series)) > 1:
            raise ValueError("give one of file, instance, series")
        if self.identity == "table" and self.link is None:
            raise ValueError("identity: table needs file, instance or series: which row is an image's?")
        return self

    @property
    def link(self) -> str | None:
        """Column that links a row to an image or series; None where the patient does."""
        return self.file or self.instance or self.series

    def at(self, base: Path) -> DicomAsset:
        """Copy of the asset whose paths start from the folder ``base``."""
        return self.model_copy(update={"path": base / self.path, "table": base / self.table})


PLACEHOLDERS = ("patient", "label", "split")
"""Names that a layout of picture files may give to parts of their paths."""


class PicturesAsset(_Asset):
    """A folder of PNG, JPEG and TIFF files, or of NIfTI volumes for a study of volumes (searched to any depth): whose
    each is, the site says in one of two ways.

    With ``table``, a label table with a row a file, named in the column ``file`` relative to ``path``. With
    ``layout``, the files' own paths: ``{label}/{patient}_*.png`` takes the class from the folder and the patient from
    the name up to the first underscore; ``*`` stands for anything within a name, ``{split}`` for train or test. There
    is no third way: a file is never taken for a patient of its own unless the layout says that its name is one.
    """

    kind: Literal["pictures"]
    path: Path
    table: Path | None = None
    file: ColumnName = "file"
    layout: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    modality: Annotated[str, Field(pattern=r"^[A-Z]{2,16}$")] | None = None
    """Modality of all of the pictures, which their files do not tell: GM or XC of photographs, SM of slides, ES …"""

    @model_validator(mode="after")
    def _whose(self) -> Self:
        if (self.table is None) == (self.layout is None):
            raise ValueError("give table, or layout: how else is it known whose a picture is?")
        if self.layout is not None:
            found = re.findall(r"\{([^{}]*)\}", self.layout)
            if len(set(found)) != len(found) or not set(found) <= set(PLACEHOLDERS):
                raise ValueError(f"layout has each of {', '.join(PLACEHOLDERS)} in braces once at most, and no other")
            if "patient" not in found:
                raise ValueError(
                    "layout says with {patient} whose a picture is; where each is of another: {patient}.png"
                )
        return self

    def at(self, base: Path) -> PicturesAsset:
        """Copy of the asset whose paths start from the folder ``base``."""
        table = None if self.table is None else base / self.table
        return self.model_copy(update={"path": base / self.path, "table": table})


class TimeseriesAsset(_Asset):
    """A table of samples and a label table, both CSV or Parquet.

    ``layout: long`` has a row a sample (patient, [record,] time, variable, value); ``layout: wide`` a row a moment,
    with a column for each variable. With ``record`` a patient may have several records (stays, beats), and the label
    table has a row each; without it a patient is one record.
    """

    kind: Literal["timeseries"]
    series: Path
    table: Path
    layout: Literal["long", "wide"] = "long"
    record: ColumnName | None = None
    time: ColumnName = "time"
    time_unit: TimeUnit = "minutes"
    """Unit of ``time`` since the record's start; ``timestamp`` is a moment (ISO 8601) and needs ``start``."""
    start: ColumnName | None = None
    """Column of the label table with the moment at which a record starts."""
    variable: ColumnName = "variable"
    value: ColumnName = "value"

    @model_validator(mode="after")
    def _start_of_timestamps(self) -> Self:
        if (self.time_unit == "timestamp") != (self.start is not None):
            raise ValueError("start (a column of the label table) goes with time_unit: timestamp, and only with it")
        return self

    def at(self, base: Path) -> TimeseriesAsset:
        """Copy of the asset whose paths start from the folder ``base``."""
        return self.model_copy(update={"series": base / self.series, "table": base / self.table})


class TableAsset(_Asset):
    """A CSV or Parquet table with a row a record: patient, label and features."""

    kind: Literal["table"]
    path: Path
    record: ColumnName | None = None
    """Column that identifies a record. Without it only rows that agree in every column used count as one."""

    def at(self, base: Path) -> TableAsset:
        """Copy of the asset whose path starts from the folder ``base``."""
        return self.model_copy(update={"path": base / self.path})


AssetSpec = Annotated[DicomAsset | PicturesAsset | TimeseriesAsset | TableAsset, Field(discriminator="kind")]
