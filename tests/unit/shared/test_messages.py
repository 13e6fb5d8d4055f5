"""Messages: exactly what was signed is read, and anything else is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consilium_shared import limits, task
from consilium_shared.canonical import canonical_bytes, digest
from consilium_shared.config import load_yaml
from consilium_shared.errors import ConfigurationError, PeerError, SignatureError
from consilium_shared.identity import Identity
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import (
    Advertise,
    Advertised,
    ApprovalStatus,
    Close,
    Closing,
    Counts,
    Evaluate,
    Handshake,
    Handshaken,
    Head,
    Open,
    Payload,
    Propose,
    Recorded,
    Refusal,
    Shares,
    Signed,
    Survivors,
    Train,
    Update,
)
from consilium_shared.schema import SCHEMA
from consilium_shared.secagg.handshake import (
    SessionKeys,
    decode_bundles,
    decode_encapsulated,
    encode_bundles,
    encode_encapsulated,
)
from consilium_shared.secagg.terms import Advert, Slot
from consilium_shared.study import Study

COORDINATOR = Identity.generate()
SITE = Identity.generate()
COMMON: dict[str, Any] = {"federation": "a" * 64, "study": "b" * 64}
ROSTER = "c" * 64
SLOT = Slot(**COMMON, roster=ROSTER, purpose="training", round=3, attempt=2)
ADVERTS = {
    site: Advert.sign(SLOT, site, number.to_bytes(32), SITE, signed=(1,), counts=True)
    for number, site in enumerate(("hospital-a", "hospital-b"), 1)
}
RECORDED = Recorded(round=2, record="7" * 64, heads={"hospital-a": Head(seq=3, sha256="8" * 64)})
LOW, HIGH = (SessionKeys(bytes([n]) * 32, "b" * 64, ROSTER, f"hospital-{c}", SITE) for n, c in ((1, "a"), (2, "b")))
SENT, _ = LOW.encapsulate("hospital-b", HIGH.bundle, SITE.public)
OF: dict[str, Any] = {**COMMON, "roster": ROSTER, "round": 3, "attempt": 2}
CONTRIBUTE: dict[str, Any] = {
    **OF,
    "adverts": ADVERTS,
    "encapsulated": {"hospital-a": SENT},
    "payload": Payload.of(b"model"),
}
TRAIN = Train(**CONTRIBUTE, recorded=RECORDED)
REQUESTS = (
    TRAIN,
    Evaluate(**CONTRIBUTE),
    Advertise(**OF, of="training"),
    Handshake(**COMMON, roster=ROSTER, payload=Payload.of(b"keys")),
    Survivors(**OF, of="training", survivors=("hospital-a", "hospital-b"), payload=Payload.of(b"sealed")),
    Open(**OF, of="evaluation", signatures={"hospital-a": "9" * 128, "hospital-b": "8" * 128}),
    Close(**COMMON, roster=ROSTER, recorded=RECORDED),
)
FROM: dict[str, Any] = {**COMMON, "site": "hospital-a", "request": "d" * 64, "head": Head(seq=4, sha256="e" * 64)}
PLACE: dict[str, Any] = {"round": 3, "attempt": 2}
UPDATE = Update(**FROM, **PLACE, epsilon=1.5, payload=Payload.of(b"update"))
ANSWERS = (
    UPDATE,
    Counts(**FROM, **PLACE, epsilon=None, payload=Payload.of(b"counts")),
    Advertised(
        **FROM, **PLACE, of="training", advert=ADVERTS["hospital-a"], bundle=LOW.bundle, known={"hospital-b": "2" * 64}
    ),
    Handshaken(**FROM, payload=Payload.of(b"secrets")),
    Signed(**FROM, **PLACE, of="training", signature="3" * 128),
    Shares(**FROM, **PLACE, of="training", next=ADVERTS["hospital-a"], payload=Payload.of(b"shares")),
    Closing(**FROM, round=3, epsilon=None, countersignature="4" * 128),
    Refusal(**FROM, reason="sum", detail="why"),
)


def kind(message: messages.Request | messages.Answer) -> str:
    return message.kind


@pytest.mark.parametrize("request_", REQUESTS, ids=kind)
def test_a_request_is_read_as_it_was_written(request_: messages.Request) -> None:
    for protocol in (1, SCHEMA):
        read = messages.decode_request(messages.encode(request_, COORDINATOR, protocol), COORDINATOR.public)
        assert read == request_.model_copy(update={"protocol": protocol})


@pytest.mark.parametrize("answer", ANSWERS, ids=kind)
def test_an_answer_is_read_as_it_was_written(answer: messages.Answer) -> None:
    for protocol in (1, SCHEMA):
        read = messages.decode_answer(messages.encode(answer, SITE, protocol), SITE.public)
        assert read == answer.model_copy(update={"protocol": protocol})


def test_every_kind_of_message_is_among_these() -> None:
    assert {type(each) for each in REQUESTS} == set(get_args(messages.Request)) - {Propose}
    assert {type(each) for each in ANSWERS} == set(get_args(messages.Answer)) - {ApprovalStatus}


def signed_as_it_stands(message: messages.Request, **changes: object) -> bytes:
    body = {**message.model_dump(mode="json"), **changes}
    signature = COORDINATOR.sign(messages.REQUEST_DOMAIN, canonical_bytes(body)).hex()
    return canonical_bytes({"body": body, "signature": signature})


SUMS = [each for each in REQUESTS if isinstance(each, get_args(messages.SumRequest))]


@pytest.mark.parametrize("request_", SUMS, ids=kind)
@pytest.mark.parametrize(
    "change", [{"round": 0}, {"attempt": 0}, {"attempt": limits.ATTEMPTS + 1}, {"round": limits.ROUNDS + 1}]
)
def test_a_sum_of_no_round_or_attempt_is_refused(request_: messages.Request, change: dict[str, object]) -> None:
    assert messages.decode_request(signed_as_it_stands(request_), COORDINATOR.public) == request_
    with pytest.raises(PeerError, match="out of bounds"):
        messages.decode_request(signed_as_it_stands(request_, **change), COORDINATOR.public)


@pytest.mark.parametrize(
    ("request_", "change"),
    [
        (REQUESTS[4], {"survivors": ["hospital-a"]}),
        (REQUESTS[5], {"signatures": {"hospital-a": "9" * 128}}),
        (REQUESTS[0], {"adverts": {"hospital-a": ADVERTS["hospital-a"].model_dump(mode="json")}}),
        (REQUESTS[2], {"of": "both"}),
    ],
)
def test_a_sum_of_one_site_cannot_even_be_asked_for(request_: messages.Request, change: dict[str, object]) -> None:
    with pytest.raises(PeerError, match="out of bounds"):
        messages.decode_request(signed_as_it_stands(request_, **change), COORDINATOR.public)


@pytest.mark.parametrize("payload", [b"", b"[]", b'{"a":1}', b'{"a": {}}', b'{"../x":{}}', bytes(300_000)])
def test_keys_of_a_handshake_that_are_not_exactly_that_are_a_peer_error(payload: bytes) -> None:
    for decode in (decode_bundles, decode_encapsulated):
        with pytest.raises(PeerError):
            decode(payload)


def test_keys_of_a_handshake_are_read_as_they_were_written() -> None:
    bundles = {"hospital-a": LOW.bundle, "hospital-b": HIGH.bundle}
    assert decode_bundles(encode_bundles(bundles)) == bundles
    assert decode_encapsulated(encode_encapsulated({"hospital-b": SENT})) == {"hospital-b": SENT}


@pytest.mark.parametrize("text", ["\x1b[2J", "two\nlines", "\x9b31m", "\u202eback", "\x00"])
def test_a_peers_sentence_carries_nothing_that_moves_a_terminal(text: str) -> None:
    refusal = Refusal(**COMMON, site="a", request="d" * 64, head=Head(seq=1, sha256="e" * 64), reason="data")
    body = {**refusal.model_dump(mode="json"), "detail": text}
    signature = SITE.sign(messages.ANSWER_DOMAIN, canonical_bytes(body)).hex()
    with pytest.raises(PeerError, match="out of bounds"):
        messages.decode_answer(canonical_bytes({"body": body, "signature": signature}), SITE.public)


def test_the_same_question_is_the_same_bytes() -> None:
    assert messages.encode(TRAIN, COORDINATOR) == messages.encode(TRAIN, COORDINATOR)


def test_a_request_signed_by_anybody_else_is_refused() -> None:
    with pytest.raises(SignatureError):
        messages.decode_request(messages.encode(TRAIN, SITE), COORDINATOR.public)


def test_a_signature_for_an_answer_does_not_serve_as_one_for_a_request() -> None:
    body = TRAIN.model_dump(mode="json")
    signature = COORDINATOR.sign(messages.ANSWER_DOMAIN, canonical_bytes(body)).hex()
    with pytest.raises(SignatureError):
        messages.decode_request(canonical_bytes({"body": body, "signature": signature}), COORDINATOR.public)


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_every_flipped_bit_is_refused(position: int, bit: int) -> None:
    header = bytearray(messages.encode(TRAIN, COORDINATOR))
    header[position % len(header)] ^= 1 << bit
    with pytest.raises(PeerError):
        messages.decode_request(bytes(header), COORDINATOR.public)


@given(st.binary(max_size=2000))
def test_arbitrary_bytes_are_a_peer_error_and_nothing_else(data: bytes) -> None:
    with pytest.raises(PeerError):
        messages.decode_request(data, COORDINATOR.public)


@pytest.mark.parametrize(
    "change",
    [{"round": 0}, {"round": 10**9}, {"round": "3"}, {"round": None}, {"extra": 1}, {"kind": "run-code"}],
)
def test_fields_out_of_bounds_are_refused_even_when_they_are_signed(change: dict[str, object]) -> None:
    body = {**TRAIN.model_dump(mode="json"), **change}
    signature = COORDINATOR.sign(messages.REQUEST_DOMAIN, canonical_bytes(body)).hex()
    with pytest.raises(PeerError):
        messages.decode_request(canonical_bytes({"body": body, "signature": signature}), COORDINATOR.public)


def test_another_spelling_of_the_same_header_is_refused() -> None:
    header = json.dumps(json.loads(messages.encode(TRAIN, COORDINATOR))).encode()
    with pytest.raises(PeerError):
        messages.decode_request(header, COORDINATOR.public)


def test_a_payload_that_the_header_does_not_describe_is_refused() -> None:
    TRAIN.payload.check(b"model")
    with pytest.raises(PeerError):
        TRAIN.payload.check(b"modeL")


def test_a_refusal_carries_only_listed_reasons() -> None:
    with pytest.raises(ValueError, match="reason"):
        Refusal.model_validate({**FROM, "reason": "patient 7"})


STUDIES = sorted(folder / "study.yaml" for folder in task.studies().values())


@pytest.mark.parametrize("file", STUDIES, ids=[file.parent.name for file in STUDIES])
def test_every_sample_study_parses_and_survives_the_wire(file: Path) -> None:
    study = load_yaml(file, Study)
    again = Study.from_contract(json.loads(canonical_bytes(study.contract)))
    assert again == study
    assert again.digest == study.digest == digest(canonical_bytes(study.contract))


def test_a_misspelt_key_is_refused_with_file_line_and_the_nearest_key(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    text = STUDIES[0].read_text().replace("rounds:", "ronuds:", 1)
    file.write_text(text)
    line = next(number for number, content in enumerate(text.splitlines(), 1) if "ronuds" in content)
    with pytest.raises(ConfigurationError, match=rf"study\.yaml:{line}: training\.ronuds: no such key; .*'rounds'"):
        load_yaml(file, Study)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("study: a\nstudy: b\n")
    with pytest.raises(ConfigurationError, match=r"study\.yaml:2: .*twice"):
        load_yaml(file, Study)


def test_a_study_of_more_steps_than_anybody_waits_for_is_refused() -> None:
    contract = load_yaml(STUDIES[0], Study).contract
    long = {**contract["training"], "rounds": 1000, "steps_per_round": 1000}
    Study.from_contract({**contract, "training": long})
    with pytest.raises(PeerError, match="1000000 steps"):
        Study.from_contract({**contract, "training": {**long, "rounds": 1001}})


def test_a_seed_with_privacy_is_refused() -> None:
    study = next(s for s in (load_yaml(file, Study) for file in STUDIES) if s.privacy.mode == "dp")
    contract = {**study.contract, "training": {**study.contract["training"], "seed": 1}}
    with pytest.raises(PeerError, match="seed"):
        Study.from_contract(contract)
