"""Nothing that tells whose an image is gets through intake, and everything that training needs does."""

from __future__ import annotations

import datetime
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom import dcmread
from pydicom._dicom_dict import DicomDictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from tests.intake import studies
from tests.intake.studies import PLANTED, instance

from consilium_client.intake.deidentify import deidentify
from consilium_client.intake.inbox import Inbox, digest_of
from consilium_client.intake.pseudonyms import Pseudonyms
from consilium_client.intake.settings import Deidentify, LabelTable, Limits
from consilium_client.intake.sorting import sort
from consilium_client.intake.suspects import suspicion
from consilium_client.intake.tables import rename
from consilium_shared.errors import ConfigurationError, DataError, IntegrityError
from consilium_shared.inputs import Image
from consilium_shared.preparation.picture import read_picture

ALL_OPTIONS = ("device", "patient-characteristics", "times")
TEXT = {"LO", "LT", "PN", "SH", "ST", "UC", "UT", "UR", "AE", "CS"}


@pytest.fixture
def names(tmp_path: Path) -> Pseudonyms:
    return Pseudonyms(tmp_path / "intake", 3650)


def filled(inner: Dataset | None = None) -> Dataset:
    """Every attribute of DICOM's dictionary, each with something by which a patient could be known.

    With ``inner`` it is an image, in each of whose sequences that stands.
    """
    made = Dataset() if inner is None else instance(0, 0)
    for number, entry in DicomDictionary.items():
        tag, kind = Tag(number), entry[0].split(" or ")[0]
        if tag.group < 8 or tag in made or tag.group >= 0x7F00:
            continue
        value: Any = None
        if kind in TEXT:
            value = PLANTED[:16]
        elif kind == "UI":
            value = "1.2.276.77.7777"
        elif kind == "DA":
            value = "20240117"
        elif kind == "DT":
            value = "20240117101500"
        elif kind in {"OB", "UN"}:
            value = PLANTED.encode() + b"\x00"
        elif kind == "SQ" and inner is not None:
            value = Sequence([inner])
        if value is not None:
            made.add(DataElement(tag, kind, value))
    return made


def everything_in(dataset: Dataset) -> list[DataElement]:
    return list(dataset.iterall())


@pytest.mark.parametrize("options", [(), ALL_OPTIONS])
def test_of_every_attribute_of_the_standard_nothing_that_names_somebody_stays(names, tmp_path, options) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = filled(filled())
        made, _ = deidentify(source, names, options)
        made.save_as(tmp_path / "made.dcm", enforce_file_format=True)
    content = (tmp_path / "made.dcm").read_bytes()
    for word in (PLANTED.encode(), b"1.2.276.77.7777", b"20240117", b"Anna", b"Doctor", b"1.2.826.0.1.3680043.10."):
        assert word not in content
    assert len(source.keys()) > 3000


def element(tag: int, kind: str, value: Any) -> dict[int, DataElement]:
    return {tag: DataElement(tag, kind, value)}


def item(**tags: Any) -> Sequence:
    made = Dataset()
    for keyword, value in tags.items():
        setattr(made, keyword, value)
    return Sequence([made])


@pytest.mark.parametrize(
    "planted",
    [
        element(0x7FE00001, "LT", PLANTED),
        element(0x7FE00001, "OV", PLANTED.encode().ljust(16)),
        element(0x00281201, "OW", PLANTED.encode() + b"\x00"),
        element(0x7FE00010, "OW", bytes(32 * 32 * 2) + PLANTED.encode() + b"\x00"),
        element(0x00283010, "SQ", item(LUTDescriptor=[4, 0, 16], LUTData=bytes(8) + PLANTED.encode() + b"\x00")),
        element(0x00082218, "SQ", item(CodingSchemeDesignator=PLANTED)),
        element(0x00082218, "SQ", item(CodingSchemeDesignator="DCM", CodeValue=PLANTED)),
        element(0x00082218, "SQ", item(CodingSchemeDesignator="SCT", CodeValue=PLANTED)),
    ],
)
def test_nothing_stays_behind_what_is_on_the_list(names, tmp_path: Path, planted: dict[int, DataElement]) -> None:
    source = instance(0, 0)
    source.update(planted)
    made, _ = deidentify(source, names, ALL_OPTIONS)
    made.save_as(tmp_path / "made.dcm", enforce_file_format=True)
    assert PLANTED.encode() not in (tmp_path / "made.dcm").read_bytes()
    assert len(made.PixelData) == 32 * 32 * 2


