"""Making of records from sources, here or in a process beside: digest first, and only what is not there is made."""

from __future__ import annotations

from dataclasses import dataclass

from consilium_client.prepared.catalogue import File, Stamp, read_file
from consilium_client.prepared.recipe import Recipe, Source, packed
from consilium_shared.preparation.foreign import OutOfMemory, Unusable

CHANGED = "changed while it was read"


@dataclass(frozen=True)
class Failed:
    """A source that gives no record.

    Attributes:
        reason: under which it is set aside.
        lasting: whether it follows from the content, so that it need not be tried again.
    """

    reason: str
    lasting: bool = True


@dataclass(frozen=True)
class Record:
    """A record that was made.

    Attributes:
        content: its bytes.
        remark: what looks odd about it (``Recipe.remark``).
    """

    content: bytes
    remark: str = ""


def files_of(source: Source) -> tuple[File, ...] | None:
    """The source's files as they were read; None where one cannot be."""
    try:
        return tuple(read_file(path) for path in source.paths)
    except OSError:
        return None


def make(recipe: Recipe, source: Source) -> Record | Failed:
    """The record of a source, or why there is none."""
    try:
        arrays = recipe.make(source)
        return Record(packed(arrays, recipe.fields), recipe.remark(arrays))
    except Unusable as error:
        return Failed(str(error), error.lasting)
    except MemoryError:
        return Failed(str(OutOfMemory()), lasting=False)


def confirmed(outcome: Record | Failed, source: Source, files: tuple[File, ...] | None) -> Record | Failed:
    """The outcome, if the source's files are still as they were read before; else nothing of it is kept.

    Args:
        outcome: of a source, whoever made it.
        source: files that exist.
        files: as they were read before; None where one could not be.
    """
    same = files is not None and _same(source, files)
    if isinstance(outcome, Failed):
        return Failed(outcome.reason, outcome.lasting and same)
    return outcome if same else Failed(CHANGED, lasting=False)


def _same(source: Source, files: tuple[File, ...]) -> bool:
    try:
        return all(Stamp.of(path) == file.stamp for path, file in zip(source.paths, files, strict=True))
    except OSError:
        return False
