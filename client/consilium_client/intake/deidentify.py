"""De-identification of one instance: the profile's attributes stay, under new identifiers and shifted dates."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import Any

from pydicom._uid_dict import UID_dictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels.utils import get_expected_length
from pydicom.sequence import Sequence
from pydicom.uid import UID

from consilium_client.intake import profile
from consilium_client.intake.pseudonyms import Pseudonyms
from consilium_client.intake.settings import Option
from consilium_shared.errors import DataError

_DIRECTION = re.compile(r"[APRLFH]{1,3}")
_AGE = re.compile(r"([0-9]{3})([DWMY])")
_TIME = re.compile(r"[0-9]{2,6}(\.[0-9]{1,6})?")
_UID = re.compile(r"[0-9]+(\.[0-9]+)+")
_IMAGES = re.compile(
    r"1\.2\.840\.10008\.5\.1\.4\.1\.1\."
    r"(1(\.[123](\.1)?)?|2(\.[12])?|4(\.[134])?|6\.[12]|3\.1|7(\.[1234])?|12\.[12](\.1)?|13\.1\.[12345]|14\.[12]|20"
    r"|66\.4|128(\.1)?|130|481\.2)"
)
"""Storage SOP classes of images and masks; reports, structures, waveforms and documents are text for the most part."""


def deidentify(source: Dataset, names: Pseudonyms, retain: Collection[Option]) -> tuple[Dataset, str]:
    """A new instance with what the profile lets stay.

    Args:
        source: an instance as it came, with its file meta information; unchanged.
        names: the site's new names.
        retain: options of the profile.

    Returns:
        the new instance, ready to be written, and its patient's pseudonym.

    Raises:
        DataError: not an image, no patient or no UIDs, so that it cannot be told whose it is.
    """
    kind = str(source.get("SOPClassUID", ""))
    if not _IMAGES.fullmatch(kind):
        raise DataError("not an image (a report, a structure, a document, or of no known class)")
    identifier = source.get("PatientID")
    if identifier is not None and not isinstance(identifier, str):
        raise DataError("PatientID holds several values")
    pseudonym = names.patient(identifier or "", str(source.get("IssuerOfPatientID") or ""))
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID"):
        if not _UID.fullmatch(str(source.get(keyword, ""))):
            raise DataError(f"no {keyword}")
    worker = _Worker(names, pseudonym, frozenset(retain), _words_of(source))
    made = worker.cleaned(source, 0)
    made.PatientID = made.PatientName = pseudonym
    for keyword in ("PatientBirthDate", "AccessionNumber", "StudyID", "ReferringPhysicianName"):
        setattr(made, keyword, "")  # the standard wants them to be there
    if "PatientSex" not in made:
        made.PatientSex = ""
    made.PatientIdentityRemoved = "YES"
    made.LongitudinalTemporalInformationModified = "MODIFIED"
    made.DeidentificationMethod = profile.METHOD
    made.DeidentificationMethodCodeSequence = Sequence(
        [_code(*profile.METHODS[each]) for each in ("", "dates", *sorted(retain)) if each in profile.METHODS]
    )
    made.file_meta = _meta(source, made)
    _hold_pixels(made)
    return made, pseudonym


def _meta(source: Dataset, made: Dataset) -> FileMetaDataset:
    syntax = UID(str(source.file_meta.get("TransferSyntaxUID", "")))
    if not syntax.is_transfer_syntax or syntax.is_private:
        raise DataError("a transfer syntax that DICOM does not know")
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = syntax
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = made.SOPClassUID, made.SOPInstanceUID
    return meta


def _hold_pixels(made: Dataset) -> None:
    """Cut what follows the pixels of an image, and take away offsets that are none; raises DataError without pixels."""
    pixels = made.get_item("PixelData")
    if pixels is None:
        return
    if pixels.VR not in {"OB", "OW", "OB or OW"} or not isinstance(pixels.value, bytes):
        raise DataError("pixel data that are none")
    compressed = made.file_meta.TransferSyntaxUID.is_encapsulated
    if not compressed:
        try:
            length = get_expected_length(made)
        except Exception as error:  # tags that are missing or make no sense
            raise DataError("pixel data without a size") from error
        if len(pixels.value) < length:
            raise DataError("fewer pixels than its size says")
        if len(pixels.value) > length + length % 2:
            made[profile.PIXELS] = DataElement(profile.PIXELS, pixels.VR, pixels.value[:length] + bytes(length % 2))
    for tag in profile.OFFSETS & set(made.keys()):
        table = made[tag]
        numbers = memoryview(table.value).cast("Q") if table.VR == "OV" and len(table.value) % 8 == 0 else [math.inf]
        if not compressed or not all(number < len(pixels.value) for number in numbers):
            del made[tag]


def _code(value: str, meaning: str) -> Dataset:
    made = Dataset()
    made.CodeValue, made.CodingSchemeDesignator, made.CodeMeaning = value, "DCM", meaning
    return made


def _words_of(source: Dataset) -> frozenset[str]:
    """Words of a patient's name and identifiers, of three letters or more."""
    said = " ".join(
        str(source.get(keyword) or "") for keyword in ("PatientName", "PatientID", "OtherPatientIDs", "AccessionNumber")
    )
    return frozenset(word.casefold() for word in re.findall(r"\w{3,}", said))


