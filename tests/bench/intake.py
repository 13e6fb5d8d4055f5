"""Inputs as hospitals have them, through the real intake: what is wanted of each, what happened, docs/results/data.md.

    make intake

``intake_cases.yaml`` says what is wanted; the inputs themselves are in ``intake_inputs.tar.xz``, and the large ones are
made here. DICOM files are those that pydicom brings, and where CONSILIUM_DATA names the folder of published sets those
of its dicom_dev.tar.xz, of which the pixels are known.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from tests.bench import intake_dicom, intake_files
from tests.support import studies

from consilium_client import data
from consilium_client.data import dicom, table, timeseries
from consilium_client.data.asset import AssetSpec, DicomAsset, TableAsset, TimeseriesAsset
from consilium_client.data.report import SetAside
from consilium_shared.errors import DataError
from consilium_shared.study import Study

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "results" / "data.md"
SECONDS, BYTES = 240, 6 * 2**30
"""An input that takes longer, or a process that takes more than this, is wrong."""
NOBODY = 65534
HEAD = """\
# What becomes of a hospital's files

Made by `make intake`. {right} of {all} inputs came out as wanted.

## Inputs with a trap

Small studies and assets, each through the reader that a study uses. Some inputs stand here twice: as they are, and \
with what a site can declare about them. Most repeat what users of other programs reported. Wanted are the texts of \
the third column, in what the fourth says: records and patients with the mean of their prepared inputs (of images 0 \
is black and 1 white), or the reason why nothing is used. What is set aside is shown with its first place, as \
`consilium-site data check` shows it to the hospital's own people.

| | input | wanted | what happened | s |
|---|---|---|---|---|
"""
READERS = (dicom, table, timeseries)
"""Imported before the first input, so that no input's time holds it."""


class Case(NamedTuple):
    """One input.

    Attributes:
        name: of its folder, and after a blank of another way to declare it.
        what: it is, in words.
        wanted: texts that what happens must hold.
        options: what a site or study declares besides the smallest.
    """

    name: str
    what: str
    wanted: tuple[str, ...]
    options: dict[str, Any] = {}  # noqa: RUF012

    @property
    def folder(self) -> str:
        """Name of the input's folder."""
        return self.name.split()[0]


def cases() -> list[Case]:
    """All of them."""
    read = yaml.safe_load((HERE / "intake_cases.yaml").read_text(encoding="utf-8"))
    return [Case(str(each["name"]), each["what"], tuple(each["wanted"]), each.get("options", {})) for each in read]


def pictures(options: dict[str, Any]) -> tuple[Study, AssetSpec]:
    """A study of chest images, and an asset that links by patient unless the options say otherwise."""
    image = {"size": 32, **options.pop("image", {})}
    label = {"column": "finding", "classes": ["normal", "pneumonia"]}
    study = studies.study("small-cnn", {"image": image, "label": label})
    return study, DicomAsset.model_validate({"kind": "dicom", "path": "dicom", "table": "labels.csv", **options})


def rows(options: dict[str, Any]) -> tuple[Study, AssetSpec]:
    """A study of age, and a table."""
    features = options.pop("features", [{"name": "age", "center": 60, "scale": 10}])
    refuse, split = options.pop("refuse", False), options.pop("split", None)
    label = {"column": "y", "classes": options.pop("classes", ["0", "1"])}
    evaluation = {"evaluation": {"split": None, "split_column": split}} if split else {}
    part = {"features": features, "label": label, "missing": "refuse" if refuse else "center"}
    asset = TableAsset.model_validate({"kind": "table", "path": "t.csv", **options})
    return studies.study("logistic", part, **evaluation), asset


def series(options: dict[str, Any]) -> tuple[Study, AssetSpec]:
    """A study of two hours of one variable, and its samples."""
    name, limits = options.pop("variable_name", "hr"), options.pop("limits", {})
    part = {"variables": [{"name": name, **limits}], "bins": 2, "step_minutes": 60}
    study = studies.study({"name": "gru", "hidden": 4}, {"series": part})
    return study, TimeseriesAsset.model_validate({"kind": "timeseries", "series": "s.csv", "table": "l.csv", **options})


KINDS = {"c": pictures, "d": pictures, "f": pictures, "t": rows, "s": series}


def listed(title: str, counts: SetAside) -> str:
    """Counts under their reasons, with the first place."""
    first = {reason: places.split("; ")[0] for reason, places in counts.first.items()}
    found = ", ".join(
        f"{count} × {reason}" + (f" ({first[reason]})" if reason in first else "")
        for reason, count in counts.counts.items()
    )
    return f"; {title}: {found}" if found else ""


def happened(case: Case, folder: Path) -> str:
    """One line about what the intake made of an input."""
    study, asset = KINDS[case.name[0]](dict(case.options))
    try:
        found = data.load(asset.at(folder), study)
    except DataError as error:
        return f"nothing used: {error}"
    taken = found.take(np.arange(len(found))).inputs[0]
    report = found.report
    return (
        f"{len(found)} records of {found.patient_count} patients; mean {taken.mean():.3g}, largest {taken.max():.3g}"
        + listed("set aside", report.set_aside)
        + listed("values", report.values)
        + listed("noted", report.notes)
    )


def bounded(work: Callable[[], str], nobody: bool = False) -> str:
    """What the work gives in a process of its own, with bounds; ``nobody``: under an account that owns nothing."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        signal.alarm(SECONDS)
        if nobody and os.getuid() == 0:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        try:
            text = work()
        except BaseException as error:
            text = f"defect: {error!r}"
        try:
            os.write(writing, text.encode("utf-8", "replace"))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    return text or f"ended by signal {os.WTERMSIG(status)}"


def table_of(folder: Path) -> Iterator[tuple[bool, str]]:
    """Whether each input came out as wanted, and its line."""
    with tarfile.open(HERE / "intake_inputs.tar.xz") as archive:
        archive.extractall(folder, filter="tar")  # a named pipe and links are among them
    folder.chmod(0o755)
    for case in cases():
        place = folder / case.folder
        intake_files.make(case.folder, place)
        began = time.monotonic()
        text = bounded(lambda case=case, place=place: happened(case, place), nobody=case.name in ("f01", "f02"))
        seconds = time.monotonic() - began
        right = all(each in text for each in case.wanted)
        text = text.replace(f"{place}/", "").replace(str(place), "…")
        wanted = "; ".join(each.rstrip(",") for each in case.wanted)
        parts = [case.name, case.what, wanted, ("" if right else "**wrong**: ") + text, f"{seconds:.1f}"]
        yield right, "| " + " | ".join(cell(part) for part in parts) + " |"


def cell(text: str) -> str:
    """A text as it stands in a table of a page."""
    shown = re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return shown.replace("\\*\\*wrong\\*\\*", "**wrong**").encode("utf-8", "replace").decode()


def main() -> None:
    """Write the page."""
    with tempfile.TemporaryDirectory() as folder:
        found = list(table_of(Path(folder)))
    right = sum(each for each, _ in found)
    page = HEAD.format(right=right, all=len(found)) + "\n".join(line for _, line in found) + "\n"
    PAGE.write_text(page + "\n" + intake_dicom.section(), encoding="utf-8")
    print(f"{right} of {len(found)} as wanted; {PAGE}")
    raise SystemExit(right != len(found))


if __name__ == "__main__":
    main()
