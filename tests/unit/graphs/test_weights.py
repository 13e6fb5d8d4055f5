"""Published weights are read without running anything, or refused with what to do."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch

from consilium_shared.errors import ConfigurationError
from consilium_shared.graphs import weights
from consilium_shared.graphs.weights import read


class Evil:
    """Runs a command where pickle is trusted."""

    def __reduce__(self) -> Any:
        return (open, ("/tmp/consilium-was-here", "w"))


def test_three_kinds_of_file_give_the_same_arrays(tmp_path: Path) -> None:
    state = torch.nn.Linear(3, 2).state_dict()
    torch.save(state, tmp_path / "a.pt")
    torch.save({"state_dict": state}, tmp_path / "b.pth")
    safetensors.torch.save_file(state, tmp_path / "c.safetensors")
    weight = state["weight"].numpy()
    initialisers = [
        onnx.numpy_helper.from_array(array, name)
        for name, array in (("weight", weight.T.copy()), ("bias", state["bias"].numpy()))
    ]
    node = onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [], [], initialisers)
    (tmp_path / "d.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    for file in tmp_path.iterdir():
        found = read(file).weights
        assert set(found) == {"weight", "bias"}
        assert np.array_equal(found["weight"], weight), file


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin"])
def test_a_pickle_that_would_run_something_is_refused(tmp_path: Path, name: str) -> None:
    for save in (
        lambda file: torch.save({"weight": Evil()}, file),
        lambda file: file.write_bytes(pickle.dumps(Evil())),
    ):
        save(tmp_path / name)
        with pytest.raises(ConfigurationError, match="holds more or other than weights"):
            read(tmp_path / name)
    assert not Path("/tmp/consilium-was-here").exists()


def test_what_is_no_weights_is_told_as_such(tmp_path: Path) -> None:
    whole, numbers, broken = tmp_path / "whole.pt", tmp_path / "n.pt", tmp_path / "x.pt"
    torch.save(torch.nn.Linear(2, 2), whole)
    torch.save({"weight": 3}, numbers)
    torch.save({"weight": torch.tensor([float("nan")])}, broken)
    for file, why in ((whole, "state_dict"), (numbers, "no weight"), (broken, "not finite"), (tmp_path, "cannot read")):
        with pytest.raises(ConfigurationError, match=why):
            read(file)
    for suffix in ("safetensors", "onnx", "pt"):
        (tmp_path / f"g.{suffix}").write_bytes(b"garbage")
        with pytest.raises(ConfigurationError, match="holds"):
            read(tmp_path / f"g.{suffix}")
    (tmp_path / "empty.pt").touch()
    with pytest.raises(ConfigurationError, match="is empty"):
        read(tmp_path / "empty.pt")


def swollen(file: Path, form: str) -> None:
    """A small file of a state dict that stands for more numbers than memory holds."""
    if form == "one number in any shape":
        torch.save({"w": torch.zeros(1).expand(2**45)}, file)
    elif form == "one storage by many names":
        one = torch.zeros(2**18)
        torch.save({f"w{number}": one for number in range(2100)}, file)
    else:
        torch.save({"w": torch.zeros(2**18)}, file)
        with zipfile.ZipFile(file) as packed:
            parts = {part.filename: packed.read(part) for part in packed.infolist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content in parts.items():
                packed.writestr(name, content)


@pytest.mark.parametrize("form", ["one number in any shape", "one storage by many names", "a packed storage"])
def test_a_file_that_swells_is_refused_before_memory_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    swollen(tmp_path / "w.pt", form)
    if form == "a packed storage":
        monkeypatch.setattr(weights, "PAYLOAD_BYTES", 2**18)
    monkeypatch.setattr(np, "ascontiguousarray", None)
    with pytest.raises(ConfigurationError, match="its weights would take more than"):
        read(tmp_path / "w.pt")


def test_the_bytes_that_are_read_are_the_bytes_whose_digest_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "w.pt"
    torch.save({"w": torch.zeros(3)}, file)
    content, read_bytes = file.read_bytes(), Path.read_bytes

    def then_another(path: Path) -> bytes:
        found = read_bytes(path)
        torch.save({"w": torch.ones(3)}, path)
        return found

    monkeypatch.setattr(Path, "read_bytes", then_another)
    found = read(file)
    assert found.sha256 == hashlib.sha256(content).hexdigest() and not found.weights["w"].any()


@pytest.mark.parametrize("error", [MemoryError, IndexError, AttributeError, RecursionError])
def test_whatever_a_reader_runs_into_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("line\n\x1b[2J")

    monkeypatch.setattr(torch, "load", fail)
    (tmp_path / "w.pt").write_bytes(b"x")
    with pytest.raises(ConfigurationError, match="holds more or other than weights") as raised:
        read(tmp_path / "w.pt")
    assert str(raised.value).isprintable()
