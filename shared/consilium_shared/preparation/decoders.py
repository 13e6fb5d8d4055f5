"""Decoders of what pydicom's own do not decode, or not every file of: JPEG of 12 bits and JPEG XL, by imagecodecs.

imagecodecs wraps libjpeg-turbo and libjxl. Decision 28 has the reasons, and what else was tried.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray

from consilium_shared.preparation.foreign import Unusable
from consilium_shared.preparation.tags import whole

JPEG_XL = ("1.2.840.10008.1.2.4.110", "1.2.840.10008.1.2.4.111", "1.2.840.10008.1.2.4.112")
"""JPEG XL: lossless, a JPEG recompressed, and any. Supplement 232; pydicom does not know them."""
JPEG_XL_LOSSLESS = JPEG_XL[0]


def is_compressed(syntax: pydicom.uid.UID) -> bool:
    """True for a transfer syntax whose pixels are in fragments, one stream a frame."""
    return syntax in JPEG_XL or bool(syntax.is_encapsulated)


def takes(syntax: pydicom.uid.UID, dataset: pydicom.Dataset) -> bool:
    """True where ``decoded`` is to decode a file's pixels, and not pydicom."""
    return syntax in JPEG_XL or (syntax == pydicom.uid.JPEGExtended12Bit and whole(dataset, "BitsStored", 0) > 8)


def decoded(syntax: pydicom.uid.UID, stream: bytes, dataset: pydicom.Dataset) -> NDArray[Any]:
    """Stored values of a frame ``[rows, columns]``, of colour ``[rows, columns, 3]``, RGB.

    Args:
        syntax: one that this module ``takes``.
        stream: of the frame, which says the size that its header says (``codestream.picture_size``).
        dataset: the file.

    Raises:
        Unusable: it has another form than the header says. Others: whatever the decoder raises.
    """
    import imagecodecs

    found = np.asarray(imagecodecs.jpegxl_decode(stream) if syntax in JPEG_XL else imagecodecs.jpeg8_decode(stream))
    samples = whole(dataset, "SamplesPerPixel", 1)
    form = (int(dataset.Rows), int(dataset.Columns)) + (() if samples == 1 else (samples,))
    if found.shape != form or found.dtype not in (np.uint8, np.uint16):
        raise Unusable("the encoded picture has another form than the header says")
    if dataset.get("PixelRepresentation") != 1:
        return found
    sign = 1 << (whole(dataset, "BitsStored", 0) - 1)  # the stream knows no sign: its highest bit is one
    return np.asarray(((found.astype(np.int32) & (2 * sign - 1)) ^ sign) - sign)
