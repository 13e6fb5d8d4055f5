"""Every decoder: what it takes is what honest ends write, and anything else is one of our own errors, nothing else."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.support.messages import COORDINATOR, SITE, answers, requests, started
from tests.support.mutations import FUZZ, canonical, mutated

from consilium_shared.canonical import canonical_bytes, parse_canonical
from consilium_shared.errors import IntegrityError, PeerError
from consilium_shared.identity import Identity
from consilium_shared.protocol import messages
from consilium_shared.secagg.handshake import decode_bundles, decode_encapsulated, encode_bundles, encode_encapsulated
from consilium_shared.secagg.site import SiteState
from consilium_shared.secagg.terms import Advert, Terms


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
    assert canonical_bytes(read_.model_dump(mode="json", exclude_unset=True)) == data


@FUZZ
@given(mutated(answer_bodies))
def test_an_answer_that_a_site_signed(body: Any) -> None:
    if (data := canonical(body)) is None:
        return
    try:
        read_ = messages.decode_answer(header(data, messages.ANSWER_DOMAIN, SITE), SITE.public)
    except PeerError:
        return
    assert canonical_bytes(read_.model_dump(mode="json", exclude_unset=True)) == data


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
