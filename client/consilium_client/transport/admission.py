"""Question to the server whether it takes this site's SuperNode key, and what the server is, as its gate answers it.

The gate of the SuperLink answers 401 to a request that no registered key has signed, from its headers alone. A path
of its own is asked for, so that nothing is done behind the gate; and first with a key that nobody has, for a server
without such a gate answers both alike. Whom it takes it tells its release, and the formats that it speaks.

Leans on how flwr 1.41 (pinned) signs a SuperNode's requests: the names of the headers, and ECDSA with SHA-256 over the
time. They stand here by value, since importing flwr takes a second and has effects of its own.
"""

from __future__ import annotations

import json
import ssl
from base64 import b64encode
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import ValidationError

from consilium_client.transport.way_out import connection
from consilium_shared.protocol.joining import Formats

PATH = "/v1/fleet/consilium-doctor"
HEADERS = "flwr-timestamp", "flwr-public-key", "flwr-signature"
REFUSED = 401
ANSWER_BYTES = 4096


@dataclass(frozen=True)
class Answer:
    """The server's answer to a signed question.

    Attributes:
        taken: whether it takes requests that are signed with this key; None where its answers do not tell.
        release: of the server; None where it does not say.
        formats: that the server speaks; None where it does not say.
    """

    taken: bool | None
    release: str | None = None
    formats: Formats | None = None


def ask(address: str, port: int, context: ssl.SSLContext, key: ec.EllipticCurvePrivateKey) -> Answer:
    """Ask the server whether it takes this key.

    Raises:
        OSError, http.client.HTTPException: it cannot be reached.
        ConfigurationError: the environment names a proxy that cannot be used.
    """
    if _answer(address, port, context, ec.generate_private_key(key.curve))[0] != REFUSED:
        return Answer(None)
    status, body = _answer(address, port, context, key)
    return Answer(status != REFUSED, *_about(body))


def _answer(address: str, port: int, context: ssl.SSLContext, key: ec.EllipticCurvePrivateKey) -> tuple[int, bytes]:
    asking = connection(address, port, context)
    try:
        asking.request("POST", PATH, headers=signed(key, datetime.now(UTC)))
        answer = asking.getresponse()
        return answer.status, answer.read(ANSWER_BYTES)
    finally:
        asking.close()


def _about(body: bytes) -> tuple[str | None, Formats | None]:
    try:
        told: Any = json.loads(body)
        return str(told["consilium"])[:40], Formats.model_validate(told["formats"]["protocol"])
    except (ValueError, KeyError, TypeError, ValidationError):
        return None, None


def signed(key: ec.EllipticCurvePrivateKey, now: datetime) -> dict[str, str]:
    """Headers by which a request is a SuperNode's."""
    stamp = now.isoformat()
    pem = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    public = key.public_key().public_bytes(*pem)
    signature = key.sign(stamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    values = stamp, b64encode(public).decode("ascii"), b64encode(signature).decode("ascii")
    return dict(zip(HEADERS, values, strict=True))
