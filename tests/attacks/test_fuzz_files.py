"""Every decoder of our own files, and of an opened sum: it takes what was written, or says that it is damaged."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.attacks.test_lying_site import study as study_with
from tests.support.messages import requests, started
from tests.support.mutations import FUZZ, VALUES, canonical, mutated

from consilium_client.state.responses import Responses
from consilium_client.state.results import About, Results
from consilium_client.state.sum_store import Peer, Session, SumStore
from consilium_server.state.pending_sum import PendingSum, PendingSumFile
from consilium_shared.errors import IntegrityError
from consilium_shared.metrics import Layout
from consilium_shared.protocol.messages import Train
from consilium_shared.protocol.summand import read
from consilium_shared.secagg.handshake import Encapsulated
from consilium_shared.secagg.site import SiteState
from consilium_shared.study import Study


@cache
def states() -> list[Any]:
    attempt = started()
    abandoned = attempt.federation.sum().states["site-01"]
    every = [*attempt.states.values(), abandoned, attempt.federation.parts["site-01"].abandon(abandoned)]
    return [state.model_dump(mode="json") for state in every]


@FUZZ
@given(mutated(states))
def test_a_state(value: Any) -> None:
    if (data := canonical(value)) is None:
        return
    try:
        state = SiteState.from_bytes(data)
    except IntegrityError:
        return
    assert (state.terms is None) or state.stage != "advertised"
    assert SiteState.from_bytes(state.to_bytes()) == state


def a_secret() -> Encapsulated:
    """What site-00 sends another site in the handshake."""
    train = requests()["train"][0]
    assert isinstance(train, Train)
    return train.encapsulated["site-00"]


@cache
def open_sums() -> list[Any]:
    attempt = started()
    sent = {"site-01": {"site-00": a_secret()}}
    about: dict[str, Any] = {
        "purpose": "training",
        "round": 1,
        "attempt": 1,
        "adverts": attempt.adverts,
        "encapsulated": sent,
    }
    both = PendingSum(**about), PendingSum(**about, survivors=attempt.total.survivors)
    return [each.model_dump(mode="json") for each in both]


@FUZZ
@given(value=mutated(open_sums), rest=st.binary(max_size=3))
def test_the_coordinators_file_of_a_sum(tmp_path: Path, value: Any, rest: bytes) -> None:
    if (data := canonical(value)) is None:
        return
    (tmp_path / "sum.json").write_bytes(data + rest)
    try:
        found = PendingSumFile(tmp_path).read("training", 1)
    except IntegrityError:
        return
    assert found is None or (found.purpose, found.round) == ("training", 1)


@cache
def a_session() -> list[Any]:
    bundle = started().federation.session["site-01"].bundle
    sent = a_secret()
    peers = {"site-01": Peer(bundle=bundle, secret="ab" * 32, sent=sent), "site-02": Peer(bundle=bundle)}
    return [Session(seed="cd" * 32, peers=peers).model_dump(mode="json")]


@FUZZ
@given(value=mutated(a_session), rest=st.binary(max_size=3))
def test_a_sites_file_of_secrets(tmp_path: Path, value: Any, rest: bytes) -> None:
    if (data := canonical(value)) is None:
        return
    store = SumStore(tmp_path / "sums")
    (store.folder / "a").mkdir(exist_ok=True)
    (store.folder / "a" / "session.json").write_bytes(data + rest)
    try:
        session = store.session("a")
    except IntegrityError:
        return
    assert all(len(secret) == 32 for secret in session.secrets.values())
    assert session.seed not in repr(session) + str(session)


STUDY = "a" * 64


@FUZZ
@given(value=mutated(lambda: [about().model_dump(mode="json")]), sealed=st.booleans(), cut=st.integers(0, 40))
def test_a_file_of_a_result(tmp_path: Path, value: Any, sealed: bool, cut: int) -> None:
    if (line := canonical(value)) is None:
        return
    results = Results(tmp_path / "results")
    data = line + b"\n" + bytes(4 * 3 + 8 * 2)
    data += hashlib.sha256(data).digest() if sealed else bytes(32)
    (results.folder / f"{STUDY}.training").write_bytes(data[: len(data) - cut if cut > 20 else len(data)])
    try:
        result = results.get(STUDY, "training", 1)
    except IntegrityError:
        return
    if result is None:
        told = results.about(STUDY, "training")
        assert told is None or told.round != 1
        return
    assert sealed and cut <= 20
    assert result.update(0, result.about.parameters).shape == (result.about.parameters,)


def about() -> About:
    slot: dict[str, Any] = {"purpose": "training", "round": 1, "attempt": 1, "model": "b" * 64}
    return About(**slot, weight=3, counted=True, epsilon=1.5, parameters=3, counts=2)


@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=3), cut=st.integers(0, 300))
def test_a_file_of_an_answer(tmp_path: Path, flips: list[tuple[int, int]], cut: int) -> None:
    store = Responses(tmp_path / "answers")
    file = store.folder / STUDY / "update.1"
    file.unlink(missing_ok=True)
    store.put(STUDY, 1, "update", "c" * 64, b"header", b"payload" * 20)
    right = file.read_bytes()
    data = bytearray(right)
    for place, change in flips:
        data[place % len(data)] ^= change
    wrong = bytes(data[: len(data) - cut] if cut < 200 else data)
    file.write_bytes(wrong)
    try:
        stored = store.get(STUDY, 1, "update", "c" * 64)
    except IntegrityError:
        assert wrong != right
        return
    assert wrong == right and stored is not None and stored[0] == b"header"


@FUZZ
@given(last=VALUES, text=st.binary(max_size=60))
def test_a_file_of_an_answer_that_ends_in_any_json(tmp_path: Path, last: Any, text: bytes) -> None:
    store = Responses(tmp_path / "answers")
    (store.folder / STUDY).mkdir(exist_ok=True)
    (store.folder / STUDY / "update.1").write_bytes(text + b"\n" + (canonical(last) or b""))
    with pytest.raises(IntegrityError):
        store.get(STUDY, 1, "update", "c" * 64)


# -- what is opened


STUDIES = [
    study_with(weighting="equal", ring_bits=16),
    study_with(weighting="equal", ring_bits=32, coordinate_bound=1e4, norm_bound=1e4),
    study_with(weighting="patients", coordinate_bound=1e-30, norm_bound=1e-30),
]


@FUZZ
@given(
    study=st.sampled_from(STUDIES),
    words=st.binary(min_size=32, max_size=32),
    head=st.tuples(st.integers(-2, 5) | st.integers(-(2**63), 2**63 - 1), st.integers(-2, 5)),
    counts=st.integers(-(2**63), 2**63 - 1),
    purpose=st.sampled_from(["training", "evaluation"]),
    riding=st.booleans(),
)
@pytest.mark.filterwarnings("error")
def test_a_sum_of_any_words(
    study: Study, words: bytes, head: tuple[int, int], counts: int, purpose: Any, riding: bool
) -> None:
    update = np.frombuffer(bytearray(words), f"<u{study.aggregation.ring_bits // 8}")
    totals = {}
    if purpose == "evaluation" or riding:
        totals["counts"] = np.array([head[1], *([counts] * Layout.of(study).width)], np.int64).view(np.uint64)
    if purpose == "training":
        totals |= {"update": update, "weight": np.array([head[0]], np.int64).view(np.uint64)}
    found = read(study, purpose, 4, 3, totals)
    if "spoilt" in str(found.implausible):
        most = 3 if study.aggregation.weighting == "equal" else 3 * study.aggregation.max_weight
        assert not 3 <= head[0] <= most or not 0 <= head[1] <= 3
        return
    assert 0 <= found.counted <= 3
    if purpose == "training":
        assert found.weight >= 3 and found.mean.shape == update.shape and bool(np.isfinite(found.mean).all())
    assert (found.counts is not None) == (purpose == "evaluation" or riding)
