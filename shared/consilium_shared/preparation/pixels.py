"""Pixels of a DICOM file as it stores them: which header announces a picture, and its values, decoded and bounded."""

from __future__ import annotations

from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.utils import pixel_array

from consilium_shared.preparation.codestream import picture_size
from consilium_shared.preparation.decoders import JPEG_XL, JPEG_XL_LOSSLESS, decoded, is_compressed, takes
from consilium_shared.preparation.foreign import Unusable, any_failure
from consilium_shared.preparation.tags import whole, word

PIXELS = 100_000_000
"""Largest image (10,000 × 10,000): a damaged header must not make us ask for all of the memory."""
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def require_picture(header: pydicom.Dataset) -> None:
    """Check that a header announces pictures that can be decoded and shown; raises Unusable."""
    with any_failure("damaged header"):
        if not header.get("Rows") or not header.get("Columns"):
            named = "Image Storage" in pydicom.uid.UID(str(header.get("SOPClassUID") or "")).name
            raise Unusable("an image without Rows and Columns: damaged, or a header alone" if named else "no image")
        photometric, samples = word(header, "PhotometricInterpretation"), whole(header, "SamplesPerPixel", 1)
        if photometric not in (*GREY, *COLOUR):
            raise Unusable("photometric interpretation is neither grey, RGB, YBR_FULL nor PALETTE COLOR")
        if samples != (1 if photometric in (*GREY, "PALETTE COLOR") else 3):
            raise Unusable("SamplesPerPixel contradicts PhotometricInterpretation")
        if whole(header, "Rows", 0) * whole(header, "Columns", 0) > PIXELS:
            raise Unusable(f"more than {PIXELS // 10**6} million pixels")
        stored, allocated = whole(header, "BitsStored", 0), whole(header, "BitsAllocated", 0)
        if not 1 <= stored <= allocated <= 32:
            raise Unusable("BitsStored and BitsAllocated make no sense")
        if not stored - 1 <= whole(header, "HighBit", stored - 1) < allocated:
            raise Unusable("HighBit and BitsStored make no sense")
        shape = word(header, "PresentationLUTShape")
        if (photometric, shape) in (("MONOCHROME1", "IDENTITY"), ("MONOCHROME2", "INVERSE")):
            raise Unusable("PresentationLUTShape contradicts PhotometricInterpretation: black may be white")


def frames_of(header: pydicom.Dataset) -> int:
    """Number of frames that a header announces, 1 where it says none; raises Unusable."""
    frames = whole(header, "NumberOfFrames", 1)
    if frames < 1:
        raise Unusable("NumberOfFrames makes no sense")
    return frames


def stored_values(dataset: pydicom.Dataset, frame: int = 0) -> NDArray[Any]:
    """The stored values of one frame, decompressed: no rescaling, no window; YBR is RGB.

    Args:
        dataset: the whole file.
        frame: its number from 0.

    Returns:
        Integers ``[rows, columns]``, of colour ``[rows, columns, 3]``; bits that are no part of a value are gone.

    Raises:
        Unusable: it cannot be decoded.
    """
    with any_failure("pixel data missing, damaged or in an unknown encoding"):
        syntax, stored = dataset.file_meta.TransferSyntaxUID, whole(dataset, "BitsStored", 0)
        high = whole(dataset, "HighBit", stored - 1)
        compressed = is_compressed(syntax)
        plain = not compressed or syntax == pydicom.uid.RLELossless
        if compressed:
            stream = _stream(dataset, frame)
        elif dataset["PixelData"].is_undefined_length:
            raise Unusable("pixel data is compressed, and the file does not say how")
        if high != stored - 1:
            if not plain:
                raise Unusable("HighBit above BitsStored in compressed pixels")
            dataset.BitsStored = high + 1  # pydicom then clears what lies above, with the sign
        try:
            if takes(syntax, dataset):
                found = decoded(syntax, stream, dataset)
            else:
                found = np.asarray(pixel_array(dataset, index=frame))
        finally:
            dataset.BitsStored = stored
        if found.ndim != (2 if whole(dataset, "SamplesPerPixel", 1) == 1 else 3) or found.dtype.kind not in "ui":
            raise Unusable("pixel data is not one picture of whole numbers")
        return np.asarray(found >> (high + 1 - stored)) if plain else _within(found, dataset, stored, syntax)


def _within(found: NDArray[Any], dataset: pydicom.Dataset, stored: int, syntax: pydicom.uid.UID) -> NDArray[Any]:
    """Decoded values without what an encoder put above BitsStored: old overlays lie there."""
    if dataset.get("PixelRepresentation") == 1 or int(found.max(initial=0)) < 2**stored:
        return found
    if syntax in (pydicom.uid.JPEG2000Lossless, pydicom.uid.JPEGLSLossless, pydicom.uid.JPEGLossless,
                  pydicom.uid.JPEGLosslessSV1, pydicom.uid.HTJ2KLossless, pydicom.uid.HTJ2KLosslessRPCL,
                  JPEG_XL_LOSSLESS):  # fmt: skip
        return np.asarray(found & (2**stored - 1))
    if int(found.max()) < 2 ** (stored + 1):  # what lossy compression adds at an edge
        return np.asarray(np.minimum(found, 2**stored - 1))
    raise Unusable("compressed pixels hold more than BitsStored says")


def _stream(dataset: pydicom.Dataset, frame: int) -> bytes:
    """A frame as it is encoded; raises Unusable where a decoder would make a picture of another size of it."""
    rows, columns = int(dataset.Rows), int(dataset.Columns)
    frames = frames_of(dataset)
    if not 0 <= frame < frames:
        raise Unusable("pixel data has fewer frames than are asked for")
    stream = pydicom.encaps.get_frame(dataset.PixelData, frame, number_of_frames=frames)
    size = picture_size(stream)
    if size is None and dataset.file_meta.TransferSyntaxUID in JPEG_XL:
        raise Unusable("no JPEG XL stream whose size can be told")
    if size is not None and size != (rows, columns):
        raise Unusable("the encoded picture has another size than Rows and Columns say")
    # A run makes 64 times its bytes at most; runs that are longer than what they make are a bomb or damaged.
    if dataset.file_meta.TransferSyntaxUID == pydicom.uid.RLELossless:
        raw = rows * columns * whole(dataset, "SamplesPerPixel", 1) * int(dataset.BitsAllocated) // 8
        if len(stream) > 2 * raw + 1024:
            raise Unusable("the encoded picture is longer than its pixels")
    return bytes(stream)
