"""One DICOM series, or one file with the frames of one, as a volume in [0, 1], prepared from itself alone.

The slices are ordered by where they lie in the patient, never by their names or numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
from numpy.typing import NDArray

from consilium_shared.inputs import Image
from consilium_shared.preparation.foreign import Unusable, any_failure, read_whole
from consilium_shared.preparation.picture import stretched, windowed
from consilium_shared.preparation.pixels import GREY, frames_of, require_picture, stored_values
from consilium_shared.preparation.presentation import modality_values
from consilium_shared.preparation.resample import fit
from consilium_shared.preparation.tags import values, word

VOXELS = 2**28
"""Most voxels of a volume: as many as 1024 slices of 512 × 512, 1 GiB while it is prepared."""
SERIES_BYTES = 2**31
"""Most bytes that the files of a series hold; 32 bits a voxel take half of them."""
SLICES = 2**14
UNEVEN = 0.1
"""Steps between slices differ from their median by less than this part of it, or a slice is missing."""
WIDEST = 3.0
"""Widest gap that is interpolated, in median steps: more would be invented than seen."""


class Slice(NamedTuple):
    """One slice where it lies in the patient (millimetres, to the left, to the back, to the head).

    Attributes:
        position: of the first pixel's centre.
        along_row, along_column: unit vectors, in which the column's and the row's number grows.
        spacing: between rows, and between columns.
        dataset, frame: where its pixels are.
        rescale: tags of its own transformation to measured values.
    """

    position: NDArray[np.float64]
    along_row: NDArray[np.float64]
    along_column: NDArray[np.float64]
    spacing: tuple[float, float]
    dataset: pydicom.Dataset
    frame: int
    rescale: pydicom.Dataset


def read_volume(paths: Sequence[Path], image: Image) -> NDArray[np.float32]:
    """The volume of a series' files float32 ``[1, D, S, S]`` in [0, 1]; raises Unusable.

    Slices go from the feet to the head, rows from front to back, columns from the patient's right to the left: the
    axes of the scan that come closest to these. Values are those of the modality (of CT Hounsfield units).

    Args:
        paths: the files, in any order.
        image: the study's, with a depth.
    """
    slices: list[Slice] = []
    voxels = held = 0
    for path in paths:
        dataset = read_whole(path)
        require_picture(dataset)
        # Before the next file is read: a series without end must not fill the memory.
        voxels += frames_of(dataset) * int(dataset.Rows) * int(dataset.Columns)
        held += sum(len(each.value) for each in dataset.values() if isinstance(each.value, bytes))
        if voxels > VOXELS:
            raise Unusable(f"more than {VOXELS} voxels")
        if held > SERIES_BYTES:
            raise Unusable(f"a series of more than {SERIES_BYTES >> 20} MiB")
        if word(dataset, "PhotometricInterpretation") not in GREY:
            raise Unusable("a series of colour images")
        with any_failure("no position or orientation of the slices that makes sense"):
            slices += _slices(dataset)
        if len(slices) > SLICES:
            raise Unusable(f"more than {SLICES} slices")
    ordered, places = in_order(slices, image.gaps)
    step = float(np.median(np.diff(places)))
    count, even = len(ordered), np.abs(np.diff(places) - step).max() <= UNEVEN * step
    if not even:
        step = float(np.diff(places).min())
        count = 1 + round((places[-1] - places[0]) / step)
    shape = (max(count, len(ordered)), int(ordered[0].dataset.Rows), int(ordered[0].dataset.Columns))
    volume = np.empty((len(ordered), *shape[1:]), dtype=np.float32)
    for number, each in enumerate(ordered):
        volume[number] = _measured(each)
    if not even:
        volume = evenly(volume, places, count)
        step = float(places[-1] - places[0]) / (count - 1)
    return presented_volume(*_upright(volume, ordered[0], step), image)


def presented_volume(
    volume: NDArray[np.float32], spacing: tuple[float, float, float], image: Image
) -> NDArray[np.float32]:
    """Measured values ``[slices, rows, columns]``, upright, on the study's scale and grid ``[1, D, S, S]``."""
    shown = stretched(volume) if image.window is None else windowed(volume, *image.window)
    if float(np.ptp(shown)) == 0:
        raise Unusable("one brightness everywhere: nothing is to be seen")
    return fit(shown, image.shape[1:], spacing)[None]


def evenly(volume: NDArray[np.float32], places: NDArray[np.float64], count: int) -> NDArray[np.float32]:
    """Slices ``[count, rows, columns]`` at even places from the first to the last, each made of its two neighbours.

    >>> evenly(np.array([[[0.0]], [[1.0]], [[3.0]]], np.float32), np.array([0.0, 1.0, 3.0]), 4).ravel().tolist()
    [0.0, 1.0, 2.0, 3.0]

    Args:
        volume: ``[slices, rows, columns]``.
        places: float64 ``[slices]``, ascending.
        count: at least 2.
    """
    wanted = np.linspace(places[0], places[-1], count)
    below = np.clip(np.searchsorted(places, wanted, side="right") - 1, 0, len(places) - 2)
    part = ((wanted - places[below]) / (places[below + 1] - places[below])).astype(np.float32)[:, None, None]
    return np.asarray(volume[below] * (1 - part) + volume[below + 1] * part, dtype=np.float32)


