"""A finished model leaves as a signed bundle that runs without torch and answers as the trained model does."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from tests.support import published
from tests.support.published import MODELS, SERIES, TABLE, study

from consilium_server.export.bundle import export
from consilium_server.federation import Home
from consilium_shared.errors import ConfigurationError, IntegrityError, PeerError, SignatureError
from consilium_shared.models import build, forms, onnx_graph
from consilium_shared.models.vector import load_vector, unpack
from consilium_shared.preparation.declared import invented
from consilium_shared.preparation.record import prepare
from consilium_shared.protocol import bundle
from consilium_shared.protocol.bundle import open_bundle
from consilium_shared.study import Study


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return published.coordinator(tmp_path_factory.mktemp("coordinator"))


@pytest.fixture(scope="module")
def exported(home: Home, tmp_path_factory: pytest.TempPathFactory) -> Path:
    published.publish(home, study("logistic", TABLE))
    target = tmp_path_factory.mktemp("out") / "bundle"
    export(home, "a-logistic", target)
    return target


def fingerprint(home: Home) -> str:
    return home.coordinator().public.fingerprint


@pytest.mark.parametrize(("name", "data"), [*MODELS, ("resnet18-gn", {"image": {"size": 64}})])
@pytest.mark.parametrize("records", [1, 7])
def test_the_graph_of_every_model_answers_as_torch_does(name: str, data: dict[str, Any], records: int) -> None:
    given = study(name, data)
    weights, draw = published.weights(given), np.random.default_rng(5)
    session = onnxruntime.InferenceSession(onnx_graph.to_onnx(weights, given))
    inputs = {key: draw.random((records, *form), dtype=np.float32) for key, form in forms.inputs(given).items()}
    model = build(given)
    load_vector(model, unpack(weights, model, given))
    with torch.no_grad():
        expected = torch.softmax(model.eval()(*(torch.from_numpy(each) for each in inputs.values())), dim=1).numpy()
    (found,) = session.run(["probabilities"], inputs)
    assert found.shape == (records, 2)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(found[:, 0]) > 0 or records == 1


@pytest.mark.parametrize(
    ("name", "part"), [("mlp", {"trainable": "lora", "lora_rank": 2}), ("gru", {"trainable": "head"})]
)
def test_a_model_that_was_trained_in_part_is_exported_whole(name: str, part: dict[str, Any]) -> None:
    given = study(name, TABLE if name == "mlp" else SERIES, **part)
    weights = published.weights(given)
    assert onnx_graph.check(onnx_graph.to_onnx(weights, given), weights, given) <= 1e-5


@pytest.mark.parametrize("bounds", [{"low": 9.0}, {"high": -9.0}, {"low": 9.0, "high": 9.5}])
def test_the_invented_record_lies_within_bounds_of_either_side(bounds: dict[str, float]) -> None:
    for seed in range(3):
        given = study("logistic", {"features": [{"name": "age", **bounds}]}, seed=seed)
        assert invented(given)[1].abstain == ()


def test_a_graph_that_answers_otherwise_is_not_exported() -> None:
    given = study("mlp", TABLE)
    other = onnx_graph.to_onnx(published.weights(given, seed=1), given)
    with pytest.raises(IntegrityError, match="nothing was exported"):
        onnx_graph.check(other, published.weights(given, seed=2), given)


def test_a_graph_holds_no_path_of_the_machine_that_made_it() -> None:
    given = study("gru", SERIES)
    graph = onnx_graph.to_onnx(published.weights(given), given)
    assert b".py" not in graph and str(Path.home()).encode() not in graph


@pytest.mark.parametrize(("name", "data"), MODELS)
def test_the_example_is_what_its_record_prepares_to(home: Home, name: str, data: dict[str, Any]) -> None:
    given = study(name, data)
    files = published.files(home, given)
    example = json.loads(files[bundle.EXAMPLE])
    prepared = prepare(given, example["record"])
    assert prepared.abstain == ()
    assert set(prepared.inputs) == set(example["inputs"]) == set(forms.inputs(given))
    for key, values in prepared.inputs.items():
        np.testing.assert_array_equal(values[None], np.asarray(example["inputs"][key], dtype=np.float32))
    declared = json.loads(files[bundle.PREPROCESSING])
    assert [each["name"] for each in declared["inputs"]] == list(forms.inputs(given))
    assert [tuple(each["shape"][1:]) for each in declared["inputs"]] == list(forms.inputs(given).values())


def test_the_script_in_the_bundle_needs_numpy_and_onnxruntime_alone(exported: Path) -> None:
    script = exported / "predict.py"
    tree = ast.parse(script.read_text())
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert modules == {"json", "pathlib", "numpy", "onnxruntime"}
    done = subprocess.run([sys.executable, "-I", script], capture_output=True, text=True, check=True)
    assert "as the trained model answered" in done.stdout


def test_the_script_says_when_the_graph_answers_otherwise(exported: Path, tmp_path: Path) -> None:
    for file in exported.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    example = json.loads((tmp_path / "example.json").read_text())
    example["probabilities"][0][0] += 1e-3
    (tmp_path / "example.json").write_text(json.dumps(example))
    done = subprocess.run([sys.executable, "-I", tmp_path / "predict.py"], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "differs by" in done.stderr


def test_a_bundle_verifies_as_folder_and_as_zip(home: Home, exported: Path, tmp_path: Path) -> None:
    export(home, "a-logistic", tmp_path / "one.zip")
    folder, whole = (open_bundle(path, fingerprint(home)) for path in (exported, tmp_path / "one.zip"))
    assert folder.manifest == whole.manifest
    assert folder.files == whole.files
    assert set(folder.files) == set(bundle.LARGEST)
    assert Study.from_contract(folder.card["contract"]).study == "a-logistic"


def test_an_export_replaces_nothing(home: Home, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="exists already"):
        export(home, "a-logistic", exported)
    (tmp_path / "one.zip").write_bytes(b"mine")
    with pytest.raises(ConfigurationError, match="exists already"):
        export(home, "a-logistic", tmp_path / "one.zip")
    assert (tmp_path / "one.zip").read_bytes() == b"mine"


def altered(exported: Path, folder: Path, name: str, data: bytes | None) -> Path:
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    if data is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", [*bundle.LARGEST])
@pytest.mark.parametrize("how", ["a byte more", "gone"])
def test_no_file_of_a_bundle_can_be_changed(home: Home, exported: Path, tmp_path: Path, name: str, how: str) -> None:
    data = (exported / name).read_bytes() + b" " if how == "a byte more" else None
    with pytest.raises((PeerError, SignatureError)):
        open_bundle(altered(exported, tmp_path, name, data), fingerprint(home))


@pytest.mark.parametrize("key", ["study", "version", "model", "study_digest", "federation", "files", "coordinator"])
def test_no_word_of_a_manifest_can_be_changed(home: Home, exported: Path, tmp_path: Path, key: str) -> None:
    document = json.loads((exported / "manifest.json").read_text())
    new: Any = {"study": "b", "version": 2, "files": {}}.get(key, "1" * 64)
    document["body"][key] = new
    with pytest.raises((PeerError, SignatureError)):
        open_bundle(altered(exported, tmp_path, "manifest.json", json.dumps(document).encode()), fingerprint(home))


def test_a_bundle_of_another_coordinator_is_refused_by_its_fingerprint(
    home: Home, exported: Path, tmp_path: Path
) -> None:
    other = published.coordinator(tmp_path / "other")
    with pytest.raises(SignatureError, match="not the one given"):
        open_bundle(exported, fingerprint(other))
    assert open_bundle(exported, fingerprint(home).upper().replace(" ", "")).manifest.study == "a-logistic"
    with pytest.raises(ConfigurationError, match="eight groups"):
        open_bundle(exported, "")


def test_a_card_of_another_model_in_a_bundle_is_refused(home: Home, exported: Path, tmp_path: Path) -> None:
    """Also where the coordinator itself signed both."""
    files = {file.name: file.read_bytes() for file in exported.iterdir() if file.name != "manifest.json"}
    files["card.json"] = published.files(home, study("mlp", TABLE))["card.json"]
    facts = {k: getattr(open_bundle(exported, fingerprint(home)).manifest, k) for k in (
        "federation", "study", "version", "study_digest", "model")}  # fmt: skip
    files["manifest.json"] = bundle.seal(files, home.coordinator(), **facts)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(PeerError, match="different models"):
        open_bundle(tmp_path, fingerprint(home))


def test_a_zip_with_anything_else_in_it_is_refused(home: Home, exported: Path, tmp_path: Path) -> None:
    files = {file.name: file.read_bytes() for file in exported.iterdir()}
    for number, name in enumerate(("../evil", "model.onnx.data", "/etc/passwd")):
        path = tmp_path / f"{number}.zip"
        path.write_bytes(bundle.zipped({**files, name: b"x"}))
        with pytest.raises(PeerError, match=r"more files|no bundle has"):
            open_bundle(path, fingerprint(home))
    (tmp_path / "cut.zip").write_bytes(bundle.zipped(files)[:-40])
    with pytest.raises(PeerError, match="zip"):
        open_bundle(tmp_path / "cut.zip", fingerprint(home))


def test_the_page_tells_what_the_card_says_and_loads_nothing(exported: Path) -> None:
    page = (exported / "model.html").read_text()
    assert all(word in page for word in ("a-logistic", "0.750", "0.700 – 0.800", "2.750", "No diagnosis", "north"))
    assert "unknown" in page  # an accuracy that the noise hides
    assert "<script" not in page and "http://" not in page and "https://" not in page
    assert "from 18 to 110" in page