@pytest.mark.parametrize(
    ("kind", "value"),
    [("LT", PLANTED), ("SQ", item(PatientName=PLANTED)), ("OW", PLANTED.encode() + b"\x00")],
)
def test_what_is_said_to_be_pixels_and_is_none_is_set_aside(names, kind: str, value: Any) -> None:
    source = instance(0, 0)
    source.update(element(0x7FE00010, kind, value))
    with pytest.raises(DataError, match="pixel"):
        deidentify(source, names, ())


def test_no_attribute_stays_that_nobody_put_on_the_list(names) -> None:
    source = instance(0, 0)
    source.add_new(0x00091001, "UN", PLANTED.encode())
    source.add_new(0x00280099, "US", 7)  # of no edition yet
    made, _ = deidentify(source, names, ALL_OPTIONS)
    assert 0x00280099 not in made and not any(element.tag.is_private for element in everything_in(made))


def test_what_training_needs_stays_and_says_how_it_was_made(names) -> None:
    source = instance(1, 2, WindowCenter=2000, WindowWidth=1000)
    made, pseudonym = deidentify(source, names, ALL_OPTIONS)
    for keyword in ("Rows", "PixelSpacing", "BitsStored", "RescaleSlope", "WindowCenter", "Modality",
                    "BodyPartExamined", "ViewPosition", "ImageType", "SOPClassUID",
                    "PatientSex", "Manufacturer", "StudyTime"):  # fmt: skip
        assert made[keyword].value == source[keyword].value, keyword
    assert made.PixelData == source.PixelData
    assert made.PatientID == str(made.PatientName) == pseudonym
    assert made.PatientAge == "090Y"
    assert made.PatientIdentityRemoved == "YES"
    assert {each.CodeValue for each in made.DeidentificationMethodCodeSequence} == {
        "113100",
        "113107",
        "113108",
        "113109",
    }
    bare, _ = deidentify(source, names, ())
    for keyword in ("PatientAge", "Manufacturer", "StudyTime"):
        assert keyword not in bare
    assert bare.PatientSex == ""


def test_new_names_are_the_same_everywhere_and_days_between_stay(names, tmp_path: Path) -> None:
    first, second = (deidentify(instance(study, 0), names, ())[0] for study in (0, 1))
    again, _ = deidentify(instance(0, 1), Pseudonyms(tmp_path / "intake", 3650), ())
    assert first.PatientID == second.PatientID == again.PatientID
    assert first.StudyInstanceUID == again.StudyInstanceUID != second.StudyInstanceUID
    assert first.SOPInstanceUID != again.SOPInstanceUID
    days = [datetime.datetime.strptime(made.StudyDate, "%Y%m%d") for made in (first, second)]
    assert days[1] - days[0] == datetime.timedelta(days=7)
    assert first.StudyDate == first.AcquisitionDate != instance(0, 0).StudyDate
    other, _ = deidentify(instance(2, 0), names, ())
    assert other.PatientID != first.PatientID
    elsewhere, _ = deidentify(instance(0, 0), Pseudonyms(tmp_path / "other site", 3650), ())
    assert elsewhere.PatientID != first.PatientID and elsewhere.SOPInstanceUID != first.SOPInstanceUID


def test_one_person_has_one_name_however_the_identifier_is_spelt(names) -> None:
    assert names.patient("7.0") == names.patient(" 7") == names.patient("7\u200b")
    assert names.patient("07") != names.patient("7")
    assert names.person(names.patient("07")) == ("07", "")
    for nobody in ("", "  ", "NULL", "1.2E+11"):
        with pytest.raises(DataError):
            names.patient(nobody)
    names.patient("55", "Clinic A")
    names.patient("55")
    with pytest.raises(DataError, match="several issuers"):
        names.patient("55", "Clinic B")


def test_a_lost_or_damaged_key_is_never_replaced_in_silence(tmp_path: Path) -> None:
    Pseudonyms(tmp_path, 10).patient("1")
    key = tmp_path / "pseudonym.key"
    assert key.stat().st_mode & 0o077 == 0 and (tmp_path / "people.sqlite3").stat().st_mode & 0o077 == 0
    key.write_text("00ff")
    with pytest.raises(IntegrityError, match="damaged"):
        Pseudonyms(tmp_path, 10)
    key.unlink()
    with pytest.raises(ConfigurationError, match="second name"):
        Pseudonyms(tmp_path, 10)