def in_order(slices: Sequence[Slice], gaps: str = "refuse") -> tuple[list[Slice], NDArray[np.float64]]:
    """Slices by where they lie, and their places in millimetres along the scan; raises Unusable where they are no
    volume, or none without gaps where the study refuses those."""
    if len(slices) < 2:
        raise Unusable("a series of one slice")
    first = slices[0]
    for each in slices:
        turned = max(
            np.abs(each.along_row - first.along_row).max(), np.abs(each.along_column - first.along_column).max()
        )
        if turned > 1e-3 or not np.allclose(each.spacing, first.spacing, rtol=1e-3):
            raise Unusable("slices of several orientations or spacings in one series")
        if (each.dataset.Rows, each.dataset.Columns) != (first.dataset.Rows, first.dataset.Columns):
            raise Unusable("slices of several sizes in one series")
    normal = np.cross(first.along_row, first.along_column)
    ordered = sorted(slices, key=lambda each: float(each.position @ normal))
    places = np.array([float(each.position @ normal) for each in ordered])
    steps = np.diff(places)
    median = float(np.median(steps))
    if not median > 0 or steps.min() < UNEVEN * median:
        raise Unusable("several slices at one place: phases, echoes or copies in one series")
    if gaps == "interpolate" and steps.max() > WIDEST * median:
        raise Unusable(f"a gap of more than {WIDEST:.0f} slices: too much of the volume would be invented")
    if gaps == "refuse" and np.abs(steps - median).max() > UNEVEN * median:
        raise Unusable("distances between slices differ: some are missing, or the scan has several thicknesses")
    return ordered, places


def _slices(dataset: pydicom.Dataset) -> list[Slice]:
    """The slices of one file: its own, or those of its frames, from their functional groups (PS3.3 C.7.6.16)."""
    frames = frames_of(dataset)
    if not values(dataset, "PerFrameFunctionalGroupsSequence"):
        if frames != 1:
            raise Unusable("frames without positions, where the study takes volumes")
        return [_slice(dataset, dataset, dataset, dataset, dataset, 0)]
    shared = dataset.get("SharedFunctionalGroupsSequence")
    found = []
    for number, own in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        groups = []
        for keyword in (
            "PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence",
            "PixelValueTransformationSequence",
        ):  # fmt: skip
            sequence = own.get(keyword) or (shared[0].get(keyword) if shared else None)
            groups.append(sequence[0] if sequence else pydicom.Dataset())
        place, orientation, measures, rescale = groups
        found.append(_slice(place, orientation, measures, rescale, dataset, number))
    if len(found) != frames:
        raise Unusable("frames without positions, where the study takes volumes")
    return found


def _slice(
    place: pydicom.Dataset,
    orientation: pydicom.Dataset,
    measures: pydicom.Dataset,
    rescale: pydicom.Dataset,
    dataset: pydicom.Dataset,
    frame: int,
) -> Slice:
    position = _numbers(place, "ImagePositionPatient", 3)
    cosines = _numbers(orientation, "ImageOrientationPatient", 6)
    spacing = _numbers(measures, "PixelSpacing", 2)
    row, column = cosines[:3], cosines[3:]
    lengths = np.array([np.linalg.norm(row), np.linalg.norm(column)])
    if np.abs(lengths - 1).max() > 0.01 or abs(float(row @ column)) > 0.01 or not spacing.min() > 0:
        raise Unusable("no position or orientation of the slices that makes sense")
    return Slice(position, row, column, (float(spacing[0]), float(spacing[1])), dataset, frame, rescale)


def _numbers(dataset: pydicom.Dataset, keyword: str, count: int) -> NDArray[np.float64]:
    found = np.array([float(each) for each in values(dataset, keyword)])
    if found.shape != (count,) or not np.isfinite(found).all():
        raise Unusable(f"no {keyword}")
    return found


def _measured(each: Slice) -> NDArray[np.float32]:
    """A slice's values in the modality's unit; padding has the lowest of the others."""
    stored: NDArray[Any] = stored_values(each.dataset, each.frame)
    found = modality_values(each.rescale, stored).astype(np.float32)
    for padding in values(each.dataset, "PixelPaddingValue")[:1]:
        out = stored == padding
        if out.any() and not out.all():
            found[out] = found[~out].min()
    if word(each.dataset, "PhotometricInterpretation") == "MONOCHROME1":
        raise Unusable("MONOCHROME1 in a series of measured values")
    return found


def _upright(
    volume: NDArray[np.float32], first: Slice, step: float
) -> tuple[NDArray[np.float32], tuple[float, float, float]]:
    """The volume with the scan's axes turned to the patient's, and its spacing along each, without resampling."""
    axes = np.stack([np.cross(first.along_row, first.along_column), first.along_column, first.along_row])
    steps = (step, *first.spacing)
    order: list[int] = []
    for wanted in (2, 1, 0):  # head, back, left
        free = [axis for axis in range(3) if axis not in order]
        order.append(max(free, key=lambda axis: abs(axes[axis, wanted])))
    turned = volume.transpose(order)
    for axis, wanted in zip(range(3), (2, 1, 0), strict=True):
        if axes[order[axis], wanted] < 0:
            turned = np.flip(turned, axis)
    return np.ascontiguousarray(turned), (steps[order[0]], steps[order[1]], steps[order[2]])
