"""The way to the server is told from its first fault, whatever the one who answers says."""

from __future__ import annotations

import datetime
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from consilium_client.transport import connection, way_out
from consilium_client.transport.connection import Way
from consilium_shared import certificates
from consilium_shared.errors import TransportError


def certificate(name: str) -> x509.Certificate:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    named = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = x509.CertificateBuilder(named, named, key.public_key(), 7, now, now + datetime.timedelta(1))
    return made.sign(key, hashes.SHA256())


@pytest.fixture
def way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Way:
    (tmp_path / "ca.crt").write_bytes(certificate("the CA").public_bytes(serialization.Encoding.PEM))
    invitation: Any = type("Invitation", (), {"address": "server.example", "port": 8443})
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    return Way(invitation, tmp_path, tmp_path / "join-request.json")


@pytest.fixture
def proxy() -> Iterator[Any]:
    """(socket of a proxy, its answer as a list of one)."""
    answer = [b""]
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(answer[0])

        threading.Thread(target=serve, daemon=True).start()
        yield listener, answer


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (b"SSH-2.0-x\r\n", "is no HTTP proxy"),
        (b"HTTP/1.1 200 " + b"x" * 70_000 + b"\r\n\r\n", "is no HTTP proxy"),
        (b"HTTP/1.1 403 \x1b[2J\r\n\r\n", "does not let this machine through"),
        (b"", "HTTPS_PROXY names"),
    ],
)
def test_a_proxy_that_answers_anything_is_named(
    way: Way, proxy: Any, said: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener, answer = proxy
    answer[0] = said
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{listener.getsockname()[1]}")
    with pytest.raises(TransportError, match=words) as raised:
        connection.reach(way)
    assert str(raised.value).isprintable()


def test_an_address_that_is_no_name_is_said(way: Way) -> None:
    way.invitation.address = "a..b"
    with pytest.raises(TransportError, match="is not known here"):
        connection.reach(way)


@pytest.mark.parametrize(("old", "new"), [(b"foreign", b"\xff\xfe\xfd\xfc\xfb\xfa\xf9"), (b"", b"x")])
def test_a_certificate_that_cannot_be_read_is_said_and_ends_nothing(
    way: Way, old: bytes, new: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = certificate("foreign").public_bytes(serialization.Encoding.DER).replace(old, new)

    class Sock(ssl.SSLSocket):
        def getpeercert(self, binary_form: bool = False) -> Any:
            return content

    class Shown:
        sock = Sock.__new__(Sock)

        def connect(self) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr(way_out, "connection", lambda *_: Shown())
    error = ssl.SSLCertVerificationError("self-signed")
    error.verify_message = "self-signed certificate"
    assert "ask the coordinator" in connection._untrusted(way, error)
    assert connection._certificate(way).state == "warning"
    with pytest.raises(ValueError, match="no certificate that can be read"):
        certificates.of_stranger(content)


def test_a_strangers_certificate_that_can_be_read_says_whose_it_is() -> None:
    made = certificate("foreign").public_bytes(serialization.Encoding.DER)
    assert certificates.issuer(certificates.of_stranger(made)) == "foreign"