@pytest.mark.parametrize(
    ("tags", "permit", "said"),
    [
        ({"BurnedInAnnotation": "YES"}, ("secondary-capture",), "BurnedInAnnotation"),
        ({"BurnedInAnnotation": ["NO", "YES"]}, (), "BurnedInAnnotation"),
        ({"RecognizableVisualFeatures": "YES"}, (), "recognised"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}, (), "secondary capture"),
        ({"ConversionType": "WSD"}, (), "secondary capture"),
        ({"Modality": "US"}, (), "ultrasound"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1"}, (), "ultrasound"),
        ({"Modality": "XC"}, ("ultrasound", "secondary-capture", "derived-secondary"), "photograph"),
        ({"ImageType": ["DERIVED", "SECONDARY", "OTHER"]}, (), "after the examination"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "SCREEN SAVE"]}, ("derived-secondary",), "screen"),
        ({"ImageType": ["DERIVED", "SECONDARY", "DOSE_INFO"]}, ("derived-secondary",), "screen"),
        ({"OverlayRows": 32, "OverlayBitPosition": 15}, (), "overlay"),
    ],
)
def test_an_image_that_may_show_a_name_is_suspected(tags: dict[str, Any], permit: Any, said: str) -> None:
    made = instance(0, 0)
    for keyword, value in tags.items():
        if keyword.startswith("Overlay"):
            made.add_new(0x60000010 if keyword == "OverlayRows" else 0x60000102, "US", value)
        else:
            setattr(made, keyword, value)
    assert said in str(suspicion(made, permit))
    assert suspicion(instance(0, 0), ()) is None


def test_what_somebody_permitted_is_not_suspected() -> None:
    made = instance(0, 0, Modality="US", ImageType=["DERIVED", "SECONDARY"], ConversionType="DV")
    assert suspicion(made, ("ultrasound", "secondary-capture", "derived-secondary")) is None


def inbox_with(folder: Path, made: list[Dataset]) -> Inbox:
    inbox = Inbox(folder / "inbox", Limits(keep_free_gib=0))
    for number, each in enumerate(made):
        arrived = inbox.arriving / f"{number}.dcm"
        each.save_as(arrived, enforce_file_format=True)
        inbox.keep(str(each.SOPInstanceUID), arrived, "test")
    return inbox


def nothing(_: int) -> None:
    pass


