"""Pictures and volumes on another grid, by area: what a new pixel covers of the old ones, it averages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pydicom
from numpy.typing import NDArray

from consilium_shared.preparation.foreign import Unusable
from consilium_shared.preparation.tags import values

SIDE = 65_535
"""Longest side of a picture or volume, as long as DICOM knows one."""
_NUMBERS = 2**21
"""Numbers of a table of shares that is kept, and of a part that is worked on."""


def aspect(dataset: pydicom.Dataset) -> float:
    """Height of a pixel over its width: 1 where the file gives no spacing that means anything."""
    for tag in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"):
        try:
            spacing = [float(each) for each in values(dataset, tag)]
        except (TypeError, ValueError):
            continue
        if len(spacing) != 2 or not min(spacing) > 0 or not max(spacing) < np.inf:
            continue
        if not 0.01 <= spacing[0] / spacing[1] <= 100:
            raise Unusable("pixel spacing makes no sense")
        return spacing[0] / spacing[1]
    return 1.0


def resize(picture: NDArray[np.float32], size: int, pixel_aspect: float = 1.0) -> NDArray[np.float32]:
    """A picture ``[rows, columns]`` in [0, 1] averaged to ``[size, size]`` with square pixels; the shorter side is
    centred between black margins."""
    return fit(picture, (size, size), (pixel_aspect, 1.0))


def fit(array: NDArray[np.float32], shape: tuple[int, ...], spacing: tuple[float, ...]) -> NDArray[np.float32]:
    """An array in [0, 1] averaged to ``shape``; its last two axes keep their proportion, between black margins.

    >>> fit(np.ones((2, 4, 8), np.float32), (1, 4, 4), (1.0, 1.0, 1.0))[0, :, 0].tolist()
    [0.0, 1.0, 1.0, 0.0]

    Args:
        array: ``[…, rows, columns]``.
        shape: one number for each axis; the last two are the same.
        spacing: distance between neighbours along each axis, in one unit.
    """
    height, width = (length * step for length, step in zip(array.shape[-2:], spacing[-2:], strict=True))
    inner = [max(1, round(shape[-1] * side / max(height, width))) for side in (height, width)]
    small = np.clip(averaged(array, (*shape[:-2], *inner)), 0.0, 1.0)
    margins = [(whole - part, (whole - part) // 2) for whole, part in zip(shape[-2:], inner, strict=True)]
    pads = [(0, 0)] * (array.ndim - 2) + [(before, both - before) for both, before in margins]
    return np.pad(small, pads)


def averaged(array: NDArray[np.float32], shape: Sequence[int]) -> NDArray[np.float32]:
    """An array of ``shape``, each number the average of what it covers; raises Unusable for a side beyond ``SIDE``."""
    if max(array.shape) > SIDE:  # the table of shares has so many columns
        raise Unusable(f"a side of more than {SIDE} pixels")
    for axis, (old, new) in enumerate(zip(array.shape, shape, strict=True)):
        if axis == array.ndim - 1:
            array = array @ _area(old, new).T
        elif axis == array.ndim - 2:
            array = _area(old, new) @ array
        else:
            array = np.moveaxis(np.tensordot(_area(old, new), array, axes=(1, axis)), 0, axis)
    return array


def _area(old: int, new: int) -> NDArray[np.float32]:
    """``[new, old]``: the share of each old pixel in each new one along one axis; rows add up to 1."""
    return _kept(old, new) if old * new <= _NUMBERS else _shares(old, new)


def _shares(old: int, new: int) -> NDArray[np.float32]:
    edges, pixel = np.linspace(0, old, new + 1), np.arange(old)[None, :]
    found, rows = np.empty((new, old), dtype=np.float32), max(1, _NUMBERS // old)
    for first in range(0, new, rows):  # each row is its own: a long side takes no more memory on the way
        start, end = edges[first:-1, None][:rows], edges[first + 1 :, None][:rows]
        overlap = np.clip(np.minimum(end, pixel + 1) - np.maximum(start, pixel), 0.0, None)
        found[first : first + rows] = overlap / overlap.sum(axis=1, keepdims=True)
    return found


_kept = lru_cache(maxsize=64)(_shares)
