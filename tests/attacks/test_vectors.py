"""The primitives, as the protocol uses them, agree with their standards and refuse what an attacker would send."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from tests.support.sums import Federation

from consilium_shared import identity
from consilium_shared.canonical import canonical_bytes
from consilium_shared.errors import PeerError, SignatureError
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.secagg import handshake, keys
from consilium_shared.secagg.handshake import CIPHERTEXT_BYTES, Encapsulated

FOLDER = Path(__file__).parents[1] / "vectors" / "secagg"
ED25519_ORDER = 2**252 + 27742317777372353535851937790883648493


def vectors(name: str) -> list[Any]:
    found: list[Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return found


def raw(text: str) -> bytes:
    return bytes.fromhex(text)


# -- X25519


@pytest.mark.parametrize("vector", vectors("x25519"), ids=lambda vector: vector["source"])
def test_an_agreement(vector: dict[str, Any]) -> None:
    private = X25519PrivateKey.from_private_bytes(raw(vector["private"]))
    if vector["shared"] is not None:
        assert keys.agree(private, raw(vector["public"])) == raw(vector["shared"])
    else:
        with pytest.raises(PeerError, match="of no use"):
            keys.agree(private, raw(vector["public"]))


# -- Ed25519


@pytest.mark.parametrize("vector", vectors("ed25519"), ids=lambda vector: vector["source"])
def test_a_signature_is_the_standards_over_label_and_message(
    vector: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    signer = Identity(Ed25519PrivateKey.from_private_bytes(raw(vector["seed"])))
    assert signer.public.hex() == vector["public"]
    labelled = signer.sign("label", raw(vector["message"]))
    assert labelled == signer._key.sign(b"consilium/1/\x05label" + raw(vector["message"]))
    monkeypatch.setattr(identity, "_labelled", lambda _, data: data)
    assert signer.sign("label", raw(vector["message"])) == raw(vector["signature"])
    signer.public.verify("label", raw(vector["message"]), raw(vector["signature"]))


def scalar_moved(signature: bytes, by: int) -> bytes:
    return signature[:32] + (int.from_bytes(signature[32:], "little") + by).to_bytes(32, "little")


@pytest.mark.parametrize(
    "change",
    [
        lambda s: scalar_moved(s, ED25519_ORDER),  # the same S by another name (RFC 8032, section 5.1.7: S < L)
        lambda s: scalar_moved(s, 8 * ED25519_ORDER),
        lambda s: scalar_moved(s, 1),
        lambda s: bytes(32) + s[32:],
        lambda s: s[:32] + bytes(32),
        lambda s: b"\1" + bytes(63),
        lambda s: s[32:] + s[:32],
        lambda s: s[:63],
        lambda s: s + b"\0",
        lambda _: b"",
        lambda s: s[:31] + bytes([s[31] ^ 0x80]) + s[32:],
    ],
)
def test_a_signature_has_one_form(change: Any) -> None:
    signer = Identity(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    right = signer.sign("label", b"text")
    signer.public.verify("label", b"text", right)
    with pytest.raises(SignatureError):
        signer.public.verify("label", b"text", change(right))


def test_a_signature_is_for_one_label_one_text_and_one_key() -> None:
    """The label's length is signed too: what is cut off the label does not move into the text."""
    signer = Identity(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
    right = signer.sign("label", b"text")
    moved = ("labe", b"ltext"), ("labelt", b"ext"), ("", b"labeltext")
    for domain, text in (*moved, ("label", b"texts"), ("other", b"text"), ("", b"text")):
        with pytest.raises(SignatureError):
            signer.public.verify(domain, text, right)
    with pytest.raises(SignatureError):
        Identity.generate().public.verify("label", b"text", right)


@pytest.mark.parametrize("key", vectors("ed25519-small-order"))
def test_under_a_key_of_small_order_nobodys_signature_counts(key: str) -> None:
    """With R one of these points and S = 0, about every eighth text would verify, or every one."""
    public = PublicIdentity.from_hex(key)
    for point in vectors("ed25519-small-order"):
        for number in range(16):
            with pytest.raises(SignatureError):
                public.verify("label", bytes([number]), raw(point) + bytes(32))


# -- HKDF


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869, sections 2.2 and 2.3."""
    key, block, found = hmac.digest(salt or bytes(32), secret, "sha256"), b"", b""
    for number in range(1, -(-length // 32) + 1):
        block = hmac.digest(key, block + info + bytes([number]), "sha256")
        found += block
    return found[:length]


@pytest.mark.parametrize("vector", vectors("hkdf-sha256"), ids=lambda vector: vector["source"])
def test_a_derived_key_is_hkdf_of_the_secret_and_its_purpose(vector: dict[str, Any]) -> None:
    """``hkdf`` above is the standard's, and ``derive`` is ``hkdf``."""
    given = raw(vector["ikm"]), raw(vector["salt"]), raw(vector["info"])
    assert hkdf(*given, vector["length"]) == raw(vector["okm"])
    info = canonical_bytes(["consilium-secagg/1", "mask", "terms", "update"])
    assert keys.derive(given[0], "mask", "terms", "update") == hkdf(given[0], b"", info, 32)


def test_other_words_give_another_key_wherever_they_are_cut() -> None:
    secret = bytes(range(32))
    words = ("a", "b", "c"), ("a", "bc"), ("ab", "c"), ("abc",), ("a", "c", "b"), ("a", "b", "c", ""), ("a", "b")
    found = [keys.derive(secret, *each) for each in words]
    assert len(set(found)) == len(found)
    assert keys.derive(bytes(32), "a") != keys.derive(secret, "a")


def test_a_stream_is_aes_256_in_counter_mode_from_zero_under_a_key_of_its_own() -> None:
    """Its blocks are the cipher's of 0, 1, 2 …, each computed for itself."""
    secret = bytes(range(32))
    one = Cipher(algorithms.AES256(keys.derive(secret, "shares", "terms")), modes.ECB()).encryptor()
    expected = b"".join(one.update(number.to_bytes(16, "big")) for number in range(3))
    assert keys.stream(secret, 40, "shares", "terms") == expected[:40]
    assert keys.stream(secret, 40, "shares", "others") != expected[:40]


# -- AES-256-GCM


@pytest.mark.parametrize("vector", vectors("aes-256-gcm"), ids=lambda vector: vector["source"])
def test_a_seal(vector: dict[str, Any]) -> None:
    key, text, about, sealed = (raw(vector[name]) for name in ("key", "text", "aad", "sealed"))
    assert raw(vector["nonce"]) == bytes(12)
    assert keys.seal(key, text, about) == sealed
    assert keys.unseal(key, sealed, about) == text


@pytest.mark.parametrize(
    "change",
    [
        lambda key, sealed, about: (key, bytes([sealed[0] ^ 1]) + sealed[1:], about),
        lambda key, sealed, about: (key, sealed[:-1] + bytes([sealed[-1] ^ 0x80]), about),
        lambda key, sealed, about: (key, sealed[:-1], about),
        lambda key, sealed, about: (key, sealed + b"\0", about),
        lambda key, sealed, about: (key, sealed[:-16], about),
        lambda key, sealed, about: (key, sealed[:12], about),
        lambda key, sealed, about: (key, b"", about),
        lambda key, sealed, about: (key, sealed[16:] + sealed[:16], about),
        lambda key, sealed, about: (key, sealed, about + b"\0"),
        lambda key, sealed, about: (key, sealed, b""),
        lambda key, sealed, about: (key[1:] + key[:1], sealed, about),
    ],
)
def test_a_seal_that_was_touched_is_not_opened(change: Any) -> None:
    key, about = bytes(range(32)), b"about"
    sealed = keys.seal(key, b"text of some length", about)
    with pytest.raises(PeerError, match="altered"):
        keys.unseal(*change(key, sealed, about))


# -- ML-KEM-768


@pytest.mark.parametrize("vector", vectors("ml-kem-768"), ids=lambda vector: vector["source"])
def test_a_changed_ciphertext_gives_another_secret_and_no_error(vector: dict[str, Any], four: Federation) -> None:
    """Implicit rejection (FIPS 203, algorithm 18), through the handshake: signed by a liar, it does not agree."""
    key = MLKEM768PrivateKey.from_seed_bytes(raw(vector["seed"]))
    assert hashlib.sha256(key.public_key().public_bytes_raw()).hexdigest() == vector["public_sha256"]
    session = four.session_keys("site-01")
    session._encapsulation = key
    agreed = keys.agree(session._agreement, raw(four.session["site-00"].bundle.agreement))
    found = set()
    for name, shared in (("ciphertext", "shared"), ("rejected", "shared_of_rejected")):
        assert len(raw(vector[name])) == CIPHERTEXT_BYTES
        text = base64.b64encode(raw(vector[name])).decode()
        low, high = (four.session["site-00"].bundle, session.bundle)
        about = (session._study, session._roster, ("site-00", low), ("site-01", high), text)
        transcript = handshake._transcript(*about)
        signature = four.identities["site-00"].sign(handshake.ENCAPSULATION_DOMAIN, transcript.encode()).hex()
        sent = Encapsulated(ciphertext=text, signature=signature)
        secret = session.decapsulate("site-00", low, sent, four.public["site-00"])
        assert secret == keys.derive(agreed + raw(vector[shared]), "session-secret", transcript)
        found.add(secret)
    assert len(found) == 2
