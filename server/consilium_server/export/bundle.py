"""Export of a finished model as a signed bundle: weights, ONNX graph, card, page, preparation, example and script."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from consilium_server import registry
from consilium_server.export.page import render
from consilium_server.federation import Home
from consilium_server.registry import Model
from consilium_shared import task
from consilium_shared.errors import ConfigurationError
from consilium_shared.files import write_atomically
from consilium_shared.identity import Identity
from consilium_shared.limits import FILE_BYTES
from consilium_shared.preparation.declared import declared, invented
from consilium_shared.protocol import bundle
from consilium_shared.recalibration import Recalibration
from consilium_shared.study import Study

UNLICENSED = """\
No licence for this model was given when it was exported. Who may use it, and for what, is for the hospitals of the
study to say: ask the coordinator whose fingerprint is on the model's page.

predict.py, and the text of model.html, are under the Apache License, Version 2.0.
"""


def export(home: Home, study: str, target: Path, licence: Path | None = None) -> Model:
    """Write the newest model of a study as a bundle into a folder, or into a zip file where the name ends in .zip.

    Args:
        home: the coordinator's.
        study: name of the study.
        target: a folder that holds none of a bundle's files, or a zip file that does not exist.
        licence: text under which the model is handed out; None says in the bundle that there is none.

    Raises:
        ConfigurationError: no such model, or none that leaves as a bundle; the target exists, or the licence cannot be
            read.
        IntegrityError: the ONNX graph does not answer as the model does.
    """
    model = registry.newest(home, study)
    whole = target.suffix.lower() == ".zip"
    names = (*bundle.LARGEST, bundle.MANIFEST)
    taken = [target] if whole and target.exists() else [target / n for n in names if (target / n).exists()]
    if taken:
        raise ConfigurationError(f"{taken[0]} exists already; choose another {'name' if whole else 'folder'}")
    files = contents(model, home.coordinator(), _licence(licence))
    if whole:
        write_atomically(target, bundle.zipped(files), mode=0o644)
        return model
    for name, data in files.items():
        write_atomically(target / name, data, mode=0o644)
    return model


def contents(model: Model, coordinator: Identity, licence: str = UNLICENSED) -> dict[str, bytes]:
    """Every file of a model's bundle, its signed manifest among them, by name; raises as ``export``."""
    from consilium_shared.models import onnx_graph  # torch is slow to load

    study = Study.from_contract(model.card["contract"])
    task.predictions(study)
    weights = (model.folder / bundle.WEIGHTS).read_bytes()
    recalibration = Recalibration.read(model.card["metrics"])
    graph = onnx_graph.to_onnx(weights, study, recalibration)
    worst = onnx_graph.check(graph, weights, study, recalibration=recalibration)
    raw, prepared = invented(study)
    inputs = {name: values[None] for name, values in prepared.inputs.items()}
    answers = onnx_graph.answers(weights, study, inputs, recalibration)
    example = {
        "what": "An invented record, nobody's: as consilium-predict takes it, prepared, and what torch answers.",
        "record": raw,
        "inputs": {name: values.tolist() for name, values in inputs.items()},
        **{name: values.tolist() for name, values in answers.items()},
        "tolerance": onnx_graph.TOLERANCE,
    }
    facts = {
        "federation": model.card["federation"],
        "study": study.study,
        "version": study.version,
        "study_digest": study.digest,
        "model": model.card["model"]["sha256"],
    }
    files = {
        bundle.WEIGHTS: weights,
        bundle.CARD: (model.folder / bundle.CARD).read_bytes(),
        bundle.GRAPH: graph,
        bundle.PREPROCESSING: _json(declared(study)),
        bundle.EXAMPLE: _json(example, indent=None),
        bundle.SCRIPT: resources.files(__package__).joinpath("templates/predict.py.txt").read_bytes(),
        bundle.LICENSE: licence.encode(),
        bundle.PAGE: render(study, model.card, raw, coordinator.public, worst),
    }
    return {**files, bundle.MANIFEST: bundle.seal(files, coordinator, **facts)}


def _json(value: Any, indent: int | None = 2) -> bytes:
    return json.dumps(value, indent=indent, ensure_ascii=False).encode() + b"\n"


def _licence(file: Path | None) -> str:
    if file is None:
        return UNLICENSED
    try:
        data = file.read_bytes()
        if len(data) > FILE_BYTES:
            raise ConfigurationError(f"{file} is larger than {FILE_BYTES} bytes")
        return data.decode()
    except OSError as error:
        raise ConfigurationError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{file} is not UTF-8 text") from error
