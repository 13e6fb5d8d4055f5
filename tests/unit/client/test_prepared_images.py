"""Prepared images: the same bits as without a store, made once, and nothing in clear, half or forgotten on the disk."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import decoders, studies

from consilium_client import data
from consilium_client.data import recipes
from consilium_client.data.asset import DicomAsset
from consilium_client.data.dataset import Dataset, StoredDataset
from consilium_client.prepared import processes, records
from consilium_client.prepared.key import StoreKey
from consilium_client.prepared.pack import DamagedPack, Pack
from consilium_client.prepared.store import AssetFolder, PreparedStore, held
from consilium_client.training.trainer import train
from consilium_deploy.dicom_files import Scanner, write_radiograph
from consilium_shared.errors import DataError
from consilium_shared.models import build
from consilium_shared.models.vector import pack, to_vector
from consilium_shared.privacy.plan import plan_of
from consilium_shared.study import Study

SIZE, PATIENTS = 24, 12


def study(name: str = "images", size: int = SIZE, **parts: Any) -> Study:
    label = {"column": "finding", "classes": ["normal", "pneumonia"]}
    about = {"asset": "xray", "label": label, "image": {"size": size}}
    return studies.study(
        "small-cnn", about, name=name, training={"expected_batch": 4, "optimizer": {"lr": 0.1}}, **parts
    )


@pytest.fixture
def asset(tmp_path: Path) -> DicomAsset:
    """Twelve patients from scanners that differ, a file that is cut off, and one that is no image."""
    images, draw = tmp_path / "images", np.random.default_rng(7)
    images.mkdir()
    for number in range(PATIENTS):
        name = f"p{number}"
        write_radiograph(
            images / f"{name}.dcm", draw.random((20 + number, 31)), name, name, Scanner(8 + number % 2 * 4)
        )
    whole = (images / "p3.dcm").read_bytes()
    (images / "p3.dcm").write_bytes(whole[: len(whole) * 2 // 3])
    (images / "note.txt").write_text("no image")
    rows = "".join(f"p{number},{('normal', 'pneumonia')[number % 2]}\n" for number in range(PATIENTS))
    (tmp_path / "labels.csv").write_text("patient,finding\n" + rows)
    return DicomAsset(kind="dicom", path=images, table=tmp_path / "labels.csv")


@pytest.fixture
def folder(tmp_path: Path) -> AssetFolder:
    return PreparedStore(tmp_path / "prepared", StoreKey(bytes(range(32))), processes=1).asset("xray")


def inputs(found: Dataset) -> np.ndarray:
    return found.take(np.arange(len(found))).inputs[0]


def assert_same(one: Dataset, other: Dataset) -> None:
    np.testing.assert_array_equal(inputs(one), inputs(other))
    everybody = np.arange(len(one))
    for mine, theirs in zip(one.targets(everybody), other.targets(everybody), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(one.patients, other.patients)
    np.testing.assert_array_equal(one.train, other.train)
    for part in ("set_aside", "values", "notes"):
        mine, theirs = getattr(one.report, part), getattr(other.report, part)
        assert (mine.counts, mine.first) == (theirs.counts, theirs.first)


def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes._Preparer, "_made", lambda *_: pytest.fail("decoded"))


def files(folder: AssetFolder) -> Iterator[Path]:
    return (path for path in folder.path.rglob("*") if path.is_file())


def test_records_and_report_are_those_without_a_store(asset: DicomAsset, folder: AssetFolder) -> None:
    plain, stored = data.load(asset, study()), data.load(asset, study(), None, folder)
    assert isinstance(stored, StoredDataset) and len(stored) == PATIENTS - 1
    assert stored.shapes == plain.shapes
    assert_same(plain, stored)
    some = np.array([4, 0, 4])
    np.testing.assert_array_equal(stored.take(some).inputs[0], inputs(plain)[some])


def test_processes_give_the_same_bits(asset: DicomAsset, folder: AssetFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "FEW", 2)
    started: list[Any] = []
    popen = subprocess.Popen

    def counted(*arguments: Any, **named: Any) -> Any:
        started.append(popen(*arguments, **named))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", counted)
    two = AssetFolder(folder.path, folder.key, processes=2)
    assert_same(data.load(asset, study()), data.load(asset, study(), None, two))
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_a_trained_model_is_the_same_bit_for_bit(asset: DicomAsset, folder: AssetFolder) -> None:
    for mode in ({"mode": "none"}, {"mode": "dp", "epsilon": 50.0, "delta": 1e-3, "clipping_norm": 1.0}):
        contract = study(privacy=mode)
        plan, model = plan_of(contract, PATIENTS), pack(to_vector(build(contract)), contract)
        updates = [
            train(
                model, contract, found, plan, round=1, site="here", device=torch.device("cpu"), seed=bytes(range(32))
            ).update
            for found in (data.load(asset, contract), data.load(asset, contract, None, folder))
        ]
        assert np.abs(updates[0]).max() > 0
        np.testing.assert_array_equal(updates[0], updates[1])


def test_nothing_is_decoded_again_at_the_next_start_or_for_another_study(
    asset: DicomAsset, folder: AssetFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = data.load(asset, study(), None, folder)
    no_decoding(monkeypatch)
    assert_same(first, data.load(asset, study(), None, folder))
    other = data.load(asset, study("another"), None, folder)
    np.testing.assert_array_equal(inputs(first), inputs(other))


def test_remarks_on_records_are_kept_with_them(
    asset: DicomAsset, folder: AssetFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes.ImageRecipe, "remark", decoders.dark)
    monkeypatch.setattr(processes, "MODULE", "tests.support.decoders")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    monkeypatch.setenv("DARK", "yes")
    plain = data.load(asset, study())
    assert 0 < plain.report.notes.counts["dark"] < PATIENTS - 1
    for _ in range(2):  # made, then found
        assert_same(plain, data.load(asset, study(), None, folder))


def test_a_file_that_was_moved_is_not_decoded_again(
    asset: DicomAsset, folder: AssetFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = data.load(asset, study(), None, folder)
    no_decoding(monkeypatch)
    (asset.path / "by-year").mkdir()
    for number in (0, 5):
        (asset.path / f"p{number}.dcm").rename(asset.path / "by-year" / f"{number}.dcm")
    found = data.load(asset, study(), None, folder)
    assert sorted(map(bytes, inputs(found))) == sorted(map(bytes, inputs(first)))


@pytest.mark.parametrize("how", ["written over", "replaced"])
def test_a_file_whose_content_changed_is_noticed_though_size_and_time_are_as_before(
    asset: DicomAsset, folder: AssetFolder, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("consilium_client.prepared.catalogue._SETTLED_NS", -(10**12))  # else it is read again anyhow
    data.load(asset, study(), None, folder)
    file = asset.path / "p1.dcm"
    was, content = file.stat(), bytearray(file.read_bytes())
    content[-40:] = bytes(40)
    place = file if how == "written over" else file.with_suffix(".new")
    place.write_bytes(content)
    place.replace(file)
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert_same(data.load(asset, study()), data.load(asset, study(), None, folder))


def test_what_was_prepared_of_a_file_that_is_gone_is_deleted(asset: DicomAsset, folder: AssetFolder) -> None:
    before = data.load(asset, study(), None, folder)
    (asset.path / "p2.dcm").unlink()
    after = data.load(asset, study(), None, folder)
    assert_same(data.load(asset, study()), after)
    packs = [Pack(file, folder.key, _about()) for file in folder.path.rglob("*.pack")]
    assert sum(map(len, packs)) == PATIENTS - 2
    gone = inputs(before)[sorted(f"p{number}" for number in range(PATIENTS) if number != 3).index("p2")].tobytes()
    rows = np.empty((PATIENTS - 2, len(gone)), dtype=np.uint8)
    packs[0].read(np.arange(PATIENTS - 2), rows, np.arange(PATIENTS - 2))
    assert gone not in {row.tobytes() for row in rows}
    assert_same(before, before)  # whoever still trains on it reads on


def _about() -> str:
    return recipes.ImageRecipe(SIZE).digest


def test_nothing_is_on_the_disk_in_clear_and_nobody_else_can_read_it(asset: DicomAsset, folder: AssetFolder) -> None:
    found = data.load(asset, study(), None, folder)
    secrets = [inputs(found)[0, 0, 12].tobytes(), b"p1.dcm", b"images", b"not readable", b"p3.dcm"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files(folder)} == {0o600}
    assert {stat.S_IMODE(p.stat().st_mode) for p in folder.path.rglob("*") if p.is_dir()} == {0o700}
    for path in files(folder):
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret in content or secret.decode("latin-1") in str(path.name)]


def test_a_damaged_record_is_not_used_and_is_prepared_anew(asset: DicomAsset, folder: AssetFolder) -> None:
    found = data.load(asset, study(), None, folder)
    (file,) = folder.path.rglob("*.pack")
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last[0] ^ 1]))
    with pytest.raises(DamagedPack):
        inputs(found)
    assert not found.intact
    assert_same(data.load(asset, study()), data.load(asset, study(), None, folder))


def test_another_key_or_a_damaged_catalogue_costs_time_alone(asset: DicomAsset, folder: AssetFolder) -> None:
    data.load(asset, study(), None, folder)
    folder.catalogue.write_bytes(b"{}")
    other = AssetFolder(folder.path, StoreKey(bytes(32)))
    for each in (folder, other):
        assert_same(data.load(asset, study()), data.load(asset, study(), None, each))


KILLED = """
import json, sys
from pathlib import Path
from consilium_client import data
from consilium_client.data.asset import DicomAsset
from consilium_client.prepared import records
from consilium_client.prepared.key import StoreKey
from consilium_client.prepared.store import AssetFolder
from consilium_shared.study import Study
records.PACK_BYTES = 1
images, table, folder, contract = sys.argv[1:]
asset = DicomAsset(kind="dicom", path=Path(images), table=Path(table))
data.load(asset, Study.model_validate_json(contract), None, AssetFolder(Path(folder), StoreKey(bytes(range(32)))))
"""


def test_of_a_preparation_that_was_killed_nothing_half_is_read(asset: DicomAsset, folder: AssetFolder) -> None:
    contract = study()
    for number in range(PATIENTS, 300):  # so that there is a middle to be killed in
        picture = np.linspace(0, number / 300, 400).reshape(20, 20)
        write_radiograph(asset.path / f"q{number}.dcm", picture, "p0", f"q{number}", Scanner(12))
    rows = ["patient,file,finding", *(f"p0,q{number}.dcm,normal" for number in range(PATIENTS, 300))]
    asset.table.write_text("\n".join(rows) + "\n")
    linked = asset.model_copy(update={"file": "file"})
    text = KILLED.replace("table=Path(table))", 'table=Path(table), file="file")')
    arguments = [str(asset.path), str(asset.table), str(folder.path), json.dumps(contract.contract)]
    process = subprocess.Popen([sys.executable, "-c", text, *arguments])
    while process.poll() is None and sum(1 for _ in folder.path.rglob("*.pack")) < 5:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 5 <= sum(1 for _ in folder.path.rglob("*.pack")) < 280
    assert_same(data.load(linked, contract), data.load(linked, contract, None, folder))


def test_small_packs_become_one(asset: DicomAsset, folder: AssetFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "PACK_BYTES", 1)
    data.load(asset, study(), None, folder)
    assert sum(1 for _ in folder.path.rglob("*.pack")) > 8
    monkeypatch.undo()
    no_decoding(monkeypatch)
    found = data.load(asset, study(), None, folder)
    assert sum(1 for _ in folder.path.rglob("*.pack")) == 1
    monkeypatch.undo()
    assert_same(data.load(asset, study()), found)


def test_older_code_unused_preparations_and_assets_that_are_gone_are_deleted(
    asset: DicomAsset, folder: AssetFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data.load(asset, study(), None, folder)
    data.load(asset, study(size=16), None, folder)
    (release,) = (path for path in folder.path.iterdir() if path.is_dir())
    old, new = sorted(release.iterdir(), key=lambda path: path.stat().st_mtime)
    os.utime(old, (0, time.time() - 31 * 86400))
    data.load(asset, study(size=16), None, folder)
    assert list(release.iterdir()) == [new]
    monkeypatch.setattr(recipes, "_decoding_code", lambda: "ab" * 32)
    data.load(asset, study(), None, folder)
    assert not release.exists()
    store = PreparedStore(folder.path.parent, folder.key)
    (found,) = held(store.folder)
    assert found.asset == "xray" and found.size > (PATIENTS - 1) * SIZE * SIZE * 4
    store.keep_only(["xray", "other"])
    assert held(store.folder) == [found]
    store.keep_only(["other"])
    assert held(store.folder) == [] and not folder.path.exists()


def test_a_disk_that_is_too_small_is_said_before_anything_is_decoded(
    asset: DicomAsset, folder: AssetFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_decoding(monkeypatch)
    monkeypatch.setattr("shutil.disk_usage", lambda _: os.terminal_size((0, 0)) and type("Disk", (), {"free": 1000}))
    with pytest.raises(DataError, match="Make room"):
        data.load(asset, study(), None, folder)


def test_a_file_that_ends_the_decoder_is_set_aside_and_the_others_are_prepared(
    asset: DicomAsset, folder: AssetFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "FEW", 2)
    monkeypatch.setattr(processes, "MODULE", "tests.support.decoders")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    monkeypatch.setattr(processes, "SECONDS", 20.0)
    found = data.load(asset, study(), None, AssetFolder(folder.path, folder.key, processes=2))
    assert len(found) == PATIENTS - 2
    assert found.report.set_aside.counts[processes.CRASHED] == 1
    assert found.report.set_aside.first[processes.CRASHED] == "p7.dcm"
    monkeypatch.setattr(processes, "MODULE", "consilium_client.data.preparing")
    assert len(data.load(asset, study(), None, folder)) == PATIENTS - 1, "it is tried again"
