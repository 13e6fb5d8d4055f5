"""Published weights are read without running anything, or refused with what to do."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch

from consilium_shared.errors import ConfigurationError
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
