"""Inputs too large to be kept in the repository, made when they are needed."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from pydicom.uid import DeflatedExplicitVRLittleEndian

from consilium_deploy.dicom_files import Scanner, write_radiograph

RAMP = np.tile(np.linspace(0.0, 1.0, 32), (32, 1))
LABELS = "patient,finding\np1,normal\np2,pneumonia\n"


def make(case: str, folder: Path) -> None:
    """Add to an input's folder what is not kept of it."""
    folder.mkdir(exist_ok=True)
    if case[0] in "cdf":
        (folder / "dicom").mkdir(exist_ok=True)
        if not (folder / "labels.csv").exists():
            (folder / "labels.csv").write_text(LABELS)
    if case in _MADE:
        _MADE[case](folder)


def _image(path: Path, grey: np.ndarray = RAMP, bits: int = 8) -> pydicom.Dataset:
    write_radiograph(path, grey, "p1", path.name, Scanner(bits))
    return pydicom.dcmread(path)


def _deflated(mebibytes: int) -> Callable[[Path], None]:
    """A deflated file with so many MiB of zeros in a private tag, which is never held whole."""

    def write(folder: Path) -> None:
        path = folder / "dicom" / "a.dcm"
        dataset = _image(path)
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        dataset.save_as(path, enforce_file_format=True)
        raw = path.read_bytes()
        head = 132 + 12 + int.from_bytes(raw[140:144], "little")
        packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        length = mebibytes << 20
        parts = [packer.compress(zlib.decompress(raw[head:], -zlib.MAX_WBITS))]
        parts.append(packer.compress(b"\xf1\x7f\x10\x00LO" + (4).to_bytes(2, "little") + b"SYN "))
        parts.append(packer.compress(b"\xf1\x7f\x01\x10OB\0\0" + length.to_bytes(4, "little")))
        zeros = bytes(1 << 20)
        parts += [packer.compress(zeros) for _ in range(mebibytes)]
        path.write_bytes(raw[:head] + b"".join(parts) + packer.flush())

    return write


def _large(folder: Path) -> None:
    _image(folder / "dicom" / "a.dcm", np.tile(np.linspace(0, 1, 9000), (9000, 1)), 16)


def _mammogram(folder: Path) -> None:
    _image(folder / "dicom" / "a.dcm", np.tile(np.linspace(0, 1, 3328), (4096, 1)), 12)


def _many(folder: Path) -> None:
    for number in range(100_000):
        (folder / "dicom" / f"{number:06d}.dcm").touch()
    _image(folder / "dicom" / "a.dcm")


def _bomb(folder: Path) -> None:
    with gzip.open(folder / "t.csv.gz", "wb", compresslevel=9) as file:
        file.write(b"patient,age,y\n")
        block = b"p1,60,0\n" * (1 << 17)
        for _ in range(2048):
            file.write(block)


def _quoted(folder: Path) -> None:
    notes = ('"fell' if number == 1 else "ok" for number in range(80_000))
    rows = (f"p{n},{40 + n % 20},{n % 2},{note} and was seen again" for n, note in enumerate(notes))
    (folder / "t.csv").write_text("patient,age,y,note\n" + "\n".join(rows) + "\n")


def _late(folder: Path) -> None:
    note = "x" * (2 << 20)
    (folder / "t.csv").write_text(f'patient,note,age,y\np1,short,60,0\np2,"{note}",70,1\n')


def _wide(folder: Path) -> None:
    names = ",".join(f"c{number}" for number in range(100_000))
    (folder / "t.csv").write_text(f"patient,age,y,{names}\np1,60,0,{','.join('1' * 100_000)}\n")


_MADE: dict[str, Callable[[Path], None]] = {
    "d20c": _large,
    "f03": _deflated(1024),
    "f03b": _deflated(3500),
    "f04": _mammogram,
    "f06": _many,
    "t22b": _late,
    "t24c": _bomb,
    "t30b": _quoted,
    "t44": _wide,
}
