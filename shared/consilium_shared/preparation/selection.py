"""Selection of files by what their headers say: modality, body part, view, side, intent, description, days."""

from __future__ import annotations

from datetime import date, datetime

import pydicom

from consilium_shared.inputs import Image, Selection
from consilium_shared.preparation.foreign import Unusable, any_failure
from consilium_shared.preparation.pixels import frames_of, require_picture
from consilium_shared.preparation.tags import values, word

_INTENT = {"presentation": "FOR PRESENTATION", "processing": "FOR PROCESSING"}


def require_wanted(header: pydicom.Dataset, image: Image, more: Selection | None = None) -> None:
    """Check that a header announces what a study takes; raises Unusable with the reason.

    Args:
        header: as ``read_header`` gives it.
        image: the study's.
        more: a site's own selection, on top of the study's.
    """
    with any_failure("damaged header"):
        require_modality(header, image.modality)
        for selection in (image.select, more):
            if selection is not None:
                require_selected(header, selection)
        require_picture(header)
        if image.depth is not None and "LOCALIZER" in map(str, values(header, "ImageType")):
            raise Unusable("a localizer, where the study takes volumes")
        if image.depth is None and image.frames == "single" and frames_of(header) != 1:
            raise Unusable("more than one frame")


def require_modality(header: pydicom.Dataset, modalities: tuple[str, ...]) -> None:
    """Check that a file is of a modality that the study takes; none listed takes all. Raises Unusable."""
    modality = word(header, "Modality")
    if modalities and modality not in modalities:
        shown = modality if modality.isascii() and modality.isalpha() and len(modality) <= 16 else "unknown"
        raise Unusable(f"modality {shown}")


def require_selected(header: pydicom.Dataset, selection: Selection) -> None:
    """Check a header against a selection; raises Unusable, which names the tag and not its value."""
    _among(header, ("BodyPartExamined",), selection.body_part)
    _among(header, ("ViewPosition",), selection.view)
    _among(header, ("ImageLaterality", "Laterality"), selection.laterality)
    if selection.intent is not None:
        _among(header, ("PresentationIntentType",), (_INTENT[selection.intent],))
    if selection.description:
        described = word(header, "SeriesDescription").casefold()
        if not any(text.casefold() in described for text in selection.description):
            raise Unusable("not selected: SeriesDescription")
    if selection.since is not None or selection.until is not None:
        day = _day(header)
        if day is None:
            raise Unusable("not selected: no date of the acquisition")
        if not (selection.since or date.min) <= day <= (selection.until or date.max):
            raise Unusable("not selected: date of the acquisition")


def _among(header: pydicom.Dataset, keywords: tuple[str, ...], wanted: tuple[str, ...]) -> None:
    if not wanted:
        return
    found = next((each for each in (word(header, keyword) for keyword in keywords) if each), "")
    if not found:
        raise Unusable(f"not selected: no {keywords[0]}")
    if found not in wanted:
        raise Unusable(f"not selected: {keywords[0]}")


def _day(header: pydicom.Dataset) -> date | None:
    for keyword in ("AcquisitionDate", "SeriesDate", "StudyDate"):
        text = word(header, keyword).replace(".", "")
        try:
            return datetime.strptime(text[:8], "%Y%m%d").date()
        except ValueError:
            continue
    return None
