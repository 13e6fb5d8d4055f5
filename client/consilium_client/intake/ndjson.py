"""Lines of NDJSON files, one resource each, read as a stream: memory holds one line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from consilium_client.data import bounds
from consilium_client.data.bounds import require_file
from consilium_shared.errors import DataError

LINE_BYTES = 16 * 2**20


def files(folder: Path, resource: str) -> list[Path]:
    """Files of a bulk export that hold a kind of resource, by their names, as servers write them.

    ``Patient.ndjson``, ``Patient.000.ndjson``, ``Patient-1.ndjson.gz``, ``1.Patient.ndjson`` …
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    return [
        path
        for path in sorted(folder.iterdir())
        if path.name.endswith((".ndjson", ".ndjson.gz", ".jsonl", ".jsonl.gz"))
        and resource in path.name.replace("-", ".").replace("_", ".").split(".")
    ]


def resources(path: Path, kind: str) -> Iterator[dict[str, Any]]:
    """Resources of a file, in its order.

    Args:
        path: an NDJSON file, perhaps gzipped.
        kind: what every resource must be.

    Raises:
        DataError: not readable, a line that is no JSON object, too long or of another kind, with its number; or what a
            gzipped file holds is past its bounds.
    """
    size = require_file(path, "an NDJSON file")
    packed = path.suffix == ".gz"
    most = max(bounds.UNPACKED_FREELY, size * bounds.UNPACKED_TIMES) if packed else bounds.TABLE_BYTES
    read = 0
    try:
        with gzip.open(path) if packed else path.open("rb") as file:
            number = 0
            while line := file.readline(LINE_BYTES + 1):
                number += 1
                read += len(line)
                if len(line) > LINE_BYTES:
                    raise DataError(f"{path}, line {number}: longer than {LINE_BYTES >> 20} MiB")
                if read > most:
                    raise DataError(f"{path} holds more than {most >> 20} MiB")
                if line.strip():
                    yield _resource(line, kind, f"{path}, line {number}")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or 'damaged'}") from error


def _resource(line: bytes, kind: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
        if b"\\ud" in line.lower():  # half of a pair of UTF-16 is no text, and could be written nowhere
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise DataError(f"{where}: no JSON") from None
    if not isinstance(found, dict) or found.get("resourceType") != kind:
        raise DataError(f"{where}: no {kind}")
    return found
