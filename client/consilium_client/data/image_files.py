"""PNG, JPEG and TIFF files as pictures, opened within bounds; nothing of a file but its pixels is used."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageOps

from consilium_shared.inputs import Image
from consilium_shared.preparation.foreign import FILE_BYTES, OutOfMemory, Unusable
from consilium_shared.preparation.picture import presented, toned
from consilium_shared.preparation.pixels import PIXELS

FORMATS = ("PNG", "JPEG", "TIFF")
_DEEP = {"I;16": 2**16 - 1, "I;16B": 2**16 - 1, "I;16L": 2**16 - 1, "I": 2**16 - 1}


def read_image_file(path: Path, image: Image) -> NDArray[np.float32]:
    """A file's picture as float32 ``[C, S, S]`` in [0, 1], turned as its EXIF tag says; raises Unusable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.stat().st_size > FILE_BYTES:
                raise Unusable(f"file larger than {FILE_BYTES >> 20} MiB")
            with Pillow.open(path, formats=FORMATS) as file:
                if file.width * file.height > PIXELS:
                    raise Unusable(f"more than {PIXELS // 10**6} million pixels")
                if getattr(file, "n_frames", 1) != 1:
                    raise Unusable("a file of several pictures")
                return presented(toned(_shown(ImageOps.exif_transpose(file)), image), image)
    except Unusable:
        raise
    except MemoryError:
        raise OutOfMemory from None
    except Pillow.DecompressionBombError:  # from twice Pillow's own bound on, before the size can be asked
        raise Unusable(f"more than {PIXELS // 10**6} million pixels") from None
    except Exception:  # a foreign file may break a decoder in any way, and its message may quote the file
        raise Unusable("not a PNG, JPEG or TIFF file, or a damaged one") from None


def _shown(file: Pillow.Image) -> NDArray[np.float32]:
    """Grey ``[rows, columns]`` or colours ``[rows, columns, 3]`` in [0, 1]."""
    if file.mode in ("RGBA", "LA", "PA") or "transparency" in file.info:
        file = file.convert("RGBA")
        if file.getchannel("A").getextrema()[0] != 255:
            raise Unusable("a picture that is transparent in places: what is behind it is not known")
        file = file.convert("RGB")
    if file.mode in ("1", "L"):
        return np.asarray(file.convert("L"), dtype=np.float32) / np.float32(255)
    if file.mode in _DEEP:
        deep = np.asarray(file, dtype=np.float64)
        if deep.min(initial=0) < 0 or deep.max(initial=0) > _DEEP[file.mode]:
            raise Unusable("grey values beyond 16 bits")
        return np.asarray(deep / _DEEP[file.mode], dtype=np.float32)
    if file.mode in ("P", "RGB", "YCbCr"):
        return np.asarray(file.convert("RGB"), dtype=np.float32) / np.float32(255)
    raise Unusable("a picture that is neither grey nor RGB (CMYK, Lab or floating-point numbers)")