def test_the_inbox_becomes_files_once_and_what_is_suspect_stays_there(names, tmp_path: Path) -> None:
    made = [instance(study, number) for study in range(3) for number in range(2)]
    made.append(instance(4, 0, BurnedInAnnotation="YES"))
    made.append(instance(5, 0, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11"))
    inbox = inbox_with(tmp_path, made)
    settings = Deidentify(to=tmp_path / "data")
    counts = sort(inbox, names, settings, False, nothing)
    assert counts["done"] == 6 and sum(counts.values()) == 8
    files = sorted((tmp_path / "data").rglob("*.dcm"))
    assert len(files) == 6 and len({file.parent.name for file in files}) == 2
    assert inbox.counts() == {"done": 6, "aside": 2, "repeats": 0, "differing": 0}
    assert sum(1 for _ in (tmp_path / "inbox").glob("??/*.dcm")) == 2
    for file in files:
        assert PLANTED.encode() not in file.read_bytes()
        assert read_picture(file, Image(size=32))[0].shape == (32, 32)
        assert file.parent.name == dcmread(file).PatientID
    before = {file: file.read_bytes() for file in files}
    for each in inbox.instances("done"):  # as if the program had been killed before it wrote down what it did
        inbox.settle(each.digest, "inbox")
    for each in made[:6]:
        path = inbox.path(next(i.digest for i in inbox.instances() if i.uid == each.SOPInstanceUID))
        each.save_as(path, enforce_file_format=True)
    sort(inbox, names, settings, False, nothing)
    made[0].save_as(inbox.path(digest_of(made[0].SOPInstanceUID)), enforce_file_format=True)  # killed a moment later
    sort(inbox, names, settings, False, nothing)
    assert sum(1 for _ in (tmp_path / "inbox").glob("??/*.dcm")) == 2
    assert {file: file.read_bytes() for file in sorted((tmp_path / "data").rglob("*.dcm"))} == before


def test_what_is_permitted_later_comes_through_with_again(names, tmp_path: Path) -> None:
    inbox = inbox_with(tmp_path, [instance(0, 0, ImageType=["DERIVED", "SECONDARY"])])
    assert sort(inbox, names, Deidentify(to=tmp_path / "data"), False, nothing)["done"] == 0
    permitted = Deidentify(to=tmp_path / "data", permit=["derived-secondary"], originals="keep")
    assert sort(inbox, names, permitted, False, nothing)["done"] == 0
    assert sort(inbox, names, permitted, True, nothing)["done"] == 1
    assert sum(1 for _ in (tmp_path / "inbox").glob("??/*.dcm")) == 1


def test_what_is_no_dicom_or_of_another_name_is_set_aside(names, tmp_path: Path) -> None:
    inbox = inbox_with(tmp_path, [instance(0, 0), instance(0, 1), instance(0, 2)])
    paths = [inbox.path(each.digest) for each in inbox.instances()]
    paths[0].write_bytes(b"no DICOM")
    shutil.copy(paths[2], paths[1])
    counts = sort(inbox, names, Deidentify(to=tmp_path / "data"), False, nothing)
    assert counts["done"] == 1 and len(counts) == 3


def test_pixels_stay_as_they_were_in_every_encoding(names, tmp_path: Path) -> None:
    files = studies.write(tmp_path / "sent", studies=2, images=3)
    for file in files:
        source = dcmread(file)
        made, _ = deidentify(source, names, ())
        made.save_as(tmp_path / "made.dcm", enforce_file_format=True)
        again = dcmread(tmp_path / "made.dcm")
        assert np.array_equal(again.pixel_array, source.pixel_array)
        assert again.file_meta.TransferSyntaxUID == source.file_meta.TransferSyntaxUID
        assert "SourceApplicationEntityTitle" not in again.file_meta


def test_a_label_table_gets_the_names_of_its_images(names, tmp_path: Path) -> None:
    made, pseudonym = deidentify(instance(0, 0), names, ())
    source = tmp_path / "labels.csv"
    source.write_text(
        "mrn,name,uid,seen,finding\n"
        f'{PLANTED}-0000,Anna,{instance(0, 0).SOPInstanceUID},2024-01-10,"effusion, small"\n'
        f"{PLANTED}-0000,Anna,,20240117,none\n"
        ",Nobody,,,none\n"
        "8,Bert,,10.1.2024,none\n"
    )
    table = LabelTable(
        source=source, to=tmp_path / "out" / "labels.csv", patient="mrn", uids=["uid"], dates=["seen"], keep=["finding"]
    )
    counts = rename(table, names)
    assert counts == {"done": 2, "no identifier of the patient": 1, "a date that is none": 1}
    lines = table.to.read_text().splitlines()
    day = datetime.datetime.strptime(made.StudyDate, "%Y%m%d")
    later = (day + datetime.timedelta(days=7)).strftime("%Y%m%d")
    assert lines == [
        "mrn,uid,seen,finding",
        f'{pseudonym},{made.SOPInstanceUID},{day:%Y-%m-%d},"effusion, small"',
        f"{pseudonym},,{later},none",
    ]


def test_a_table_of_another_country_is_read_as_it_is_declared(names, tmp_path: Path) -> None:
    source = tmp_path / "labels.csv"
    rows = ["1;1.234,5;größer", "2;0,5;ja", "3;1,2,3;x", "4;;y", "5;1.5;z", "6;-3;z", "7;1e5,5;z"]
    source.write_bytes("\r\n".join(["mrn;wert;befund", *rows, ""]).encode("cp1252"))
    how = {"delimiter": ";", "decimal": ",", "encoding": "cp1252", "numbers": ["wert"], "keep": ["befund"]}
    table = LabelTable.model_validate({"source": str(source), "to": str(tmp_path / "out.csv"), "patient": "mrn", **how})
    assert rename(table, names) == {"done": 7, "value that is no number, left empty": 3}
    lines = [line.split(",", 1)[1] for line in table.to.read_text().splitlines()]
    assert lines == ["wert,befund", "1234.5,größer", "0.5,ja", ",x", ",y", ",z", "-3,z", ",z"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("mrn,x\n1,2,3\n", DataError),
        ('mrn,x\n"1,2\n', DataError),
        ("a,x\n1,2\n", ConfigurationError),
        ("mrn,x\n\xff,2\n", ConfigurationError),
    ],
)
def test_a_label_table_that_cannot_be_read_leaves_nothing(names, tmp_path: Path, text: str, kind: Any) -> None:
    source = tmp_path / "labels.csv"
    source.write_bytes(text.encode("latin-1"))
    with pytest.raises(kind):
        rename(LabelTable(source=source, to=tmp_path / "out" / "labels.csv", patient="mrn", keep=["x"]), names)
    assert list((tmp_path / "out").iterdir()) == []
