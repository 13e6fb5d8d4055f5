"""Tags of a foreign DICOM file as numbers and words: an empty one is an absent one, a bad one has its own reason."""

from __future__ import annotations

import math
from collections.abc import MutableSequence
from typing import Any

import pydicom

from consilium_shared.preparation.foreign import Unusable


def values(dataset: pydicom.Dataset, keyword: str) -> list[Any]:
    """The values of a tag, none where it is absent, empty, or not even text of its kind."""
    try:
        found = dataset.get(keyword)
    except Exception:  # pydicom converts when a tag is asked for, and a foreign value may be anything
        return []
    if found is None or found == "":
        return []
    return (
        [each for each in found if each is not None and each != ""] if isinstance(found, MutableSequence) else [found]
    )


def number(dataset: pydicom.Dataset, keyword: str) -> float | None:
    """The one number of a tag, None where it is absent or empty.

    Raises:
        Unusable: no number, or several that differ.
    """
    try:
        given = dataset.get(keyword)
    except Exception:
        raise Unusable(f"{keyword} is no number") from None
    if given is None or given == "":
        return None
    found = values(dataset, keyword)
    try:
        numbers = {float(each) for each in found}
    except (TypeError, ValueError):
        raise Unusable(f"{keyword} is no number") from None
    if not all(map(math.isfinite, numbers)):
        raise Unusable(f"{keyword} is no number")
    if len(numbers) > 1:
        raise Unusable(f"{keyword} holds several different numbers")
    return numbers.pop() if numbers else None


def first_number(dataset: pydicom.Dataset, keyword: str) -> float | None:
    """The first number of a tag that may hold several alternatives, None where there is none."""
    for each in values(dataset, keyword)[:1]:
        try:
            found = float(each)
        except (TypeError, ValueError):
            return None
        return found if math.isfinite(found) else None
    return None


def word(dataset: pydicom.Dataset, keyword: str) -> str:
    """A code of the standard in upper case, without blanks around it; empty where it is absent."""
    found = values(dataset, keyword)
    return str(found[0]).strip().upper() if found else ""


def whole(dataset: pydicom.Dataset, keyword: str, absent: int) -> int:
    """A whole number of a tag, ``absent`` where there is none; raises Unusable where it is no number."""
    found = number(dataset, keyword)
    return absent if found is None else int(found)
