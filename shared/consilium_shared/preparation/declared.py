"""The preparation of a study's records as data, for whoever runs the exported model with programs of their own."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from consilium_shared import task
from consilium_shared.canonical import canonical_bytes
from consilium_shared.inputs import Feature, Numeric
from consilium_shared.models import forms
from consilium_shared.preparation import record as prepare
from consilium_shared.study import Study

_TABLE = (
    "Columns in order, one after the other: a number gives (value - center) / scale, a column of categories gives 1 at "
    "its category and 0 at the others. A value outside low … high, or none of the categories, is not to be predicted "
    "on. A missing value is 0 everywhere where missing is center, and is not to be predicted on where it is refuse."
)
_SERIES = (
    "The window is cut into bins of step_minutes from its start. For V variables a bin has 3 V numbers: V values, V "
    "masks, V gaps. Value: the mean of (sample - center) / scale over the bin's samples within low … high; the value "
    "of the last bin that had a sample where this one has none; 0 before the first. Mask: 1 where the bin has a "
    "sample, else 0. Gap: bins since the last one with a sample over the number of bins; 1 before the first."
)
_IMAGE = (
    "Stored values of the DICOM file, modality transformation, then the VOI table or first window (else the full range "
    "of the stored bits), to [0, 1]; MONOCHROME1 turned over, so that white is bright; padding black. Averaged by area "
    "to square pixels, the longer side to size, the shorter centred between black margins. With intensity window the "
    "values between the ends of window, with percentiles those between the picture's own 1st and 99th, take the place "
    "of the file's window. With 3 channels red, green and blue, each in [0, 1]; a grey picture three times. "
    "With depth the slices of a series, ordered by position from the feet to the head, rows from front to back, "
    "columns from right to left, averaged to depth slices; with gaps interpolate, slices not evenly apart "
    "are first made so, each of its two neighbours. channels × depth × size × size numbers in [0, 1]."
)


def declared(study: Study) -> dict[str, Any]:
    """Inputs, their preparation and the outputs, as JSON carries them."""
    data = task.reads(study)
    inputs: list[dict[str, Any]] = []
    if data.image is not None:
        inputs.append({"name": "image", "how": _IMAGE, **data.image.model_dump(mode="json")})
    elif data.series is not None:
        plain = data.series.model_dump(mode="json", exclude={"statics"})
        inputs.append({"name": "series", "how": _SERIES, **plain})
        if data.series.statics:
            inputs.append({"name": "statics", "how": _TABLE, "columns": _columns(data.series.statics)})
    else:
        inputs.append({"name": "record", "how": _TABLE, "columns": _columns(data.features)})
    for entry, form in zip(inputs, forms.inputs(study).values(), strict=True):
        entry |= {"shape": ["records", *form], "dtype": "float32"}
    own = task.predictions(study)
    outputs: list[dict[str, Any]] = [
        {"name": name, "shape": ["records", *form], "dtype": "float32"} for name, form in forms.outputs(study).items()
    ]
    outputs[-1]["names"] = list(own.names)
    return {
        "format": 1,
        "task": study.task,
        "inputs": inputs,
        "missing": data.missing,
        "outputs": outputs,
        **own.declared(),
    }


def invented(study: Study) -> tuple[dict[str, Any], prepare.Prepared]:
    """A record that is nobody's, as a request has it, and prepared; the same for the same study."""
    draw = np.random.default_rng(int.from_bytes(hashlib.sha256(canonical_bytes(study.contract)).digest()[:8], "big"))
    data = task.reads(study)
    if data.image is not None:
        size, shape = data.image.size, data.image.shape
        across, down = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size))
        spot = 0.2 + 0.6 * np.exp(-3 * (across**2 + down**2)) + 0.1 * draw.random(shape)
        record: dict[str, Any] = {"pixels": np.round(spot[0] if shape[0] == 1 else spot, 4).tolist()}
        return record, prepare.prepare(study, record)
    if data.series is not None:
        window = data.series.bins * data.series.step_minutes
        samples = [
            {"variable": variable.name, "minutes": round(float(minutes), 1), "value": _value(variable, draw)}
            for variable in data.series.variables
            for minutes in sorted(draw.random(3) * window * 0.99)
        ]
        record = {"samples": samples}
        if data.series.statics:
            record["statics"] = {feature.name: _value(feature, draw) for feature in data.series.statics}
        return record, prepare.prepare(study, record)
    record = {feature.name: _value(feature, draw) for feature in data.features}
    return record, prepare.prepare(study, record)


def _value(feature: Feature, draw: np.random.Generator) -> Any:
    if not isinstance(feature, Numeric):
        return feature.categories[int(draw.integers(len(feature.categories)))]
    value = float(np.float32(f"{feature.center + feature.scale * draw.normal():.4g}"))
    low = -np.inf if feature.low is None else feature.low
    high = np.inf if feature.high is None else feature.high
    return float(f"{min(max(value, low), high):.6g}")


def _columns(features: tuple[Feature, ...]) -> list[dict[str, Any]]:
    found, start = [], 0
    for feature in features:
        end = start + (1 if isinstance(feature, Numeric) else len(feature.categories))
        found.append({**feature.model_dump(mode="json"), "at": [start, end]})
        start = end
    return found