class _Worker:
    """Applies the profile to each element."""

    def __init__(self, names: Pseudonyms, pseudonym: str, retain: frozenset[Option], words: frozenset[str]) -> None:
        self._names, self._pseudonym, self._retain, self._words = names, pseudonym, retain, words

    def cleaned(self, source: Dataset, depth: int) -> Dataset:
        """Elements of a data set that stay."""
        made = Dataset()
        for tag in list(source.keys()):
            if tag.is_private or tag.group == 2:
                continue
            try:
                element = self._element(source[tag], depth)
            except DataError:
                raise
            except Exception:  # noqa: S112  # a value that cannot be read cannot be judged, whatever it raises
                continue
            if element is not None:
                made.add(element)
        for data in profile.TABLES.keys() & set(made.keys()):
            _hold_table(made, data, profile.TABLES[data])
        return made

    def _element(self, element: DataElement, depth: int) -> DataElement | None:
        tag, value = int(element.tag), element.value
        if tag in profile.SEQUENCES:
            return self._sequence(element, depth)
        if tag == profile.PIXELS or tag in profile.OFFSETS:
            return element if depth == 0 else None
        if value is None or value == "":
            return None
        if tag in profile.TABLES:
            return element if element.VR in {"OW", "OB", "US", "SS", "US or SS", "OW or OB"} else None
        if tag in profile.NUMBERS or (tag in profile.BODY and self._people):
            return element if _all(value, _is_number) else None
        if tag in profile.UIDS:
            return self._uids(element)
        if tag in profile.DATES:
            return _with(element, self._dates(value))
        if tag in profile.TIMES:
            return element if "times" in self._retain and _all(value, _matches(_TIME)) else None
        if tag in profile.CODES:
            return _with(element, [word for word in _words(value) if word in profile.CODES[tag]])
        if tag == profile.DIRECTIONS:
            return element if _all(value, _matches(_DIRECTION)) else None
        if tag == profile.SEX:
            return element if self._people and str(value) in profile.SEXES else None
        if tag == profile.AGE:
            return _with(element, _age(str(value))) if self._people else None
        if tag in profile.MAKE and "device" in self._retain:
            told = {word.casefold() for word in re.findall(r"\w{3,}", str(value))}
            return None if told & self._words else element
        if tag in (profile.SCHEME, profile.CODE):
            return element if depth and isinstance(value, str) else None
        return None

    @property
    def _people(self) -> bool:
        return "patient-characteristics" in self._retain

    def _sequence(self, element: DataElement, depth: int) -> DataElement | None:
        if depth >= profile.DEPTH:
            return None
        items = [self.cleaned(item, depth + 1) for item in element.value]
        items = [item for item in items if _is_public(item)]
        return DataElement(element.tag, "SQ", Sequence(items)) if any(len(item) for item in items) else None

    def _uids(self, element: DataElement) -> DataElement | None:
        known = [str(uid) for uid in _words(element.value)]
        if not all(_UID.fullmatch(uid) and len(uid) <= 64 for uid in known):
            return None
        if element.keyword.endswith("ClassUID"):
            return element if all(uid in UID_dictionary for uid in known) else None
        return _with(element, [self._names.uid(uid) for uid in known])

    def _dates(self, value: Any) -> list[str]:
        moved = []
        for each in _words(value):
            try:
                moved.append(self._names.date(self._pseudonym, str(each).strip().replace(".", "")))
            except DataError:
                continue
        return moved


def _is_public(item: Dataset) -> bool:
    """False for an item that is a code but not one of a public coding scheme."""
    if "CodeValue" not in item and "CodingSchemeDesignator" not in item:
        return True
    form = profile.SCHEMES.get(str(item.get("CodingSchemeDesignator", "")))
    return form is not None and re.fullmatch(form, str(item.get("CodeValue", ""))) is not None


def _hold_table(made: Dataset, data: int, descriptor: int) -> None:
    """Cut a lookup table to as many values as its descriptor says; one without a descriptor goes."""
    said, table = made.get(descriptor), made[data]
    if said is None or len(said.value) != 3:
        del made[data]
        return
    count = int(said.value[0]) % 2**16 or 2**16
    if "Segmented" in table.keyword:
        return
    if isinstance(table.value, bytes):
        count *= 2 if len(table.value) >= 2 * count else 1
        count += count % 2
    if not isinstance(table.value, int) and len(table.value) > count:
        made[data] = DataElement(data, table.VR, table.value[:count])


def _with(element: DataElement, values: list[str]) -> DataElement | None:
    if not values:
        return None
    return DataElement(element.tag, element.VR, values if len(values) > 1 else values[0])


def _words(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(each) for each in value]


def _all(value: Any, good: Any) -> bool:
    several = not isinstance(value, str | bytes | int | float) and hasattr(value, "__iter__")
    return all(good(each) for each in value) if several else bool(good(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _matches(pattern: re.Pattern[str]) -> Any:
    return lambda value: pattern.fullmatch(str(value).strip()) is not None


def _age(value: str) -> list[str]:
    found = _AGE.fullmatch(value.strip())
    if found is None:
        return []
    return [f"{profile.OLDEST + 1:03}Y" if found[2] == "Y" and int(found[1]) > profile.OLDEST else value.strip()]
