"""Safetensors bytes made array by array are those of the library, and are read back as they were written."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tests.support.site import CONTRACT

from consilium_shared.errors import IntegrityError
from consilium_shared.models import build, tensors
from consilium_shared.models.vector import pack, packed_digest, to_vector
from consilium_shared.study import Study

DRAW = np.random.default_rng(0)
CASES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a checkpoint": {
        "model": DRAW.normal(size=5).astype(np.float32),
        "optimizer.second": DRAW.normal(size=5),
        "optimizer.first": DRAW.normal(size=5),
        "average": DRAW.normal(size=5),
    },
    "shapes": {"b": np.ones((2, 3), np.float32), "a": np.ones((), np.float64), "c.0": np.ones((0, 4), np.float32)},
    "names": {'quoted "ä"': np.ones(1, np.float32), "Z": np.zeros(1, np.float32), "é/\\": np.ones(3)},
    "more than a piece": {"model": DRAW.normal(size=300_000).astype(np.float32), "state": DRAW.normal(size=200_001)},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("metadata", [None, {"study": "a" * 64}])
def test_the_bytes_are_the_librarys_and_their_digest_is_found_without_them(
    case: str, metadata: dict[str, str] | None
) -> None:
    expected = safetensors.numpy.save(CASES[case], metadata=metadata)
    assert b"".join(tensors.encode(CASES[case], metadata)) == expected
    assert tensors.digest(CASES[case], metadata) == hashlib.sha256(expected).hexdigest()


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_read_as_it_was_written(case: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(safetensors.numpy.save(CASES[case], metadata={"study": "x"}))
    found, sha256 = tensors.read(file)
    assert sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.keys() == CASES[case].keys()
    for name, array in CASES[case].items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert np.array_equal(found[name], array)


def test_a_file_that_was_cut_lengthened_or_is_another_is_an_integrity_error(tmp_path: Path) -> None:
    file, whole = tmp_path / "file", safetensors.numpy.save(CASES["a checkpoint"])
    for content in (b"", whole[:5], whole[:60], whole[:-1], whole + b"x", b"\xff" * 100, whole.replace(b"F64", b"I64")):
        file.write_bytes(content)
        with pytest.raises(IntegrityError):
            tensors.read(file)


@pytest.mark.parametrize("array", [np.ones(2, np.int64), np.ones((4, 4), np.float32)[:, 1]])
def test_what_has_another_type_or_lies_in_strides_is_not_written(array: Any) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        list(tensors.encode({"a": array}))


def test_a_models_bytes_are_what_the_library_makes_of_its_parameters() -> None:
    study = Study.model_validate(CONTRACT)
    model = build(study)
    parts = {name: p.detach().numpy() for name, p in model.named_parameters()}
    expected = safetensors.numpy.save(parts, metadata={"study": study.digest})
    packed = pack(to_vector(model), study)
    assert packed == expected
    assert packed_digest(to_vector(model), study) == hashlib.sha256(packed).hexdigest()
