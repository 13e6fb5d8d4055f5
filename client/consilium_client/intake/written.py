"""Tables that appear whole or not at all, and counts of what is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO

from consilium_shared.errors import ConfigurationError
from consilium_shared.files import put_in_place

_MOST_REASONS = 200


class Reasons(Counter[str]):
    """Counts by reason; the first so many by name, since a reason may quote a unit of the source's."""

    def __setitem__(self, reason: str, count: int) -> None:
        if reason not in self and len(self) >= _MOST_REASONS:
            reason, count = "other reasons", self["other reasons"] + count
        super().__setitem__(reason, count)


@contextmanager
def whole(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its place when the block ends without an error, and leaves nothing otherwise."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with ExitStack() as stack:
            file = stack.enter_context(NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False))
            stack.callback(Path(file.name).unlink, missing_ok=True)
            yield file
            put_in_place(file, Path(file.name), path)
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from error
