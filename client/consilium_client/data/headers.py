"""Headers of DICOM files, read once: the prepared store keeps what they say, while their files stay as they are."""

from __future__ import annotations

from collections.abc import MutableSequence
from pathlib import Path
from typing import Any, cast

import pydicom

from consilium_client.prepared.catalogue import Stamp
from consilium_client.prepared.facts import Facts
from consilium_client.prepared.recipe import code_digest
from consilium_client.prepared.store import AssetFolder
from consilium_shared.preparation import foreign
from consilium_shared.preparation.foreign import HEADER, SCANNER, read_header

_TAGS = tuple(dict.fromkeys([*HEADER, *SCANNER]))
_BROKEN = {"broken": True}
"""Fact about a tag whose value cannot be read."""


class Headers:
    """Headers of an asset's files.

    Args:
        store: keeps them; None: each is read from its file.
    """

    def __init__(self, store: AssetFolder | None) -> None:
        files = [Path(str(foreign.__file__)), Path(__file__)]
        self._facts = None if store is None else Facts(store, code_digest(files, ["pydicom"]))

    def read(self, path: Path) -> pydicom.Dataset:
        """The header of a file, as far as ``read_header`` reads it and ``get`` tells; raises Unusable."""
        if self._facts is None:
            return read_header(path)
        try:
            stamp = Stamp.of(path)
        except OSError:
            return read_header(path)  # which says why not
        if (fact := self._facts.known(path, stamp)) is not None:
            return cast(pydicom.Dataset, _Said(fact))
        header = read_header(path)
        if (fact := _fact(header)) is not None:
            self._facts.note(path, stamp, fact)
        return header

    def save(self) -> None:
        """Keep what was read."""
        if self._facts is not None:
            self._facts.save()


class _Said:
    """Values of a header's tags, as the header itself gives them."""

    def __init__(self, fact: dict[str, Any]) -> None:
        self._fact = fact

    def get(self, keyword: str, default: Any = None) -> Any:
        """The value of a tag; raises ValueError where the file's cannot be read."""
        found = self._fact.get(keyword, default)
        if found == _BROKEN:
            raise ValueError(keyword)
        return found


def _fact(header: pydicom.Dataset) -> dict[str, Any] | None:
    """Values of a header's tags as JSON-like data; None where one is of a type that it has no form for."""
    fact: dict[str, Any] = {}
    for tag in _TAGS:
        try:
            found = header.get(tag)
        except Exception:  # whatever pydicom raises on a foreign value, it raises when the tag is asked for
            fact[tag] = _BROKEN
            continue
        if found is None:
            continue
        plain = [_plain(each) for each in found] if isinstance(found, MutableSequence) else _plain(found)
        if plain is None or (isinstance(plain, list) and None in plain):
            return None
        fact[tag] = plain
    return fact


def _plain(value: Any) -> str | int | float | None:
    """A value as JSON carries it, or None."""
    for kind in (str, int, float):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return None
