"""Stored values of one picture as it is to be seen: grey or colour in [0, 1], from that picture alone.

The transformations are those of DICOM PS3.3: modality (C.11.1), VOI (C.11.2), photometric interpretation (C.7.6.3.1.2),
palettes (C.7.9), padding (C.7.5.1.1.2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi

from consilium_shared.preparation.foreign import Unusable, any_failure
from consilium_shared.preparation.tags import first_number, number, values, whole, word

_TABLED_BITS = 16
"""Up to so many bits the picture of every possible value is made once, and looked up for each pixel."""
_BLOCK = 2**20
ALIKE = 8 / 255
"""Channels of a grey picture that is stored as colour differ by no more: what lossy compression adds."""


def present(dataset: pydicom.Dataset, stored: NDArray[Any]) -> NDArray[np.float32]:
    """Grey values in [0, 1] from stored values ``[rows, columns]``; raises Unusable.

    The VOI table or first window of the file if it has one, else the full range that its bits can hold: never the
    range that the pixels happen to fill. MONOCHROME1 is turned over, so that 1 is always white; padding is black.
    """
    bits, signed = whole(dataset, "BitsStored", 16), whole(dataset, "PixelRepresentation", 0) == 1
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    if bits <= _TABLED_BITS:
        table = _seen(dataset, np.arange(low, high + 1), low, high)
        return np.asarray(table[np.clip(stored.astype(np.int32, copy=False), low, high) - low])
    flat, grey = stored.reshape(-1), np.empty(stored.size, dtype=np.float32)
    for start in range(0, len(flat), _BLOCK):
        grey[start : start + _BLOCK] = _seen(dataset, flat[start : start + _BLOCK].astype(np.int64), low, high)
    return grey.reshape(stored.shape)


def in_colour(dataset: pydicom.Dataset, stored: NDArray[Any]) -> NDArray[np.float32]:
    """Colours ``[rows, columns, 3]`` in [0, 1] from stored RGB or palette indices; raises Unusable."""
    with any_failure("the palette makes no sense"):
        bits = whole(dataset, "BitsStored", 8)
        if word(dataset, "PhotometricInterpretation") == "PALETTE COLOR":
            stored = np.asarray(apply_color_lut(stored, dataset))
            bits = 8 * stored.dtype.itemsize
    if stored.ndim != 3 or stored.shape[-1] != 3:
        raise Unusable("pixel data is not one picture of three colours")
    return np.asarray(np.clip(stored.astype(np.float32) / np.float32(2**bits - 1), 0.0, 1.0))


def grey_of(colours: NDArray[np.float32]) -> NDArray[np.float32]:
    """Grey of a picture that was only stored as colour; raises Unusable where it has colours."""
    first = colours[..., 0]
    if max(float(np.abs(colours[..., other] - first).max(initial=0)) for other in (1, 2)) > ALIKE:
        raise Unusable("colour image")
    return np.asarray(colours[..., 1])


def modality_values(dataset: pydicom.Dataset, stored: NDArray[Any]) -> NDArray[np.float64]:
    """Values in the modality's own unit (of CT Hounsfield units), float64; raises Unusable.

    A slope without an intercept, or the reverse, is no rescale: both or neither are in a file that means one.
    """
    if values(dataset, "ModalityLUTSequence"):
        with any_failure("ModalityLUTSequence makes no sense"):
            return np.asarray(apply_modality_lut(stored, dataset), dtype=np.float64)
    slope, intercept = rescale(dataset)
    return np.asarray(stored, dtype=np.float64) * slope + intercept


def rescale(dataset: pydicom.Dataset) -> tuple[float, float]:
    """Slope and intercept, (1, 0) where the file does not give both; raises Unusable."""
    slope, intercept = number(dataset, "RescaleSlope"), number(dataset, "RescaleIntercept")
    if slope == 0:
        raise Unusable("RescaleSlope is 0")
    return (1.0, 0.0) if slope is None or intercept is None else (slope, intercept)


def _seen(dataset: pydicom.Dataset, stored: NDArray[Any], low: int, high: int) -> NDArray[np.float32]:
    """Grey of each of these stored values ``[n]``."""
    found = modality_values(dataset, stored)
    width, center = first_number(dataset, "WindowWidth"), first_number(dataset, "WindowCenter")
    if values(dataset, "VOILUTSequence"):
        with any_failure("VOILUTSequence makes no sense"):
            grey = np.asarray(apply_voi(found.astype(np.int64), dataset), dtype=np.float64)
            grey = grey / (2.0 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1)
    elif width is not None and center is not None and width > 0:
        grey = _window(found, center, width, word(dataset, "VOILUTFunction") or "LINEAR")
    else:
        ends = _ends(dataset, low, high)
        grey = (found - ends.min()) / (ends.max() - ends.min())
    if not np.isfinite(grey).all():
        raise Unusable("rescale and window tags make no sense together")
    grey = np.clip(grey, 0.0, 1.0)
    if word(dataset, "PhotometricInterpretation") == "MONOCHROME1":
        grey = 1.0 - grey
    grey[_padding(dataset, stored, low, high)] = 0.0
    return grey.astype(np.float32)


def _padding(dataset: pydicom.Dataset, stored: NDArray[Any], low: int, high: int) -> NDArray[np.bool_]:
    """Mask of the stored values that stand for no measurement at all."""
    first, last = first_number(dataset, "PixelPaddingValue"), first_number(dataset, "PixelPaddingRangeLimit")
    if first is None:
        return np.zeros(stored.shape, dtype=bool)

    def turned(value: float) -> int:  # written with the other sign than the pixels: the same bits are meant
        return int(value) if low <= value <= high else (int(value) - low) % (high - low + 1) + low

    ends = sorted((turned(first), turned(first if last is None else last)))
    return np.asarray((stored >= ends[0]) & (stored <= ends[1]))


def _window(found: NDArray[np.float64], center: float, width: float, function: str) -> NDArray[np.float64]:
    """PS3.3 C.11.2.1.2 and C.11.2.1.3, with an output range of 0 to 1."""
    if function == "LINEAR" and width >= 1:
        if width == 1:
            return np.asarray(found > center - 0.5, dtype=np.float64)
        return np.asarray((found - (center - 0.5)) / (width - 1) + 0.5)
    if function in ("LINEAR", "LINEAR_EXACT"):  # narrower than 1 LINEAR has no meaning, and scaled values need it
        return np.asarray((found - center) / width + 0.5)
    if function == "SIGMOID":
        return np.asarray(1.0 / (1.0 + np.exp(np.clip(-4.0 * (found - center) / width, -700, 700))))
    raise Unusable("VOILUTFunction is none of the standard's")


def _ends(dataset: pydicom.Dataset, low: int, high: int) -> NDArray[np.float64]:
    """Lowest and highest value after the modality transformation."""
    if values(dataset, "ModalityLUTSequence"):
        with any_failure("ModalityLUTSequence makes no sense"):
            return np.array([0.0, 2.0 ** int(dataset.ModalityLUTSequence[0].LUTDescriptor[2]) - 1])
    return modality_values(dataset, np.array([low, high], dtype=np.float64))
