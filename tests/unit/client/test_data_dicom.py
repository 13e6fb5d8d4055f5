"""Images of any scanner come out alike; a file that cannot be used is set aside, whatever is wrong with it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from tests.support import studies
from tests.support.datasets import load

from consilium_client.data.asset import DicomAsset
from consilium_client.data.dataset import ArrayDataset
from consilium_deploy.dicom_files import Scanner, write_radiograph
from consilium_shared import limits
from consilium_shared.errors import DataError
from consilium_shared.inputs import Image
from consilium_shared.preparation import picture as picture_module
from consilium_shared.preparation.foreign import Unusable
from consilium_shared.preparation.picture import read_picture
from consilium_shared.preparation.presentation import present
from consilium_shared.preparation.resample import aspect, resize
from consilium_shared.study import Study

SIZE = 16


def study(**image: Any) -> Study:
    return studies.study(
        "small-cnn",
        {
            "asset": "xray",
            "label": {"column": "finding", "classes": ["normal", "pneumonia"]},
            "image": {"size": SIZE, **image},
        },
        name="images",
        training={"expected_batch": 1, "optimizer": {"lr": 1.0}},
    )


def picture(rows: int = 32, columns: int = 32) -> NDArray[np.float64]:
    """A ramp with a bright square, so that turning, stretching and inverting all show."""
    grey = np.tile(np.linspace(0.1, 0.7, columns), (rows, 1))
    grey[: rows // 4, : columns // 4] = 0.9
    return grey


def folder(tmp_path: Path, table: str = "patient,finding\np1,normal\np2,pneumonia\n", **options: Any) -> DicomAsset:
    (tmp_path / "dicom").mkdir(exist_ok=True)
    (tmp_path / "labels.csv").write_text(table, encoding="utf-8")
    spec = {"kind": "dicom", "path": "dicom", "table": "labels.csv", **options}
    return DicomAsset.model_validate(spec, strict=False).at(tmp_path)


def write(tmp_path: Path, name: str, patient: str, scanner: Scanner | None = None, rows: int = 32) -> Path:
    path = tmp_path / "dicom" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_radiograph(path, picture(rows), patient, name, scanner or Scanner())
    return path


SCANNERS = [
    Scanner(8),
    Scanner(10),
    Scanner(12, inverted=True),
    Scanner(16),
    Scanner(8, encoding="rle"),
    Scanner(12, encoding="rle", inverted=True),
    Scanner(16, encoding="jpeg2000"),
    Scanner(12, window=(2048, 4096)),
    Scanner(12, tags={"RescaleSlope": 2, "RescaleIntercept": -1000}),
    Scanner(12, tags={"RescaleSlope": 2, "RescaleIntercept": -1000}, window=(3095.5, 8191)),
]


@pytest.mark.parametrize(
    "scanner", SCANNERS, ids=lambda s: f"{s.bits}-{s.encoding}-{s.inverted}-{s.window}-{len(s.tags)}"
)
def test_every_scanner_gives_the_same_image(tmp_path: Path, scanner: Scanner) -> None:
    folder(tmp_path)
    image = read_picture(write(tmp_path, "a.dcm", "p1", scanner), Image(size=SIZE))[0]
    expected = picture().reshape(SIZE, 2, SIZE, 2).mean(axis=(1, 3))
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, expected, atol=1.5 / 2**8)


def test_a_window_stretches_its_range_and_clips_the_rest(tmp_path: Path) -> None:
    folder(tmp_path)
    image = read_picture(write(tmp_path, "a.dcm", "p1", Scanner(8, window=(102.0, 52.0))), Image(size=32))[0]
    value = np.round(picture() * 255)
    np.testing.assert_allclose(image, np.clip((value - 101.5) / 51 + 0.5, 0, 1), atol=1e-6)


@pytest.mark.parametrize("function", ["LINEAR_EXACT", "SIGMOID"])
def test_other_window_functions_follow_the_standard(tmp_path: Path, function: str) -> None:
    folder(tmp_path)
    scanner = Scanner(8, window=(100.0, 50.0), tags={"VOILUTFunction": function})
    image = read_picture(write(tmp_path, "a.dcm", "p1", scanner), Image(size=32))[0]
    x = np.round(picture() * 255) - 100
    expected = np.clip(x / 50 + 0.5, 0, 1) if function == "LINEAR_EXACT" else 1 / (1 + np.exp(-4 * x / 50))
    np.testing.assert_allclose(image, expected, atol=1e-6)


def test_a_lookup_table_is_scaled_by_its_own_bits(tmp_path: Path) -> None:
    folder(tmp_path)
    dataset = pydicom.dcmread(write(tmp_path, "a.dcm", "p1"))
    table = pydicom.Dataset()
    table.LUTDescriptor, table.LUTData = [256, 0, 16], [257 * (255 - v) for v in range(256)]
    dataset.VOILUTSequence = [table]
    grey = present(dataset, dataset.pixel_array)
    np.testing.assert_allclose(grey, 1 - np.round(picture() * 255) / 255, atol=1e-6)


def test_pixels_that_are_not_square_are_made_so(tmp_path: Path) -> None:
    folder(tmp_path)
    path = write(tmp_path, "a.dcm", "p1", Scanner(16, spacing=(2.0, 1.0)), rows=16)
    square = write(tmp_path, "b.dcm", "p1", Scanner(16), rows=32)
    np.testing.assert_allclose(read_picture(path, Image(size=8))[0], read_picture(square, Image(size=8))[0], atol=1e-4)


def test_resizing_keeps_the_mean_and_adds_margins_to_the_shorter_side() -> None:
    grey = np.random.default_rng(0).random((37, 53)).astype(np.float32)
    small = resize(grey, 53)
    assert small[:8].max() == 0
    np.testing.assert_allclose(small[8:45].mean(), grey.mean(), rtol=1e-5)
    np.testing.assert_allclose(resize(np.ones((7, 7), np.float32), 5), 1.0, rtol=1e-6)


@pytest.mark.parametrize("spacing", [["0.000", "0.000"], ["0.14"], ["0.2", "0", "0.2"], "", ["-1", "1"], ["inf", "1"]])
def test_spacing_that_means_nothing_is_passed_over_for_the_next_tag(spacing: Any) -> None:
    dataset = pydicom.Dataset()
    dataset.PixelSpacing = spacing
    assert aspect(dataset) == 1.0
    dataset.ImagerPixelSpacing = ["0.3", "0.1"]
    assert aspect(dataset) == pytest.approx(3.0)


def test_a_spacing_beyond_all_reason_is_refused_rather_than_followed() -> None:
    dataset = pydicom.Dataset()
    dataset.ImagerPixelSpacing = [0.001, 1]
    with pytest.raises(Unusable, match="spacing"):
        aspect(dataset)


def reasons(records: ArrayDataset) -> dict[str, int]:
    return dict(records.report.set_aside.counts)


def test_images_are_linked_by_patient_and_a_patient_may_have_many(tmp_path: Path) -> None:
    asset = folder(tmp_path)
    for name, patient in (("a.dcm", "p1"), ("deep/er/b.dcm", "p1"), ("c", "p2")):
        write(tmp_path, name, patient)
    records = load(asset, study())
    assert records.inputs[0].shape == (3, 1, SIZE, SIZE)
    assert records.patient_count == 2
    assert sorted(zip(records.patients.tolist(), records.labels[0].tolist(), strict=True)) == [(0, 0), (0, 0), (1, 1)]
    assert reasons(records) == {}


@pytest.mark.parametrize("link", ["file", "instance"])
def test_images_may_be_linked_one_by_one(tmp_path: Path, link: str) -> None:
    asset = folder(tmp_path)
    paths = {
        name: write(tmp_path, name, patient) for name, patient in (("x/a.dcm", "p1"), ("b.dcm", ""), ("c.dcm", "p9"))
    }
    keys = {n: n if link == "file" else str(pydicom.dcmread(p).SOPInstanceUID) for n, p in paths.items()}
    table = (
        f"patient,finding,key\np1,normal,{keys['x/a.dcm']}\np1,pneumonia,{keys['b.dcm']}\np2,normal,{keys['c.dcm']}\n"
    )
    records = load(folder(tmp_path, table, **{link: "key"}), study())
    assert sorted(records.labels[0].tolist()) == [0, 1]
    assert records.patient_count == 1
    assert reasons(records) == {
        "PatientID differs from the label table's": 1,
        "label table: row without a usable image": 1,
    }
    assert asset.path.is_dir()


def _seen(records: ArrayDataset) -> list[tuple[int, int]]:
    return sorted(zip(records.patients.tolist(), records.labels[0].tolist(), strict=True))


@pytest.mark.parametrize("named", ["p1", ""])
def test_another_patients_row_for_the_same_file_pushes_nobody_out(tmp_path: Path, named: str) -> None:
    """Adding or removing one patient changes that patient's records and no other's, whatever the table says."""
    write(tmp_path, "a.dcm", named)
    own, other = "p1,normal,a.dcm\n", "p2,pneumonia,a.dcm\n"
    alone = load(folder(tmp_path, f"patient,finding,key\n{own}", file="key"), study())
    assert _seen(alone) == [(0, 0)]
    for rows in (own + other, other + own):
        both = load(folder(tmp_path, f"patient,finding,key\n{rows}", file="key"), study())
        kept = both.inputs[0][both.labels[0] == 0]
        np.testing.assert_array_equal(kept, alone.inputs[0])
        assert len(both) == (1 if named else 2)


def test_another_patients_copy_of_an_image_pushes_nobody_out(tmp_path: Path) -> None:
    first = write(tmp_path, "a.dcm", "p1")
    found = folder(tmp_path)
    alone = load(found, study())
    write_radiograph(first.with_name("b.dcm"), picture(), "p2", "a.dcm", Scanner())  # the same SOPInstanceUID
    both = load(found, study())
    assert (_seen(alone), _seen(both)) == ([(0, 0)], [(0, 0), (1, 1)])


def test_more_than_fits_in_memory_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.dcm", "p1")
    write(tmp_path, "b.dcm", "p2")
    monkeypatch.setattr(limits, "INPUT_BYTES", 2 * SIZE * SIZE * 4)
    assert len(load(folder(tmp_path), study())) == 2
    monkeypatch.setattr(limits, "INPUT_BYTES", 2 * SIZE * SIZE * 4 - 1)
    monkeypatch.setattr(picture_module, "read_picture", None)  # nothing is decoded any more
    with pytest.raises(DataError, match="GiB of memory"):
        load(folder(tmp_path), study())


def test_what_cannot_be_used_is_set_aside_with_its_reason(tmp_path: Path) -> None:
    asset = folder(tmp_path)
    write(tmp_path, "good.dcm", "p1")
    write(tmp_path, "again.dcm", "p1").write_bytes((tmp_path / "dicom" / "good.dcm").read_bytes())
    write(tmp_path, "stranger.dcm", "p7")
    write(tmp_path, "ct.dcm", "p1", Scanner(tags={"Modality": "CT"}))
    write(tmp_path, "odd.dcm", "p1", Scanner(tags={"Modality": "SECRET 1"}))
    write(tmp_path, "frames.dcm", "p1", Scanner(tags={"NumberOfFrames": 2}))
    write(tmp_path, "samples.dcm", "p1", Scanner(tags={"SamplesPerPixel": 3}))
    write(tmp_path, "palette.dcm", "p1", Scanner(tags={"PhotometricInterpretation": "PALETTE COLOR"}))
    write(tmp_path, "hsv.dcm", "p1", Scanner(tags={"PhotometricInterpretation": "HSV"}))
    write(tmp_path, "huge.dcm", "p1", Scanner(tags={"Rows": 65535, "Columns": 65535}))
    write(tmp_path, "bits.dcm", "p1", Scanner(tags={"BitsStored": 0}))
    write(tmp_path, "slope.dcm", "p1", Scanner(tags={"RescaleSlope": 0}))
    write(tmp_path, "window.dcm", "p1", Scanner(window=(1.0, 1.0), tags={"VOILUTFunction": "SECRET"}))
    write(tmp_path, "black.dcm", "p1", Scanner(window=(5000.0, 2.0)))
    write(tmp_path, "negative.dcm", "p1", Scanner(tags={"PresentationLUTShape": "INVERSE"}))
    cut = write(tmp_path, "cut.dcm", "p1")
    cut.write_bytes(cut.read_bytes()[:-400])
    empty = write(tmp_path, "no-pixels.dcm", "p1")
    dataset = pydicom.dcmread(empty)
    del dataset.PixelData
    dataset.save_as(empty)
    (tmp_path / "dicom" / "notes.txt").write_text("p1 is well")
    (tmp_path / "dicom" / "empty.dcm").write_bytes(b"")
    (tmp_path / "dicom" / ".hidden").write_bytes(b"")
    (tmp_path / "dicom" / "DICOMDIR").write_bytes(b"")
    seen: list[tuple[int, int]] = []
    records = load(asset, study(), lambda done, total: seen.append((done, total)))
    assert len(records) == 1
    assert reasons(records) == {
        "the same image (SOPInstanceUID) again": 1,
        "no usable row in the label table": 1,
        "modality CT": 1,
        "modality unknown": 1,
        "more than one frame": 1,
        "SamplesPerPixel contradicts PhotometricInterpretation": 1,
        "the palette makes no sense": 1,
        "photometric interpretation is neither grey, RGB, YBR_FULL nor PALETTE COLOR": 1,
        "more than 100 million pixels": 1,
        "BitsStored and BitsAllocated make no sense": 1,
        "pixel data missing, damaged or in an unknown encoding": 2,
        "RescaleSlope is 0": 1,
        "VOILUTFunction is none of the standard's": 1,
        "one brightness everywhere: nothing is to be seen": 1,
        "PresentationLUTShape contradicts PhotometricInterpretation: black may be white": 1,
        "not a DICOM file": 1,
        "an empty file": 1,
        "hidden file, not read": 1,
        "label table: row without a usable image": 1,
    }
    assert seen[-1][0] == seen[-1][1]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_no_patients_name_reaches_a_log_an_error_or_a_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    asset = folder(tmp_path, "patient,finding\nSECRET-ID,normal\n")
    path = write(tmp_path, "a.dcm", "SECRET-ID", Scanner(tags={"PatientBirthDate": "SECRET-DATE"}))
    path.write_bytes(path.read_bytes().replace(b"MONOCHROME2", b"MONOCHROME3"))
    caplog.clear()
    recwarn.clear()  # writing the file has warned already
    with caplog.at_level(logging.DEBUG), pytest.raises(DataError) as error:
        load(asset, study())
    assert "no usable image in 1 files" in str(error.value)
    heard = [str(error.value), caplog.text, *(str(warning.message) for warning in recwarn)]
    assert not any("SECRET" in text for text in heard)


def test_an_empty_or_missing_folder_is_a_data_error(tmp_path: Path) -> None:
    asset = folder(tmp_path)
    with pytest.raises(DataError, match="holds no file"):
        load(asset, study())
    with pytest.raises(DataError, match="is not a folder"):
        load(asset.model_copy(update={"path": tmp_path / "absent"}), study())


def test_file_and_instance_together_are_refused() -> None:
    with pytest.raises(ValueError, match="one of file, instance"):
        DicomAsset.model_validate(
            {"kind": "dicom", "path": "a", "table": "b", "file": "f", "instance": "i"}, strict=False
        )
