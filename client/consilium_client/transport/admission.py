"""Question to the server whether it takes this site's SuperNode key, as the server's gate answers it.

The gate of the SuperLink answers 401 to a request that no registered key has signed, from its headers alone. A path
that does not exist is asked for, so that nothing is done behind the gate; and first with a key that nobody has, for a
server without such a gate answers both alike.

Leans on how flwr 1.41 (pinned) signs a SuperNode's requests: the names of the headers, and ECDSA with SHA-256 over the
time. They stand here by value, since importing flwr takes a second and has effects of its own.
"""

from __future__ import annotations

import http.client
import ssl
from base64 import b64encode
from datetime import UTC, datetime

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

PATH = "/v1/fleet/consilium-doctor"
HEADERS = "flwr-timestamp", "flwr-public-key", "flwr-signature"
REFUSED = 401


def takes(address: str, port: int, context: ssl.SSLContext, key: ec.EllipticCurvePrivateKey) -> bool | None:
    """True where the server takes requests that are signed with this key; None where its answers do not tell.

    Raises:
        OSError, http.client.HTTPException: it cannot be reached.
    """
    if _status(address, port, context, ec.generate_private_key(key.curve)) != REFUSED:
        return None
    return _status(address, port, context, key) != REFUSED


def _status(address: str, port: int, context: ssl.SSLContext, key: ec.EllipticCurvePrivateKey) -> int:
    connection = http.client.HTTPSConnection(address, port, timeout=10, context=context)
    try:
        connection.request("POST", PATH, headers=signed(key, datetime.now(UTC)))
        return connection.getresponse().status
    finally:
        connection.close()


def signed(key: ec.EllipticCurvePrivateKey, now: datetime) -> dict[str, str]:
    """Headers by which a request is a SuperNode's."""
    stamp = now.isoformat()
    pem = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    public = key.public_key().public_bytes(*pem)
    signature = key.sign(stamp.encode("ascii"), ec.ECDSA(hashes.SHA256()))
    values = stamp, b64encode(public).decode("ascii"), b64encode(signature).decode("ascii")
    return dict(zip(HEADERS, values, strict=True))
