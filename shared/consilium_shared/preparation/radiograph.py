"""One DICOM picture of any scanner as a float32 image in [0, 1], prepared from itself alone."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pydicom
from numpy.typing import NDArray

from consilium_shared.preparation.foreign import Unusable, any_failure, read_whole
from consilium_shared.preparation.pixels import GREY, frames_of, require_modality, require_picture, stored_values
from consilium_shared.preparation.presentation import grey_of, in_colour, present
from consilium_shared.preparation.tags import values, word


def require_radiograph(header: pydicom.Dataset, modalities: tuple[str, ...]) -> None:
    """Check that a header announces one image of a modality that the study takes; raises Unusable."""
    with any_failure("damaged header"):
        require_modality(header, modalities)
        require_picture(header)
        if frames_of(header) != 1:
            raise Unusable("more than one frame")


def read_image(path: Path, size: int) -> NDArray[np.float32]:
    """One file as a ``size`` × ``size`` float32 image in [0, 1], white is bright; raises Unusable.

    A picture that has one brightness everywhere is set aside: nothing is to be seen on it.
    """
    dataset = read_whole(path)
    require_picture(dataset)
    stored = stored_values(dataset)
    if word(dataset, "PhotometricInterpretation") in GREY:
        grey = present(dataset, stored)
    else:
        grey = grey_of(in_colour(dataset, stored))
    if float(np.ptp(grey)) == 0:
        raise Unusable("one brightness everywhere: nothing is to be seen")
    with any_failure("pixel spacing makes no sense"):
        return resize(grey, size, aspect(dataset))


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


def resize(grey: NDArray[np.float32], size: int, pixel_aspect: float = 1.0) -> NDArray[np.float32]:
    """Area-averaged to ``size`` × ``size`` with square pixels; the shorter side is centred between black margins."""
    height, width = grey.shape[0] * pixel_aspect, float(grey.shape[1])
    longest = max(height, width)
    rows, columns = max(1, round(size * height / longest)), max(1, round(size * width / longest))
    small = _area(grey.shape[0], rows) @ grey @ _area(grey.shape[1], columns).T
    image = np.zeros((size, size), dtype=np.float32)
    top, left = (size - rows) // 2, (size - columns) // 2
    image[top : top + rows, left : left + columns] = np.clip(small, 0.0, 1.0)
    return image


@lru_cache(maxsize=16)
def _area(old: int, new: int) -> NDArray[np.float32]:
    """``[new, old]``: the share of each old pixel in each new one along one axis; rows add up to 1."""
    edges = np.linspace(0, old, new + 1)
    start, end = edges[:-1, None], edges[1:, None]
    pixel = np.arange(old)[None, :]
    overlap = np.clip(np.minimum(end, pixel + 1) - np.maximum(start, pixel), 0.0, None)
    return np.asarray(overlap / overlap.sum(axis=1, keepdims=True), dtype=np.float32)
