"""A model, its flat vector and its bytes are the same thing; anything else is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tests.support import studies

from consilium_shared.errors import PeerError
from consilium_shared.models import build
from consilium_shared.models.vector import load_vector, pack, to_vector, trained, unpack, width, with_trained
from consilium_shared.study import Study

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)


def mlp(name: str = "test", **model: Any) -> Study:
    return studies.study({"name": "mlp", "hidden": 3, **model}, {"features": [{"name": "a"}, {"name": "b"}]}, name=name)


STUDY = mlp()
MODEL = build(STUDY)
SIZE = to_vector(MODEL).size
VECTORS = hnp.arrays(np.float32, SIZE, elements=FINITE)


@given(VECTORS)
def test_packing_and_unpacking_keeps_every_bit(vector: np.ndarray) -> None:
    data = pack(vector, STUDY)
    assert unpack(data, MODEL, STUDY).tobytes() == vector.tobytes()
    assert pack(unpack(data, MODEL, STUDY), STUDY) == data


@given(VECTORS)
def test_loading_and_reading_back_keeps_every_bit(vector: np.ndarray) -> None:
    model = build(STUDY)
    load_vector(model, vector)
    assert to_vector(model).tobytes() == vector.tobytes()


PARTS = [mlp(), mlp(trainable="head"), mlp(trainable="lora", lora_rank=2, layers=2)]


@pytest.mark.parametrize("study", PARTS, ids=["all", "head", "lora"])
@given(data=st.data())
def test_the_trained_part_goes_out_of_a_model_and_back_with_every_bit_and_moves_no_other(
    study: Study, data: st.DataObject
) -> None:
    model = build(study)
    size = sum(p.numel() for p in model.parameters())
    whole = data.draw(hnp.arrays(np.float32, size, elements=FINITE))
    part = data.draw(hnp.arrays(np.float32, width(study), elements=FINITE))
    assert with_trained(whole, trained(whole, study), study).tobytes() == whole.tobytes()
    before, mixed = whole.tobytes(), with_trained(whole, part, study)
    assert whole.tobytes() == before
    assert trained(mixed, study).tobytes() == part.tobytes()
    load_vector(model, mixed)
    other = build(study)
    load_vector(other, whole)
    for after, kept in zip(model.parameters(), other.parameters(), strict=True):
        assert after.requires_grad or after.detach().numpy().tobytes() == kept.detach().numpy().tobytes()


@pytest.mark.parametrize("study", PARTS, ids=["all", "head", "lora"])
def test_vectors_of_another_length_have_no_trained_part(study: Study) -> None:
    size = sum(p.numel() for p in build(study).parameters())
    whole, part = np.zeros(size, np.float32), np.zeros(width(study), np.float32)
    with pytest.raises(ValueError, match="parameters"):
        trained(whole[1:], study)
    for before, after in ((whole[1:], part), (whole, part[1:]), (whole, np.append(part, part[:1]))):
        with pytest.raises(ValueError, match="parameters"):
            with_trained(before, after, study)


@settings(max_examples=200)
@given(st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        unpack(data, MODEL)


@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_is_refused_or_changes_the_vector(place: int, value: int) -> None:
    data = bytearray(pack(to_vector(MODEL), STUDY))
    place %= len(data)
    if data[place] == value:
        return
    data[place] = value
    try:
        changed = unpack(bytes(data), MODEL, STUDY)
    except PeerError:
        return
    assert changed.tobytes() != to_vector(MODEL).tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused(bad: float) -> None:
    vector = to_vector(MODEL)
    vector[3] = bad
    with pytest.raises(PeerError, match="finite"):
        unpack(pack(vector, STUDY), MODEL, STUDY)


def test_other_names_shapes_types_and_studies_are_refused() -> None:
    good = safetensors.numpy.load(pack(to_vector(MODEL), STUDY))
    name = next(name for name, value in good.items() if value.ndim == 2)
    metadata = {"study": STUDY.digest}
    wrong = {
        "missing": {k: v for k, v in good.items() if k != name},
        "extra": {**good, "other": np.zeros(1, np.float32)},
        "shape": {**good, name: good[name].reshape(-1)},
        "type": {**good, name: good[name].astype(np.float64)},
    }
    for tensors in wrong.values():
        with pytest.raises(PeerError):
            unpack(safetensors.numpy.save(tensors, metadata=metadata), MODEL, STUDY)
    with pytest.raises(PeerError, match="another study"):
        unpack(pack(to_vector(MODEL), mlp("another")), MODEL, STUDY)
    with pytest.raises(PeerError, match="another study"):
        unpack(safetensors.numpy.save(good), MODEL, STUDY)


def test_the_bytes_name_the_parameters_and_the_study() -> None:
    data = pack(to_vector(MODEL), STUDY)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header.pop("__metadata__") == {"study": STUDY.digest}
    assert set(header) == {name for name, _ in MODEL.named_parameters()}


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="parameters"):
        load_vector(build(STUDY), np.zeros(SIZE + 1, np.float32))
    with pytest.raises(ValueError, match="does not fit"):
        pack(np.zeros(SIZE - 1, np.float32), STUDY)
