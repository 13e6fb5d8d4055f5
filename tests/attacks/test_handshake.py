"""Two sites agree on a secret, or one of them notices; whoever stands between them has none."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest
from tests.support.sums import Federation

from consilium_shared.canonical import digest
from consilium_shared.errors import PeerError, SignatureError
from consilium_shared.secagg import handshake
from consilium_shared.secagg.handshake import Bundle, Encapsulated, SessionKeys, decode_bundles, encode_bundles

LOW, HIGH, THIRD = "site-00", "site-01", "site-02"


@pytest.fixture
def sent(four: Federation) -> tuple[Encapsulated, bytes]:
    """What the lower site sends to the higher one, and the secret."""
    return four.session[LOW].encapsulate(HIGH, four.session[HIGH].bundle, four.public[HIGH])


def opened(federation: Federation, sent: Encapsulated, keys: SessionKeys | None = None, peer: str = LOW) -> bytes:
    """What the higher site makes of it."""
    keys = keys or federation.session[HIGH]
    return keys.decapsulate(peer, federation.session[peer].bundle, sent, federation.public[peer])


def test_both_ends_have_the_same_secret_and_a_fresh_one_every_time(
    four: Federation, sent: tuple[Encapsulated, bytes]
) -> None:
    again = four.session[LOW].encapsulate(HIGH, four.session[HIGH].bundle, four.public[HIGH])
    assert opened(four, sent[0]) == sent[1] and opened(four, again[0]) == again[1] != sent[1]
    assert len(sent[1]) == 32


def test_the_keys_of_a_study_are_the_same_after_a_restart(four: Federation, sent: tuple[Encapsulated, bytes]) -> None:
    restarted = four.session_keys(HIGH)
    assert restarted.bundle == four.session[HIGH].bundle
    assert opened(four, sent[0], restarted) == sent[1]


SWAPS: dict[str, Callable[[Bundle, Bundle], dict[str, Any]]] = {
    "agreement": lambda _, other: {"agreement": other.agreement},
    "encapsulation": lambda _, other: {"encapsulation": other.encapsulation},
    "signature": lambda _, other: {"signature": other.signature},
    "all": lambda _, other: other.model_dump(),
}


@pytest.mark.parametrize("swap", SWAPS)
def test_a_bundle_in_which_anything_is_another_sites_is_refused_at_both_ends(
    four: Federation, sent: tuple[Encapsulated, bytes], swap: str
) -> None:
    high, low, third = (four.session[site].bundle for site in (HIGH, LOW, THIRD))
    with pytest.raises(SignatureError):
        four.session[LOW].encapsulate(HIGH, high.model_copy(update=SWAPS[swap](high, third)), four.public[HIGH])
    with pytest.raises(SignatureError):
        mixed = low.model_copy(update=SWAPS[swap](low, third))
        four.session[HIGH].decapsulate(LOW, mixed, sent[0], four.public[LOW])


@pytest.mark.parametrize("change", [{"study": digest(b"another study")}, {"roster": digest(b"another roster")}])
def test_keys_of_another_study_or_roster_are_refused(
    four: Federation, sent: tuple[Encapsulated, bytes], change: dict[str, str]
) -> None:
    other = four.session_keys(HIGH, **change)
    with pytest.raises(SignatureError):
        four.session[LOW].encapsulate(HIGH, other.bundle, four.public[HIGH])
    with pytest.raises(SignatureError):
        opened(four, sent[0], other)


def test_a_bundle_is_of_one_site_one_study_and_one_roster_whoever_has_the_identity(four: Federation) -> None:
    bundle, public = four.session[HIGH].bundle, four.public[HIGH]
    study, roster = digest(b"study"), digest(four.about.encode())
    bundle.verify(study, roster, HIGH, public)
    for wrong in ((roster, roster, HIGH), (study, study, HIGH), (study, roster, THIRD)):
        with pytest.raises(SignatureError):
            bundle.verify(*wrong, public)


def test_an_encapsulation_for_somebody_else_or_of_somebody_else_is_refused(four: Federation) -> None:
    to_third, _ = four.session[LOW].encapsulate(THIRD, four.session[THIRD].bundle, four.public[THIRD])
    from_high, _ = four.session[HIGH].encapsulate(THIRD, four.session[THIRD].bundle, four.public[THIRD])
    with pytest.raises(SignatureError):
        opened(four, to_third)
    with pytest.raises(SignatureError):
        opened(four, from_high, four.session[THIRD], LOW)


def test_two_encapsulations_do_not_mix(four: Federation, sent: tuple[Encapsulated, bytes]) -> None:
    again, _ = four.session[LOW].encapsulate(HIGH, four.session[HIGH].bundle, four.public[HIGH])
    with pytest.raises(SignatureError):
        opened(four, sent[0].model_copy(update={"ciphertext": again.ciphertext}))
    with pytest.raises(SignatureError):
        opened(four, sent[0].model_copy(update={"signature": again.signature}))


@pytest.mark.parametrize("change", [{"study": digest(b"another study")}, {"roster": digest(b"another roster")}])
def test_an_encapsulation_for_another_study_or_roster_is_refused_even_if_the_keys_were_the_same(
    four: Federation, sent: tuple[Encapsulated, bytes], change: dict[str, str]
) -> None:
    low, high = four.session_keys(LOW, **change), four.session_keys(HIGH, **change)
    assert high.bundle.encapsulation == four.session[HIGH].bundle.encapsulation
    with pytest.raises(SignatureError):
        high.decapsulate(LOW, low.bundle, sent[0], four.public[LOW])


def test_an_encapsulation_under_a_sites_earlier_keys_is_refused(
    four: Federation, sent: tuple[Encapsulated, bytes]
) -> None:
    """A site that lost its store makes new keys; nothing that was made for the old ones is taken."""
    renewed = SessionKeys(bytes(range(32)), digest(b"study"), digest(four.about.encode()), HIGH, four.identities[HIGH])
    with pytest.raises(SignatureError):
        opened(four, sent[0], renewed)


def test_the_lower_site_encapsulates_and_never_the_higher_one(
    four: Federation, sent: tuple[Encapsulated, bytes]
) -> None:
    for peer in (LOW, HIGH):
        with pytest.raises(PeerError, match="not above"):
            four.session[HIGH].encapsulate(peer, four.session[peer].bundle, four.public[peer])
        with pytest.raises(PeerError, match="not below"):
            four.session[LOW].decapsulate(peer, four.session[peer].bundle, sent[0], four.public[peer])


def test_what_was_sent_is_worthless_without_the_higher_sites_ml_kem_key(
    four: Federation, sent: tuple[Encapsulated, bytes]
) -> None:
    """The X25519 keys of both alone do not give the secret."""
    half = four.session_keys(HIGH)
    half._encapsulation = four.session[THIRD]._encapsulation
    assert opened(four, sent[0], half) != sent[1]


def test_what_was_sent_is_worthless_without_the_higher_sites_x25519_key(
    four: Federation, sent: tuple[Encapsulated, bytes]
) -> None:
    half = four.session_keys(HIGH)
    half._agreement = four.session[THIRD]._agreement
    assert opened(four, sent[0], half) != sent[1]


def test_an_ml_kem_key_that_is_none_is_refused_even_with_a_right_signature(four: Federation) -> None:
    """FIPS 203, section 7.2: coefficients of 3329 and more."""
    keys = four.session_keys(HIGH)
    text = base64.b64encode(b"\xff" * handshake.PUBLIC_BYTES).decode()
    study, roster = digest(b"study"), digest(four.about.encode())
    signed = handshake._bundled(study, roster, HIGH, keys.bundle.agreement, text)
    signature = four.identities[HIGH].sign(handshake.BUNDLE_DOMAIN, signed).hex()
    bundle = Bundle(agreement=keys.bundle.agreement, encapsulation=text, signature=signature)
    with pytest.raises(PeerError, match="ML-KEM key of no use"):
        four.session[LOW].encapsulate(HIGH, bundle, four.public[HIGH])


SPELLINGS: list[Callable[[str], str]] = [
    lambda text: text[:-4],
    lambda text: text + "AAAA",
    lambda text: "*" + text[1:],
    lambda text: " " + text,
    lambda text: text[:-2] + chr(ord(text[-2]) + 1) + "=",  # only bits that are thrown away
]


@pytest.mark.parametrize("change", SPELLINGS)
def test_a_key_of_another_length_or_spelling_is_refused(four: Federation, change: Callable[[str], str]) -> None:
    bundle = four.session[HIGH].bundle
    wrong = bundle.model_copy(update={"encapsulation": change(bundle.encapsulation)})
    with pytest.raises(PeerError):
        decode_bundles(encode_bundles({HIGH: wrong}))
