"""Images of an asset as a model would see them: how much of the grey range they use, and some of them to look at."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from consilium_client.data.scanners import Scanner
from consilium_shared.inputs import Image
from consilium_shared.preparation.foreign import Unusable
from consilium_shared.preparation.picture import read_picture

SHOWN = 6
"""Thumbnails of each class."""
PIXELS = 112
"""Longest side of a thumbnail."""
LOW = 0.1
"""Share of the grey range; an image that uses less is told."""
_BINS = 10


@dataclass
class Pictures:
    """Use of the grey range by prepared images, and thumbnails by class; filled record by record.

    Attributes:
        classes: class -> which records are in it, bool ``[N]``.
        use: counts of images by the share of the grey range between their darkest pixel above black
            and their brightest, in tenths.
        low: images that use less than ``LOW`` of it.
        thumbnails: class -> data URLs of PNG files.
    """

    classes: Mapping[str, NDArray[np.bool_]]
    use: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, dtype=np.int64))
    low: int = 0
    thumbnails: dict[str, list[str]] = field(default_factory=dict)

    def add(self, start: int, images: NDArray[np.float32]) -> None:
        """Take images float32 ``[n, …]`` in [0, 1], those of the records from ``start`` on."""
        flat = images.reshape(len(images), -1)
        # Black is left out: it is what margins are made of where an image is not square.
        least = np.where(flat > 0, flat, 1).min(axis=1, initial=1)
        used = np.clip(flat.max(axis=1, initial=0) - least, 0, 1)
        self.use += np.bincount(np.minimum((used * _BINS).astype(int), _BINS - 1), minlength=_BINS)
        self.low += int(np.count_nonzero(used < LOW))
        for name, of in self.classes.items():
            kept = self.thumbnails.setdefault(name, [])
            for at in np.flatnonzero(of[start : start + len(images)])[: SHOWN - len(kept)]:
                kept.append(thumbnail(images[at]))

    def to_json(self) -> dict[str, Any]:
        """Numbers alone; no picture."""
        return {"grey_range_used": self.use.tolist(), "under_a_tenth": self.low}


def of_scanners(found: Sequence[Scanner], size: int) -> list[tuple[Scanner, list[str]]]:
    """Thumbnails of some images of each scanner, prepared at ``size`` pixels; what cannot be read is left out."""
    shown, shown_as = [], Image(size=size, channels=3)
    for scanner in found:
        made = []
        for path in scanner.examples:
            try:
                made.append(thumbnail(read_picture(path, shown_as)))
            except (Unusable, OSError):
                continue
        shown.append((scanner, made))
    return shown


def thumbnail(image: NDArray[np.float32]) -> str:
    """Data URL of a PNG of one image ``[…, H, W]`` in [0, 1]: of colours three channels, of a volume its middle.

    >>> thumbnail(np.zeros((1, 8, 8), np.float32))[:22]
    'data:image/png;base64,'
    """
    while image.ndim > 3 or (image.ndim == 3 and image.shape[0] != 3):
        image = image[image.shape[0] // 2]
    step = -(-max(image.shape[-2:]) // PIXELS)
    small = np.round(255 * np.clip(np.nan_to_num(image[..., ::step, ::step]), 0, 1)).astype(np.uint8)
    return "data:image/png;base64," + base64.b64encode(_png(small)).decode("ascii")


def _png(image: NDArray[np.uint8]) -> bytes:
    """PNG file of a grey image ``[H, W]`` or a coloured one ``[3, H, W]``."""
    colour = image.ndim == 3
    rows = np.ascontiguousarray(np.moveaxis(image, 0, -1) if colour else image)
    height, width = rows.shape[:2]
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rows.reshape(height, -1)], axis=1)  # filter 0 in each
    head = struct.pack(">IIBBBBB", width, height, 8, 2 if colour else 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b""))
    made = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + made
