"""Identifiers of people and records: one person is one unit, however a file writes the identifier, or is set aside."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping

import numpy as np
import pandas as pd
from numpy.typing import NDArray

_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff9-\ufffb\U000e0000-\U000e0fff]"
)
_BLANKS = re.compile(r"\s+")
_WHOLE = re.compile(r"([+-]?[0-9]+)\.0+")
_EXPONENT = re.compile(r"[+-]?[0-9]+(?:[.,][0-9]*)?[eE][+-][0-9]+")
_ZEROS = re.compile(r"(?<![0-9])0+(?=[0-9])")
_NOTHING = frozenset(
    {
        *("", "?", "-", "--", ".", "nan", "none", "null", "(null)", "[null]", "\\n", "nil", "nat", "<na>", "na", "n/a"),
        *("n.a.", "#na", "#n/a", "#value!", "#ref!", "#name?", "#null!", "#num!", "#div/0!"),
        *("unknown", "unk", "missing", "undefined", "not available", "not known"),
    }
)

NOTHING = "a word for nothing (such as nan, NULL or unknown), where an identifier is meant"
EXPONENT = "a number with an exponent, as spreadsheets shorten an identifier: its last digits are lost"


def canonical(word: str) -> str:
    """Identifier in its one spelling.

    Invisible characters go, any blanks are one blank, canonically equal Unicode is one form, and ``7.0`` is ``7``.
    Leading zeros and case stay: ``007`` and ``7`` may be two people.
    """
    word = _BLANKS.sub(" ", _INVISIBLE.sub("", word))
    word = unicodedata.normalize("NFC", word).strip()
    whole = _WHOLE.fullmatch(word)
    return whole.group(1) if whole else word


def unusable(word: str) -> str | None:
    """Reason why an identifier, in its one spelling, names nobody, or None."""
    if word.casefold() in _NOTHING:
        return NOTHING
    return EXPONENT if _EXPONENT.fullmatch(word) else None


def settle(column: pd.Series) -> tuple[pd.Series, Mapping[str, NDArray[np.bool_]]]:
    """Identifiers of a column in their one spelling.

    Args:
        column: text, missing where there is none.

    Returns:
        the column, missing also where an identifier names nobody; and for each reason a bool mask ``[N]`` of rows.
    """
    codes, words = pd.factorize(column)
    spelt = [canonical(str(word)) for word in words]
    wrong = np.array([unusable(word) or "" for word in spelt], dtype=object)
    reasons = {why: np.isin(codes, np.flatnonzero(wrong == why)) for why in (NOTHING, EXPONENT) if (wrong == why).any()}
    usable = pd.array([None if why else word for word, why in zip(spelt, wrong, strict=True)], dtype="string")
    settled = usable.take(codes, allow_fill=True)
    return pd.Series(settled, index=column.index, name=column.name), reasons


def alike(word: str) -> str:
    """Identifier without case, blanks, compatibility forms and leading zeros."""
    return _ZEROS.sub("", _BLANKS.sub("", unicodedata.normalize("NFKC", word).casefold()))


def near(words: Iterable[str]) -> list[list[str]]:
    """Groups of different identifiers that are alike; each may be one person, or several."""
    groups: dict[str, list[str]] = {}
    for word in dict.fromkeys(words):
        groups.setdefault(alike(word), []).append(word)
    return [group for group in groups.values() if len(group) > 1]


def strangers(words: Iterable[str], known: Iterable[str]) -> list[str]:
    """Identifiers that are not among the known ones and are alike to one of them."""
    exact = set(known)
    folded = {alike(word) for word in exact}
    return [word for word in dict.fromkeys(words) if word not in exact and alike(word) in folded]
