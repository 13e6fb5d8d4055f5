"""One record that came for a prediction, as the model's inputs: prepared as the study's sites prepared theirs.

A record that is unlike what the study declares has reasons for which no prediction is given. The reasons name columns
and the study's own constants, and never say what the record holds.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from consilium_shared import task
from consilium_shared.errors import DataError
from consilium_shared.inputs import Feature, Numeric
from consilium_shared.study import Study

_WHOLE = re.compile(r"^([+-]?[0-9]+)\.0+$")

Arrays = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Prepared:
    """A record as the model takes it.

    Attributes:
        inputs: by input's name, float32, without a dimension for the batch.
        abstain: why no prediction may be given; empty where one may.
        notes: what of the record was not used, or taken as missing.
    """

    inputs: Arrays
    abstain: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass
class Findings:
    """Reasons and notes while a record is prepared."""

    abstain: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def prepare(study: Study, record: Any) -> Prepared:
    """A record of whatever the study takes; raises DataError as ``image``, ``series`` and ``table``."""
    if not isinstance(record, Mapping):
        raise DataError("a record is an object of names and values")
    if task.reads(study).image is not None:
        return image(study, record)
    return series(study, record) if task.reads(study).series is not None else table(study, record)


def table(study: Study, record: Mapping[str, Any]) -> Prepared:
    """A table's record: column to number or category; None, NaN, "" and an absent column are missing values.

    Raises:
        DataError: a column that the study does not have, or a value that is neither a number nor text.
    """
    features, findings = task.reads(study).features, Findings()
    _known(record, [feature.name for feature in features])
    values = encode(features, record, task.reads(study).missing, findings)
    return Prepared({"record": values}, tuple(findings.abstain), tuple(findings.notes))


def series(study: Study, record: Mapping[str, Any]) -> Prepared:
    """A series' record: ``samples``, each ``{"variable", "minutes", "value"}``, and ``statics`` as a table's record.

    ``minutes`` count from the start of the study's window. Samples outside the window, without a number or outside the
    declared range are left out, as in training.

    Raises:
        DataError: a variable that the study does not have, or values that are not numbers.
    """
    declared = task.reads(study).series
    if declared is None:
        raise DataError(f"study {study.study} has no series")
    _known(record, ["samples", "statics"])
    samples, statics = record.get("samples", []), record.get("statics", {})
    if not isinstance(samples, list) or not isinstance(statics, dict):
        raise DataError("a record has samples (a list) and statics (columns and values)")
    slots = {variable.name: number for number, variable in enumerate(declared.variables)}
    findings = Findings()
    kept: list[tuple[list[int], list[float]]] = [([], []) for _ in slots]
    outside = np.zeros(len(slots), dtype=np.int64)
    seen = np.zeros(len(slots), dtype=np.int64)
    late = 0
    for sample in samples:
        if not isinstance(sample, dict) or set(sample) != {"variable", "minutes", "value"}:
            raise DataError("each sample has variable, minutes and value, and nothing else")
        if not isinstance(sample["variable"], str) or sample["variable"] not in slots:
            raise DataError(f"the study has no such variable; it has {_listed(slots)}")
        slot = slots[sample["variable"]]
        minutes, value = number(sample["minutes"], "minutes"), number(sample["value"], sample["variable"])
        if np.isnan(minutes) or np.isnan(value):
            continue
        position = np.floor(minutes / declared.step_minutes + EDGE)
        if not 0 <= position < declared.bins:
            late += 1
            continue
        seen[slot] += 1
        scaled = scale(declared.variables[slot], value)
        if np.isnan(scaled):
            outside[slot] += 1
            continue
        kept[slot][0].append(int(position))
        kept[slot][1].append(scaled)
    if late:
        findings.notes.append(f"{late} samples lie outside the study's window and were left out")
    for variable, of, out in zip(declared.variables, seen, outside, strict=True):
        where = f"{variable.name}: outside {_range(variable)}"
        if out and out == of:
            findings.abstain.append(f"{where} in every sample; is the unit the study's?")
        elif out:
            findings.notes.append(f"{where} in {out} of {of} samples, which were left out")
    if not any(places for places, _ in kept):
        findings.abstain.append("no usable sample in the study's window")
    array = np.zeros((declared.bins, 3 * len(slots)), dtype=np.float32)
    for slot, (places, values) in enumerate(kept):
        for block, part in enumerate(fill(places, values, declared.bins)):
            array[:, block * len(slots) + slot] = part
    inputs = {"series": array}
    if declared.statics:
        _known(statics, [feature.name for feature in declared.statics])
        inputs["statics"] = encode(declared.statics, statics, task.reads(study).missing, findings)
    elif statics:
        raise DataError("the study has no statics")
    return Prepared(inputs, tuple(findings.abstain), tuple(findings.notes))


def image(study: Study, record: Mapping[str, Any]) -> Prepared:
    """An image's record: ``pixels``, prepared by whoever sends it: ``size`` rows of ``size`` numbers in [0, 1].

    In colour there are three such lists, red, green and blue; of a volume one for each slice, from the feet up.

    Raises:
        DataError: not that, or not a number.
    """
    declared = task.reads(study).image
    if declared is None:
        raise DataError(f"study {study.study} has no images")
    _known(record, ["pixels"])
    try:
        pixels = np.asarray(record.get("pixels"), dtype=np.float32)
    except (ValueError, TypeError, OverflowError):
        raise DataError("pixels: not rows of numbers") from None
    return picture(study, pixels)


def picture(study: Study, pixels: npt.NDArray[np.float32]) -> Prepared:
    """A prepared image, float32 of the study's ``image.shape``, of one channel also without that axis.

    Raises:
        DataError: it has another shape.
    """
    declared = task.reads(study).image
    shape = () if declared is None else declared.shape
    if pixels.shape == shape[1:] and shape[:1] == (1,):
        pixels = pixels[None]
    if pixels.shape != shape:
        wanted = shape[1:] if shape[:1] == (1,) else shape
        raise DataError(f"pixels: the study has lists of {' × '.join(map(str, wanted))} numbers")
    abstain = []
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        abstain.append("pixels: outside 0 … 1")
    elif float(np.ptp(pixels)) < FLAT:
        abstain.append("the image has one brightness everywhere: nothing is to be seen on it")
    return Prepared({"image": pixels}, tuple(abstain))


FLAT = 0.02
"""Least contrast of a radiograph, as a part of the whole range of brightness."""

EDGE = 1e-4
"""Part of a step by which a moment is moved up: 3/180 s, rounded, must not fall below the edge of its own bin."""


def fill(
    places: Sequence[int], values: Sequence[float], bins: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """Samples of one variable as three arrays ``[bins]``: value, mask, and time since the last sample.

    The mean of the bin's samples, or the last bin's that had one, or 0 before the first; whether the bin has one; the
    time since the last bin with one as a fraction of the window, 1 before the first.
    """
    count = np.bincount(places, minlength=bins) if len(places) else np.zeros(bins, dtype=np.int64)
    total = np.bincount(places, weights=values, minlength=bins) if len(places) else np.zeros(bins)
    mask = count > 0
    last = np.maximum.accumulate(np.where(mask, np.arange(bins), -1))
    mean = np.divide(total, count, out=np.zeros(bins), where=mask)
    gap = np.where(last < 0, 1.0, (np.arange(bins) - last) / bins)
    return np.where(last < 0, 0.0, mean[np.maximum(last, 0)]), mask, gap


def encode(
    features: Sequence[Feature], record: Mapping[str, Any], missing: str, findings: Findings
) -> npt.NDArray[np.float32]:
    """Features of a record, float32 ``[F]``: scaled numbers, one-hot categories; a missing value is 0 everywhere.

    Args:
        features: in the order of the model's inputs.
        record: column to value.
        missing: what the study does with missing values, ``refuse`` or ``center``.
        findings: gets what is missing, and what lies outside the declared range.
    """
    parts: list[float] = []
    for feature in features:
        value = record.get(feature.name)
        if isinstance(feature, Numeric):
            read = number(value, feature.name)
            scaled = scale(feature, read)
            if np.isnan(read):
                _missing(feature.name, missing, findings)
            elif np.isnan(scaled):
                findings.abstain.append(f"{feature.name}: outside {_range(feature)}")
            parts.append(0.0 if np.isnan(scaled) else scaled)
        else:
            word = text(value)
            hit = [word == text(category) for category in feature.categories]
            if word == "":
                _missing(feature.name, missing, findings)
            elif not any(hit):
                findings.abstain.append(f"{feature.name}: none of {_listed(feature.categories)}")
            parts.extend(map(float, hit))
    return np.asarray(parts, dtype=np.float32)


def scale(feature: Numeric, value: float) -> float:
    """``(value - center) / scale``; NaN where missing, outside ``low`` … ``high``, or too large for a float32."""
    low = -np.inf if feature.low is None else feature.low
    high = np.inf if feature.high is None else feature.high
    if not low <= value <= high:
        return float("nan")
    with np.errstate(over="ignore"):
        scaled = float((np.float64(value) - feature.center) / feature.scale)
    return scaled if abs(scaled) <= float(np.finfo(np.float32).max) else float("nan")


def number(value: Any, name: str) -> float:
    """A number, or NaN for a missing one; raises DataError for what is neither."""
    if value is None or value == "":
        return float("nan")
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return float("inf")
    raise DataError(f"{name}: not a number")


def text(value: Any) -> str:
    """A category in one spelling, so that 1, 1.0 and "1" are one; "" where it is missing; raises DataError."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise DataError("a category is a text or a number")
    word = _WHOLE.sub(r"\1", str(value).strip())
    return "" if word == "?" else word


def _missing(name: str, missing: str, findings: Findings) -> None:
    if missing == "refuse":
        findings.abstain.append(f"{name}: missing, and the study was trained on complete records")
    else:
        findings.notes.append(f"{name}: missing, taken at the study's center")


def _known(record: Mapping[str, Any], names: Sequence[str]) -> None:
    odd = set(record) - set(names)
    if odd:
        raise DataError(f"{len(odd)} names in the record are none of the study's: it has {_listed(names)}")


def _listed(names: Iterable[str]) -> str:
    shown = list(names)
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def _range(feature: Numeric) -> str:
    low = "-∞" if feature.low is None else f"{feature.low:g}"
    high = "∞" if feature.high is None else f"{feature.high:g}"
    return f"{low} … {high}"
