"""KServe's open inference protocol, version 2 over REST, so that its clients and those of Triton work.

Its tensors are prepared inputs: ``preprocessing.json`` of the bundle says how they are made. Only what any prepared
record must fulfil can be checked on them; records as they are go to ``/v1``, which checks every declared range.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from pydantic import BaseModel, Field

from consilium_serve.model import NOTICE, Model
from consilium_serve.service import Case, Service
from consilium_shared.errors import DataError
from consilium_shared.models import forms
from consilium_shared.prediction import Predictions
from consilium_shared.preparation.record import Prepared
from consilium_shared.protocol.version import about


class Tensor(BaseModel):
    """An input."""

    name: str
    shape: Annotated[list[Annotated[int, Field(ge=0, le=2**31)]], Field(min_length=1, max_length=8)]
    datatype: Literal["FP32"]
    data: list[Any]


class Infer(BaseModel):
    """A request for inference; ``outputs`` and ``parameters`` are taken and not looked at."""

    id: Annotated[str, Field(max_length=256)] | None = None
    inputs: Annotated[list[Tensor], Field(min_length=1, max_length=8)]


def add(app: FastAPI, service: Service) -> None:
    """Add the protocol's paths to an application."""

    @app.get("/v2", tags=["kserve"])
    def server() -> dict[str, Any]:
        """Describe the server."""
        return {"name": "consilium-predict", "version": about()["consilium"], "extensions": []}

    @app.get("/v2/health/live", tags=["kserve"])
    def live() -> dict[str, bool]:
        """Say that the process answers."""
        return {"live": True}

    @app.get("/v2/health/ready", tags=["kserve"])
    def ready() -> dict[str, bool]:
        """Say whether models answer."""
        return {"ready": bool(service.studies)}

    @app.get("/v2/models/{name}", tags=["kserve"])
    @app.get("/v2/models/{name}/versions/{version}", tags=["kserve"])
    def metadata(name: str, version: str | None = None) -> dict[str, Any]:
        """Describe a model's tensors."""
        model = service.model(name, version)
        return {
            "name": name,
            "versions": [model.version],
            "platform": "onnxruntime_onnx",
            "inputs": [
                {"name": each, "datatype": "FP32", "shape": [-1, *shape]}
                for each, shape in forms.inputs(model.study).items()
            ],
            "outputs": [
                {"name": each, "datatype": "FP32", "shape": [-1, *shape]}
                for each, shape in forms.outputs(model.study).items()
            ],
        }

    @app.get("/v2/models/{name}/ready", tags=["kserve"])
    @app.get("/v2/models/{name}/versions/{version}/ready", tags=["kserve"])
    def model_ready(name: str, version: str | None = None) -> dict[str, Any]:
        """Say whether a model answers."""
        return {"name": name, "ready": bool(service.model(name, version))}

    @app.post("/v2/models/{name}/infer", tags=["kserve"])
    @app.post("/v2/models/{name}/versions/{version}/infer", tags=["kserve"])
    def infer(name: str, body: Infer, request: Request, version: str | None = None) -> dict[str, Any]:
        """Predict on prepared inputs."""
        model = service.model(name, version)
        cases = [Case(each) for each in prepared(model, body.inputs, service.settings.limits.records)]
        told = service.predict(model, cases, str(request.scope.get("consilium.client", "unknown")))
        own = model.predictions
        rows = [[_of(each, own, name) for name in own.names] for each in told]
        return {
            "model_name": name,
            "model_version": model.version,
            **({} if body.id is None else {"id": body.id}),
            "parameters": {
                "threshold": told[0]["threshold"] if told else None,
                "abstained": [number for number, each in enumerate(told) if each["abstained"]],
                "notice": NOTICE,
            },
            "outputs": [
                {
                    "name": own.output,
                    "shape": [len(rows), len(own.names)],
                    "datatype": "FP32",
                    "data": [value for row in rows for value in row],
                }
            ],
        }


def prepared(model: Model, tensors: list[Tensor], most: int) -> list[Prepared]:
    """Records of prepared tensors, at most so many; one that no preparation gives has a reason to abstain.

    Raises:
        DataError: other inputs than the model's, or of other shapes, or no numbers, or too many records.
    """
    expected = forms.inputs(model.study)
    if sorted(tensor.name for tensor in tensors) != sorted(expected):
        raise DataError(f"the model takes the inputs {', '.join(expected)}, each once")
    arrays = {}
    for tensor in tensors:
        if tensor.shape[0] > most:
            raise DataError(f"more than {most} records in one request")
        want = expected[tensor.name]
        try:
            flat = np.asarray(tensor.data, dtype=np.float32).reshape(-1)
        except (ValueError, TypeError, OverflowError):
            raise DataError(f"{tensor.name}: its data are not numbers") from None
        if tuple(tensor.shape[1:]) != want or flat.size != int(np.prod(tensor.shape)):
            raise DataError(f"{tensor.name} has the shape [records, {', '.join(map(str, want))}], with as many numbers")
        arrays[tensor.name] = flat.reshape(tensor.shape)
    if len({len(array) for array in arrays.values()}) != 1:
        raise DataError("the inputs have different numbers of records")
    found = []
    for number in range(len(next(iter(arrays.values())))):
        inputs = {name: array[number] for name, array in arrays.items()}
        abstain = [f"{name}: not finite" for name, values in inputs.items() if not np.isfinite(values).all()]
        image = inputs.get("image")
        if image is not None and not abstain and not (image.min() >= 0 and image.max() <= 1):
            abstain.append("image: outside 0 … 1")
        found.append(Prepared(inputs, tuple(abstain)))
    return found


def _of(told: dict[str, Any], own: Predictions, name: str) -> float | None:
    """Score of that name; None, which JSON has in place of NaN, where the service abstained."""
    prediction = told["prediction"]
    return None if prediction is None else float(prediction[own.output][name])
