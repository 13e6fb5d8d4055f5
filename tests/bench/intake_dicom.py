"""Table of foreign DICOM files: how each encoding comes through the real intake."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pydicom.data
from tests.support import studies

from consilium_client import data
from consilium_client.data.asset import DicomAsset
from consilium_client.data.report import NothingUsable
from consilium_shared.preparation.foreign import Unusable, read_whole
from consilium_shared.preparation.pixels import stored_values

HEAD = """\
## DICOM files of other programs

{count} different files{sources}, each as the only file of an asset, for a study that takes colour images of every \
modality and the middle one of several frames. Pixels: files of one grey frame whose stored values are those that are \
known, of all that have a known digest. What is set aside without being an image (reports, plans, waveforms) is as it \
should be.

| transfer syntax | photometric interpretation | frames | files | used | known pixels | set aside |
|---|---|---|---|---|---|---|
"""


def sources(folder: Path) -> Iterator[tuple[str, Path, dict[str, object]]]:
    """Name, path, and what is known of each file."""
    brought = Path(str(pydicom.data.__file__)).parent / "test_files"
    published = os.environ.get("CONSILIUM_DATA")
    if published:
        with tarfile.open(Path(published) / "dicom_dev.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        root = folder / "dicom"
        known = json.loads((root / "expected.json").read_text(encoding="utf-8"))
        for path in sorted(root.rglob("*")):
            name = path.relative_to(root).as_posix()
            if path.is_file() and path.name != "expected.json" and not path.name.startswith("LICENSE"):
                yield name, path, known.get(name, {})
    for path in sorted(brought.rglob("*")):
        if path.is_file() and path.suffix != ".py":
            yield path.name, path, {}


def described(path: Path) -> tuple[str, str, str]:
    """Transfer syntax, photometric interpretation, and whether it holds several frames."""
    try:
        found = pydicom.dcmread(path, stop_before_pixels=True, force=True)
        syntax = getattr(found, "file_meta", {}).get("TransferSyntaxUID")
        frames = "several" if int(found.get("NumberOfFrames") or 1) > 1 else "one"
        named = "-" if syntax is None else syntax.name.removesuffix(" Image Compression")
        return named, str(found.get("PhotometricInterpretation") or "-"), frames
    except Exception:  # what is no DICOM breaks a reader in any way
        return "-", "-", "-"


def outcome(path: Path, place: Path) -> str:
    """ "used", or the reason why it is not."""
    images = place / "images"
    for old in images.iterdir():
        old.unlink()
    (images / "a.dcm").hardlink_to(path)
    image = {"size": 32, "channels": 3, "modality": [], "frames": "middle"}
    study = studies.study("small-cnn", {"image": image})
    link = {"file": "file", "identity": "table"}
    asset = DicomAsset.model_validate({"kind": "dicom", "path": images, "table": place / "labels.csv", **link})
    try:
        data.load(asset, study)
    except NothingUsable as error:
        return next(iter(error.report.set_aside.counts))
    return "used"


def known_pixels(path: Path, known: dict[str, object]) -> bool | None:
    """Whether the stored values are the known ones; None where none are known, or not in that form."""
    if "sha256" not in known:
        return None
    try:
        dataset = read_whole(path)
        if dataset.PhotometricInterpretation[:4] != "MONO" or int(dataset.get("NumberOfFrames") or 1) > 1:
            return None
        if dataset.file_meta.TransferSyntaxUID == pydicom.uid.JPEGExtended12Bit:
            return None  # lossy: decoders differ by a grey value, and the known one is another than DCMTK's and ours
        pixels = stored_values(dataset)
    except Unusable:
        return False
    if dataset.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRBigEndian:
        pixels = pixels.astype(pixels.dtype.newbyteorder(">"))
    return hashlib.sha256(pixels.tobytes()).hexdigest() == known["sha256"]


def section() -> str:
    """The page's part about them."""
    warnings.simplefilter("ignore")
    seen: set[str] = set()
    counts: dict[tuple[str, str, str], Counter[str]] = defaultdict(Counter)
    pixels: dict[tuple[str, str, str], Counter[bool]] = defaultdict(Counter)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        (place / "images").mkdir()
        (place / "labels.csv").write_text("patient,y,file\np1,1,a.dcm\n", encoding="utf-8")
        for _, path, known in sources(place):
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            if digest in seen:
                continue
            seen.add(digest)
            copy = place / "copy"
            copy.write_bytes(content)
            key = described(copy)
            counts[key][outcome(copy, place)] += 1
            same = known_pixels(copy, known)
            if same is not None:
                pixels[key][same] += 1
            copy.unlink()
    lines = []
    for key in sorted(counts):
        found, same = counts[key], pixels[key]
        aside = ", ".join(f"{count} {reason}" for reason, count in found.most_common() if reason != "used")
        agreed = f"{same[True]} of {same.total()}" if same.total() else ""
        cells = [*key, str(found.total()), str(found["used"]), agreed, aside]
        lines.append("| " + " | ".join(cells) + " |")
    where = ", those that pydicom brings" + (" and published ones" if os.environ.get("CONSILIUM_DATA") else "")
    return HEAD.format(count=len(seen), sources=where) + "\n".join(lines) + "\n"
