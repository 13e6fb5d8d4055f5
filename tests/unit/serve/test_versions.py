"""Versions change under a service that runs; nothing unverified ever answers."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.support import published
from tests.unit.serve.conftest import Bundles

from consilium_serve.home import Home, Settings
from consilium_serve.model import Model, answer
from consilium_serve.record import Record, entries
from consilium_serve.service import Case, Service
from consilium_serve.versions import Versions, add
from consilium_shared.errors import ConfigurationError, ConsiliumError, IntegrityError, SignatureError
from consilium_shared.preparation.record import table
from consilium_shared.protocol.bundle import GRAPH, MANIFEST, open_bundle, zipped

STUDY = "a-logistic"
GOOD = {"age": 61, "pain": "2", "chol": 250.5}


def ask(service: Service) -> tuple[str, float]:
    model = service.model(STUDY)
    told = service.predict(model, [Case(table(model.study, GOOD))], "test")[0]
    return told["model"]["version"], told["prediction"]["probability"]


def test_a_bundle_of_before_there_was_a_seam_of_predictions_answers_as_it_did() -> None:
    """Written by an earlier commit, whose ``preprocessing.json`` names no numbers of an output."""
    folder = Path(__file__).parents[2] / "vectors" / "bundle-1"
    found = open_bundle(folder / "a-logistic.zip", (folder / "fingerprint").read_text())
    example, model = json.loads(found.files["example.json"]), Model(found)
    scores = model.scores([table(model.study, example["record"])])[0]
    assert scores == pytest.approx(example["probabilities"][0], abs=1e-5)
    told = answer(model, table(model.study, example["record"]), scores, 0.5)
    assert told["label"] == "disease" and told["threshold"] == 0.5
    assert told["prediction"]["class"] == ("yes" if scores[1] >= 0.5 else "no")


def test_a_new_version_answers_when_it_is_activated_and_goes_when_it_is_rolled_back(
    home: Home, service: Service, bundles: Bundles
) -> None:
    first, before = ask(service)
    versions, second, there = add(home, bundles["table-2"])
    service.reload()
    assert not there and ask(service) == (first, before)
    versions.activate(second[:6] if len(second) > 6 else second)
    service.reload()
    assert ask(service)[0] == second and ask(service)[1] != before
    versions.rollback()
    service.reload()
    assert ask(service) == (first, before)
    with pytest.raises(ConfigurationError, match="no other version"):
        versions.rollback()


def test_a_request_under_way_ends_with_the_version_with_which_it_began(
    home: Home, service: Service, bundles: Bundles
) -> None:
    model = service.model(STUDY)
    versions, second, _ = add(home, bundles["table-2"])
    versions.activate(second)
    service.reload()
    told = service.predict(model, [Case(table(model.study, GOOD))], "test")[0]
    assert told["model"]["version"] == model.version != second


def test_a_shadow_is_recorded_and_never_shown(home: Home, bundles: Bundles) -> None:
    service = Service(home, Record(home.records, home.identity(), 365))
    first, shown = ask(service)
    versions, second, _ = add(home, bundles["table-2"])
    versions.let_shadow(second)
    service.reload()
    assert ask(service) == (first, shown)
    service.close()
    found = [e["body"] for e in entries(home.records, home.identity().public) if e["kind"] == "shadow"]
    assert [each["model"][:12] for each in found] == [second]
    assert found[0]["predictions"][0]["probability"] != pytest.approx(shown, abs=1e-6)


def test_a_version_that_was_altered_on_the_disk_never_answers(home: Home, service: Service, bundles: Bundles) -> None:
    first, _ = ask(service)
    versions, second, _ = add(home, bundles["table-2"])
    file = versions.folder / f"{second}.zip"
    file.write_bytes(file.read_bytes()[:-7] + b"altered")
    versions.activate(second)
    service.reload()
    assert ask(service)[0] == first
    assert STUDY in service.problems
    service.close()
    with pytest.raises(ConfigurationError):
        Service(home, Record(home.records, home.identity(), 365))


def test_a_file_under_another_versions_name_never_answers(home: Home, service: Service, bundles: Bundles) -> None:
    """It is signed, and not what was activated."""
    first, _ = ask(service)
    versions, second, _ = add(home, bundles["table-2"])
    (versions.folder / f"{second}.zip").write_bytes(bundles["table-3"].read_bytes())
    versions.activate(second)
    service.reload()
    assert ask(service)[0] == first
    assert "add the bundle again" in service.problems[STUDY]


def test_a_damaged_state_is_written_anew_by_activate(home: Home, service: Service) -> None:
    versions, (version, _) = Versions(home, STUDY), ask(service)
    (versions.folder / "state.json").write_text("{")
    with pytest.raises(IntegrityError, match="activate"):
        versions.state()
    assert versions.activate(version).active == version
    service.reload()
    assert ask(service)[0] == version and service.problems == {}


def test_nothing_of_another_coordinator_is_installed(home: Home, bundles: Bundles, tmp_path: Path) -> None:
    other = published.coordinator(tmp_path / "other")
    files = published.files(other, published.study("logistic", published.TABLE), seed=5)
    (tmp_path / "foreign.zip").write_bytes(zipped(files))
    before = Versions(home, STUDY).installed
    with pytest.raises(SignatureError):
        add(home, tmp_path / "foreign.zip")
    assert Versions(home, STUDY).installed == before


def test_a_graph_that_does_not_answer_its_example_is_not_used(bundles: Bundles) -> None:
    """Such as on a machine whose runtime computes something else."""
    bundle = open_bundle(bundles["table"], bundles.fingerprint)
    example = json.loads(bundle.files["example.json"])
    example["probabilities"] = [[0.5, 0.5]]
    bundle.files["example.json"] = json.dumps(example).encode()
    with pytest.raises(IntegrityError, match="otherwise than the trained model"):
        Model(bundle)
    bundle.files["model.onnx"] = b"none"
    with pytest.raises(IntegrityError, match="cannot be used here"):
        Model(bundle)


@pytest.mark.parametrize(
    ("listen", "why"),
    [
        ({"address": "0.0.0.0"}, "TLS"),
        ({"address": "10.0.0.7", "certificate": "a.pem"}, "belong together"),
        ({"client_ca": "ca.pem"}, "TLS"),
        ({"address": "hospital.example"}, "IP address"),
    ],
)
def test_other_machines_are_answered_over_tls_alone(listen: dict[str, str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Settings.model_validate({"coordinator": "x", "listen": listen})


def test_a_home_is_begun_once_and_keeps_its_secrets(home: Home, bundles: Bundles) -> None:
    with pytest.raises(ConfigurationError, match="already"):
        home.begin(bundles.fingerprint)
    token = home.new_token("ward")
    text = (home.root / "tokens.json").read_text()
    assert token not in text and home.tokens().keys() == {"ward"}
    assert home.new_token("ward") != token
    home.revoke("ward")
    assert home.tokens() == {}
    for file in ("keys/record.pem", "keys/pseudonym.key", "tokens.json", "predict.yaml"):
        assert (home.root / file).stat().st_mode & 0o077 == 0


def test_a_graph_reads_no_file_beside_the_bundle(
    bundles: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = open_bundle(bundles["table"], bundles.fingerprint)
    graph = onnx.load_from_string(bundle.files[GRAPH])
    weight = next(each for each in graph.graph.initializer if each.data_type == onnx.TensorProto.FLOAT and each.dims)
    (tmp_path / "beside").write_bytes(np.ascontiguousarray(onnx.numpy_helper.to_array(weight)).tobytes())
    weight.ClearField("raw_data")
    weight.ClearField("float_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="beside")
    bundle.files[GRAPH] = graph.SerializeToString()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(IntegrityError, match="cannot be used here"):
        Model(bundle)


def test_a_damaged_zip_file_is_told_as_one(bundles: Bundles, tmp_path: Path) -> None:
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST, random.Random(0).randbytes(500).hex())
    whole = packed.read_bytes()
    for place in range(30, 200, 3):
        packed.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        with pytest.raises(ConsiliumError):
            open_bundle(packed, bundles.fingerprint)


def test_a_bundle_packed_as_none_is_is_not_unpacked(bundles: Bundles, tmp_path: Path) -> None:
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr(MANIFEST, "{}")
    with pytest.raises(ConsiliumError, match="packed as no bundle"):
        open_bundle(packed, bundles.fingerprint)
