"""NIfTI files, ``.nii`` and ``.nii.gz``, as volumes: read within bounds and turned to the patient's axes."""

from __future__ import annotations

import gzip
import math
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, io_orientation
from numpy.typing import NDArray

from consilium_shared.inputs import Image
from consilium_shared.preparation.foreign import FILE_BYTES, OutOfMemory, Unusable
from consilium_shared.preparation.volume import VOXELS, presented_volume

HEADER_BYTES = 540
"""Length of the longer of the two headers."""
OFFSET_BYTES = 2**20
"""Most bytes between the header and the voxels: extensions, of which nothing is read."""


class Voxels(NamedTuple):
    """A volume as measured, with the patient's axes.

    Attributes:
        values: ``[slices, rows, columns]``, from the feet to the head, from front to back, from right to left; float32
            after slope and intercept, or as stored.
        spacing: millimetres along each axis.
        affine: float64 ``[4, 4]``, from an index of ``values`` to millimetres to the right, to the front, to the head.
    """

    values: NDArray[Any]
    spacing: tuple[float, float, float]
    affine: NDArray[np.float64]


def read_nifti(path: Path, image: Image) -> NDArray[np.float32]:
    """A file's volume as float32 ``[1, D, S, S]`` in [0, 1], as ``read_volume`` gives a series'; raises Unusable."""
    found = read_voxels(path)
    if not np.isfinite(found.values).all():
        raise Unusable("voxels that are no numbers")
    return presented_volume(found.values, found.spacing, image)


def read_voxels(path: Path, *, scaled: bool = True) -> Voxels:
    """The one volume of a file; raises Unusable.

    Args:
        path: the file. Of a compressed one no more is unpacked than its header announces.
        scaled: whether slope and intercept are applied; without, a file that has them is set aside.
    """
    try:
        if path.stat().st_size > FILE_BYTES:
            raise Unusable(f"file larger than {FILE_BYTES >> 20} MiB")
        with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
            start = file.read(HEADER_BYTES)
            header = _header(start)
            shape, offset = _checked(header)
            stored = header.get_data_dtype()
            length = math.prod(shape) * stored.itemsize
            content = (start + file.read(offset + length - len(start)))[offset : offset + length]
        if len(content) != length:
            raise Unusable("a NIfTI file that is cut off")
        values = np.frombuffer(content, dtype=stored).reshape(shape, order="F")
        slope, intercept = header.get_slope_inter()
        plain = (slope, intercept) in ((None, None), (1.0, 0.0))
        if scaled:
            values = values.astype(np.float32) if plain else (values * slope + intercept).astype(np.float32)
        elif not plain:
            raise Unusable("labels with a slope or an intercept")
        return _upright(values, header.get_best_affine())
    except Unusable:
        raise
    except MemoryError:
        raise OutOfMemory from None
    except Exception:  # a foreign file may break a reader in any way, and its message may quote the file
        raise Unusable("not a NIfTI file, or a damaged one") from None


def _header(start: bytes) -> Any:
    """The header of either version and byte order."""
    lengths = {start[:4], start[3::-1]}
    two = (540).to_bytes(4, "little") in lengths
    kind = nibabel.Nifti2Header if two else nibabel.Nifti1Header
    header = kind.from_fileobj(BytesIO(start), check=False)
    if int(header["sizeof_hdr"]) != kind.sizeof_hdr:
        raise Unusable("not a NIfTI file, or a damaged one")
    if bytes(header["magic"])[:3] not in (b"n+1", b"n+2"):
        raise Unusable("not a NIfTI file of one piece")
    return header


def _checked(header: Any) -> tuple[tuple[int, int, int], int]:
    """Shape of the volume and place of its first voxel, where both are within bounds."""
    sides = tuple(int(each) for each in header.get_data_shape())
    if len(sides) < 3 or min(sides) < 1 or max(sides[3:], default=1) > 1:
        raise Unusable("not one volume")
    shape = (sides[0], sides[1], sides[2])
    if math.prod(shape) > VOXELS:
        raise Unusable(f"more than {VOXELS} voxels")
    if header.get_data_dtype().kind not in "iuf":
        raise Unusable("voxels that are not single numbers (colours, complex numbers)")
    if int(header["qform_code"]) <= 0 and int(header["sform_code"]) <= 0:
        raise Unusable("no orientation: which side is left cannot be told")
    if header.get_xyzt_units()[0] not in ("mm", "unknown"):
        raise Unusable("a spacing in another unit than millimetres")
    offset = float(header["vox_offset"])
    if not int(header["sizeof_hdr"]) <= offset <= OFFSET_BYTES:
        raise Unusable("voxels at a place that makes no sense")
    return shape, int(offset)


def _upright(values: NDArray[Any], affine: NDArray[np.float64]) -> Voxels:
    """The file's axes turned to those of the patient that they come closest to, as those of a DICOM series are."""
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise Unusable("no orientation that makes sense")
    turn = io_orientation(affine)
    if np.isnan(turn).any():
        raise Unusable("no orientation that makes sense")
    back = affine @ nibabel.orientations.inv_ornt_aff(turn, values.shape)  # now right, front, head
    turned = apply_orientation(values, turn)[::-1, ::-1].transpose(2, 1, 0)
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    flip[0, 3], flip[1, 3] = turned.shape[2] - 1, turned.shape[1] - 1
    order = np.eye(4)[[2, 1, 0, 3]]
    steps = np.sqrt((back[:3, :3] ** 2).sum(axis=0))
    spacing = (float(steps[2]), float(steps[1]), float(steps[0]))
    return Voxels(np.ascontiguousarray(turned), spacing, back @ flip @ order)
