"""One DICOM picture of any scanner as a model's input in [0, 1], prepared from itself alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from consilium_shared.inputs import Image
from consilium_shared.preparation.foreign import Unusable, any_failure, read_whole
from consilium_shared.preparation.pixels import GREY, frames_of, require_picture, stored_values
from consilium_shared.preparation.presentation import grey_of, in_colour, modality_values, present
from consilium_shared.preparation.resample import aspect, resize
from consilium_shared.preparation.tags import word

PERCENTILES = (1.0, 99.0)


def read_picture(path: Path, image: Image, frame: int | None = None) -> NDArray[np.float32]:
    """One frame of a file as float32 ``[C, S, S]`` in [0, 1], white is bright; raises Unusable.

    A picture that has one brightness everywhere is set aside: nothing is to be seen on it.

    Args:
        path: a DICOM file.
        image: the study's.
        frame: its number from 0; by default the one in the middle.
    """
    dataset = read_whole(path)
    require_picture(dataset)
    frames = frames_of(dataset)
    stored = stored_values(dataset, frames // 2 if frame is None else frame)
    if word(dataset, "PhotometricInterpretation") in GREY:
        shown = _grey(dataset, stored, image)
    else:
        shown = toned(in_colour(dataset, stored), image)
    with any_failure("pixel spacing makes no sense"):
        return presented(shown, image, aspect(dataset))


def toned(shown: NDArray[np.float32], image: Image) -> NDArray[np.float32]:
    """A picture without measured values, ``[rows, columns]`` or ``[rows, columns, 3]``, on the study's scale.

    Raises:
        Unusable: colours where the study takes grey, or no measured values where it has a window of them.
    """
    if image.window is not None:
        raise Unusable("a picture without measured values, where the study has a window of them")
    if shown.ndim == 3 and image.channels == 1:
        shown = grey_of(shown)
    return stretched(shown) if image.intensity == "percentiles" else shown


def presented(shown: NDArray[np.float32], image: Image, pixel_aspect: float = 1.0) -> NDArray[np.float32]:
    """A picture in [0, 1], ``[rows, columns]`` or ``[rows, columns, 3]``, as the study's ``[C, S, S]``.

    Raises:
        Unusable: one brightness everywhere.
    """
    if float(np.ptp(shown)) == 0:
        raise Unusable("one brightness everywhere: nothing is to be seen")
    planes = [shown] if shown.ndim == 2 else [shown[..., number] for number in range(3)]
    small = [resize(plane, image.size, pixel_aspect) for plane in planes]
    return np.stack(small * (image.channels // len(small)))


def stretched(found: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values from their own 1st percentile, 0, to their 99th, 1; raises Unusable where those are the same."""
    low, high = (float(each) for each in np.percentile(found, PERCENTILES))
    if not low < high:
        raise Unusable("nearly all values are the same: nothing is to be seen")
    return windowed(found, low, high)


def windowed(found: NDArray[np.float32], low: float, high: float) -> NDArray[np.float32]:
    """Values from ``low``, 0, to ``high``, 1; others are cut off."""
    return np.asarray(np.clip((found - np.float32(low)) / np.float32(high - low), 0.0, 1.0))


def _grey(dataset: pydicom.Dataset, stored: NDArray[Any], image: Image) -> NDArray[np.float32]:
    if image.intensity == "file":
        return present(dataset, stored)
    found = modality_values(dataset, stored).astype(np.float32)
    shown = stretched(found) if image.window is None else windowed(found, *image.window)
    return np.float32(1) - shown if word(dataset, "PhotometricInterpretation") == "MONOCHROME1" else shown
