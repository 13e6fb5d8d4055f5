"""Every decoder: what it takes is what honest ends write, and anything else is one of our own errors, nothing else."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.attacks.examples import COORDINATOR, SITE, answers, requests, started
from tests.attacks.test_lying_site import SAMPLE

from consilium_client.answers import AnswerStore
from consilium_client.results import About, Results
from consilium_client.sum_store import Peer, Session, SumStore
from consilium_server.open_sum import OpenSum, OpenSumFile
from consilium_shared import messages
from consilium_shared.canonical import canonical_bytes, parse_canonical
from consilium_shared.errors import IntegrityError, PeerError
from consilium_shared.identity import Identity
from consilium_shared.metrics import Layout
from consilium_shared.secagg.handshake import decode_bundles, decode_encapsulated, encode_bundles, encode_encapsulated
from consilium_shared.secagg.site import SiteState
from consilium_shared.secagg.terms import Advert, Terms
from consilium_shared.study import Study
from consilium_shared.summand import read

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**53) + 1, 2**53 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12).filter(lambda text: text.isascii() or "\ud800" not in text),
    st.sampled_from(["a" * 64, "b" * 128, "site-00", "training", "evaluation", "masked", "", "0", "-1", "1e9"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a JSON value."""
    found = [path]
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        found += places(inner, (*path, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, originals: Callable[[], list[Any]]) -> Any:
    """One of the values with something in it replaced, deleted, added or taken from elsewhere; or any value at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    values = originals()
    value = copy.deepcopy(draw(st.sampled_from(values)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        if not path:
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        action = draw(st.integers(0, 3))
        if action == 0:
            del holder[path[-1]]
        elif action == 1 and isinstance(holder, dict):
            holder[draw(st.text(max_size=8) | st.sampled_from(["kind", "round", "of", "site-00"]))] = draw(VALUES)
        elif action == 2:
            other = draw(st.sampled_from(values))
            there = draw(st.sampled_from(places(other)))
            for key in there:
                other = other[key]
            holder[path[-1]] = copy.deepcopy(other)
        else:
            holder[path[-1]] = draw(VALUES)
    return value


def canonical(value: Any) -> bytes | None:
    """The bytes of a value, if it has any."""
    try:
        return canonical_bytes(value)
    except (ValueError, RecursionError):
        return None


@cache
def request_bodies() -> list[Any]:
    return [message.model_dump(mode="json") for message, _ in requests().values()]


@cache
def answer_bodies() -> list[Any]:
    return [message.model_dump(mode="json") for message, _ in answers().values()]


def header(body: bytes, domain: str, signer: Identity) -> bytes:
    """A header with a right signature over any body."""
    signature = signer.sign(domain, body).hex().encode()
    return b'{"body":' + body + b',"signature":"' + signature + b'"}'


# -- messages


@FUZZ
@given(mutated(request_bodies))
def test_a_request_that_the_coordinator_signed(body: Any) -> None:
    if (data := canonical(body)) is None:
        return
    try:
        read_ = messages.decode_request(header(data, messages.REQUEST_DOMAIN, COORDINATOR), COORDINATOR.public)
    except PeerError:
        return
    assert canonical_bytes(read_.model_dump(mode="json")) == data


@FUZZ
@given(mutated(answer_bodies))
def test_an_answer_that_a_site_signed(body: Any) -> None:
    if (data := canonical(body)) is None:
        return
    try:
        read_ = messages.decode_answer(header(data, messages.ANSWER_DOMAIN, SITE), SITE.public)
    except PeerError:
        return
    assert canonical_bytes(read_.model_dump(mode="json")) == data


NESTED = [b"[" * depth + b"]" * depth for depth in (10, 200, 255, 256, 300, 500, 900, 5000, 100_000)]


@pytest.mark.parametrize("nested", NESTED, ids=lambda nested: str(len(nested) // 2))
def test_a_request_that_is_nested_deeper_than_anybody_writes(nested: bytes) -> None:
    body = canonical_bytes(requests()["propose"][0].model_dump(mode="json"))
    deep = body.replace(b'{"study":"one"}', b'{"study":' + nested + b"}")
    assert deep != body
    data = header(deep, messages.REQUEST_DOMAIN, COORDINATOR)
    try:
        messages.decode_request(data, COORDINATOR.public)
    except PeerError:
        assert len(nested) > 100


ODD = [
    b"", b"{}", b"[]", b"null", b"0", b"-0", b"1e400", b"NaN", b"Infinity", b'"\\ud800"', b'"\xed\xa0\x80"', b"\xff",
    b'{"body":{},"signature":null}', b'{"body":null,"signature":"' + b"0" * 128 + b'"}', b"1" * 5000, b"[1,]",
    b'{"a":1,"a":2}', b'{"\\u0061":1}', b" {}", b"{} ", b"\xef\xbb\xbf{}", b"1.0", b"12345678901234567890",
]  # fmt: skip


@pytest.mark.parametrize("data", ODD)
def test_odd_bytes(data: bytes) -> None:
    for decode in (
        lambda: messages.decode_request(data, COORDINATOR.public),
        lambda: messages.decode_answer(data, SITE.public),
        lambda: messages.decode_request(header(data, messages.REQUEST_DOMAIN, COORDINATOR), COORDINATOR.public),
        lambda: messages.decode_answer(header(data, messages.ANSWER_DOMAIN, SITE), SITE.public),
    ):
        with pytest.raises(PeerError):
            decode()


@FUZZ
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    for decode in (decode_bundles, decode_encapsulated, parse_canonical):
        try:
            decode(data)
        except PeerError:
            continue
        assert canonical_bytes(json.loads(data)) == data
    with pytest.raises(IntegrityError):
        SiteState.from_bytes(data)
    with pytest.raises(PeerError):
        messages.decode_answer(data, SITE.public)


# -- keys


@cache
def bundle_payloads() -> list[Any]:
    return [json.loads(requests()["handshake"][1])]


@cache
def encapsulated_payloads() -> list[Any]:
    return [json.loads(answers()["handshaken"][1])]


@FUZZ
@given(mutated(bundle_payloads))
def test_bundles(value: Any) -> None:
    if (data := canonical(value)) is None:
        return
    try:
        found = decode_bundles(data)
    except PeerError:
        return
    assert encode_bundles(found) == data


@FUZZ
@given(mutated(encapsulated_payloads))
def test_encapsulated(value: Any) -> None:
    if (data := canonical(value)) is None:
        return
    try:
        found = decode_encapsulated(data)
    except PeerError:
        return
    assert encode_encapsulated(found) == data


@cache
def terms_values() -> list[Any]:
    return [started().terms.model_dump(mode="json")]


@FUZZ
@given(mutated(terms_values))
def test_terms(value: Any) -> None:
    """Made of a message's fields, so pydantic's error is what the caller turns into ours."""
    try:
        terms = Terms.model_validate(value)
    except ValidationError:
        return
    assert terms.cohort == tuple(sorted(terms.cohort)) and 2 <= terms.threshold <= len(terms.cohort)
    assert len(terms.digest) == 64 and terms.masked_bytes > 0
    try:
        terms.check(started().federation.public)
    except PeerError:
        return
    assert set(terms.cohort) <= set(started().federation.names)


@FUZZ
@given(mutated(lambda: [each.model_dump(mode="json") for each in started().adverts.values()]))
def test_an_advertisement(value: Any) -> None:
    attempt = started()
    try:
        advert = Advert.model_validate(value)
        advert.verify(attempt.slot, "site-00", attempt.federation.public["site-00"])
    except (ValidationError, PeerError):
        return
    assert advert == attempt.adverts["site-00"]


# -- files


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


@cache
def open_sums() -> list[Any]:
    attempt = started()
    sent = {"site-01": {"site-00": requests()["train"][0].encapsulated["site-00"]}}
    about = {"purpose": "training", "round": 1, "attempt": 1, "adverts": attempt.adverts, "encapsulated": sent}
    both = OpenSum(**about), OpenSum(**about, survivors=attempt.total.survivors)
    return [each.model_dump(mode="json") for each in both]


@FUZZ
@given(value=mutated(open_sums), rest=st.binary(max_size=3))
def test_the_coordinators_file_of_a_sum(tmp_path: Path, value: Any, rest: bytes) -> None:
    if (data := canonical(value)) is None:
        return
    (tmp_path / "sum.json").write_bytes(data + rest)
    try:
        found = OpenSumFile(tmp_path).read("training", 1)
    except IntegrityError:
        return
    assert found is None or (found.purpose, found.round) == ("training", 1)


@FUZZ
@given(value=mutated(lambda: sessions()), rest=st.binary(max_size=3))
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


@cache
def sessions() -> list[Any]:
    bundle = started().federation.session["site-01"].bundle
    sent = requests()["train"][0].encapsulated["site-00"]
    peers = {"site-01": Peer(bundle=bundle, secret="ab" * 32, sent=sent), "site-02": Peer(bundle=bundle)}
    return [Session(seed="cd" * 32, peers=peers).model_dump(mode="json")]


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
    slot = {"purpose": "training", "round": 1, "attempt": 1, "model": "b" * 64}
    return About(**slot, weight=3, counted=True, epsilon=1.5, parameters=3, counts=2)


@FUZZ
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=3), cut=st.integers(0, 300))
def test_a_file_of_an_answer(tmp_path: Path, flips: list[tuple[int, int]], cut: int) -> None:
    store = AnswerStore(tmp_path / "answers")
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
    store = AnswerStore(tmp_path / "answers")
    (store.folder / STUDY).mkdir(exist_ok=True)
    (store.folder / STUDY / "update.1").write_bytes(text + b"\n" + (canonical(last) or b""))
    with pytest.raises(IntegrityError):
        store.get(STUDY, 1, "update", "c" * 64)


# -- what is opened


def study_with(**aggregation: Any) -> Study:
    contract = {**SAMPLE.contract, "aggregation": {**SAMPLE.contract["aggregation"], **aggregation}}
    return Study.from_contract(json.loads(json.dumps(contract)))


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
