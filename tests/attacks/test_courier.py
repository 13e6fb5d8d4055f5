"""Whoever carries the messages changes nothing in them: any flipped bit is refused before anything else happens."""

from __future__ import annotations

import random
from typing import get_args

import pytest
from tests.support.messages import COORDINATOR, SITE, answers, requests
from tests.support.sums import Federation

from consilium_shared.errors import PeerError, SignatureError
from consilium_shared.protocol import messages
from consilium_shared.schema import SCHEMA
from consilium_shared.secagg.site import sealed_bytes

FLIPS = 150


def flipped(data: bytes, draw: random.Random) -> bytes:
    """The bytes with one bit flipped somewhere."""
    place = draw.randrange(8 * len(data))
    return data[: place // 8] + bytes([data[place // 8] ^ 1 << place % 8]) + data[place // 8 + 1 :]


def test_the_examples_are_all_the_messages_that_there_are() -> None:
    def kinds(union: object) -> set[str]:
        return {each.model_fields["kind"].default for each in get_args(union)}

    assert set(requests()) == kinds(messages.Request) and set(answers()) == kinds(messages.Answer)


@pytest.mark.parametrize("kind", requests())
def test_any_bit_of_a_requests_header_or_payload(kind: str) -> None:
    message, payload = requests()[kind]
    header, draw = messages.encode(message, COORDINATOR), random.Random(kind)
    read = messages.decode_request(header, COORDINATOR.public)
    assert read == message.model_copy(update={"protocol": SCHEMA})
    read.payload.check(payload)
    for _ in range(FLIPS):
        with pytest.raises(PeerError):
            messages.decode_request(flipped(header, draw), COORDINATOR.public)
        with pytest.raises(PeerError):
            read.payload.check(flipped(payload or b"x", draw))


@pytest.mark.parametrize("kind", answers())
def test_any_bit_of_an_answers_header_or_payload(kind: str) -> None:
    message, payload = answers()[kind]
    header, draw = messages.encode(message, SITE), random.Random(kind)
    read = messages.decode_answer(header, SITE.public)
    assert read == message.model_copy(update={"protocol": SCHEMA})
    read.payload.check(payload)
    for _ in range(FLIPS):
        with pytest.raises(PeerError):
            messages.decode_answer(flipped(header, draw), SITE.public)
        with pytest.raises(PeerError):
            read.payload.check(flipped(payload or b"x", draw))


@pytest.mark.parametrize("kind", requests())
def test_what_a_site_signed_is_no_request_and_what_a_coordinator_signed_no_answer(kind: str) -> None:
    header = messages.encode(requests()[kind][0], COORDINATOR)
    with pytest.raises(SignatureError):
        messages.decode_answer(header, COORDINATOR.public)
    with pytest.raises(SignatureError):
        messages.decode_request(header, SITE.public)


def test_any_bit_of_the_sealed_shares_that_a_site_is_handed(four: Federation) -> None:
    """Also from a coordinator, which signs what it likes."""
    attempt, draw = four.sum(), random.Random(1)
    attempt.close()
    part, state, sealed = four.parts["site-00"], attempt.states["site-00"], attempt.total.sealed_for("site-00")
    signed = part.sign(state, attempt.total.survivors, sealed)[0]
    attempt.sign()
    for _ in range(FLIPS):
        wrong = flipped(sealed, draw)
        with pytest.raises(PeerError, match="altered"):
            part.sign(state, attempt.total.survivors, wrong)
        with pytest.raises(PeerError, match="altered"):
            part.release(signed, attempt.total.signatures, wrong)


def test_chunks_of_what_is_sealed_that_are_cut_doubled_or_swapped_are_refused(seven: Federation) -> None:
    attempt, draw = seven.sum(), random.Random(2)
    attempt.close()
    part, state, sealed = seven.parts["site-03"], attempt.states["site-03"], attempt.total.sealed_for("site-03")
    size = sealed_bytes(attempt.terms)
    chunks = [sealed[at : at + size] for at in range(0, len(sealed), size)]
    assert len(chunks) == 6
    for _ in range(30):
        first, second = draw.sample(range(6), 2)
        swapped = list(chunks)
        swapped[first], swapped[second] = swapped[second], swapped[first]
        doubled = [*chunks[:first], chunks[second], *chunks[first + 1 :]]
        cut = sealed[: draw.randrange(len(sealed))]
        for wrong in (b"".join(swapped), b"".join(doubled), cut, cut + bytes(len(sealed) - len(cut))):
            with pytest.raises(PeerError):
                part.sign(state, attempt.total.survivors, wrong)


@pytest.mark.parametrize("field", ["key", "signature"])
def test_any_bit_of_an_advertisement(four: Federation, field: str) -> None:
    attempt, draw = four.sum(), random.Random(3)
    advert = attempt.adverts["site-01"]
    for _ in range(FLIPS):
        changed = flipped(bytes.fromhex(getattr(advert, field)), draw).hex()
        wrong = advert.model_copy(update={field: changed})
        terms = attempt.terms_with(adverts={**attempt.adverts, "site-01": wrong})
        with pytest.raises(PeerError):
            four.parts["site-00"].mask(attempt.states["site-00"], terms)


def test_any_bit_of_a_signature_over_survivors(four: Federation) -> None:
    attempt, draw = four.sum(), random.Random(4)
    attempt.close()
    attempt.sign()
    part, state, sealed = four.parts["site-00"], attempt.states["site-00"], attempt.total.sealed_for("site-00")
    right = attempt.total.signatures
    for _ in range(FLIPS):
        wrong = flipped(right["site-02"], draw)
        with pytest.raises(SignatureError):
            attempt.total.sign("site-02", wrong)
        with pytest.raises(SignatureError):
            part.release(state, {**right, "site-02": wrong}, sealed)
    assert attempt.total.signatures == right


def test_any_bit_of_the_shares_that_open_a_sum(four: Federation) -> None:
    """A changed share gives no other sum: it is found by the commitments, or it did not count."""
    draw = random.Random(5)
    attempt = four.sum()
    attempt.close(*four.names[:3])
    attempt.sign()
    attempt.release()
    for site, right in dict(attempt.total._shares).items():
        for _ in range(FLIPS // 3):
            attempt.total.share(site, flipped(right, draw))
            with pytest.raises(PeerError, match="committed to"):
                attempt.total.open()
        attempt.total.share(site, right)
    attempt.total.open()


def test_any_bit_of_the_part_of_a_contribution_that_opens_it(four: Federation) -> None:
    """Sealed shares and commitments; the masked vector itself is covered by the answer's signature alone."""
    draw = random.Random(6)
    for _ in range(40):
        attempt = four.sum()
        attempt.mask()
        body = attempt.terms.masked_bytes
        sent = attempt.sent["site-01"]
        attempt.sent["site-01"] = sent[:body] + flipped(sent[body:], draw)
        attempt.close(*four.names[:3])
        try:
            attempt.sign()
            attempt.release()
            total = attempt.total.open()
        except PeerError:
            continue
        assert [total[name].tolist() for name in total] == [
            each.tolist() for each in attempt.plain(*four.names[:3]).values()
        ]
