"""The way out to the coordinator: direct, or through the proxy that the environment names, as the SuperNode goes.

Leans on which variables httpx, by which Flower's SuperNode connects, reads: HTTPS_PROXY, ALL_PROXY and NO_PROXY, in
capitals or not. httpx stands here by its behaviour, since importing it takes half a second.
"""

from __future__ import annotations

import http.client
import ssl
import urllib.parse
import urllib.request
from base64 import b64encode
from dataclasses import dataclass, field

from consilium_shared.errors import ConfigurationError, TransportError
from consilium_shared.printable import printable

SECONDS = 10.0


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy that is asked to connect (CONNECT).

    Attributes:
        authorization: value of the header Proxy-Authorization; None where the environment has no name and password.
    """

    host: str
    port: int
    authorization: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def proxy(address: str) -> Proxy | None:
    """The proxy on the way to an address; None where the way is direct.

    Raises:
        ConfigurationError: the environment names one that cannot be read, or of a kind that is not supported.
    """
    given = urllib.request.getproxies()
    url = given.get("https") or given.get("all")
    if not url or urllib.request.proxy_bypass(address):
        return None
    shape = "HTTPS_PROXY=http://proxy:3128 or http://NAME:PASSWORD@proxy:3128"
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"http://{url}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port, parts = None, None, urllib.parse.urlsplit("")
    if not host:
        raise ConfigurationError(f"HTTPS_PROXY (or ALL_PROXY) cannot be read as an address; write {shape}")
    if parts.scheme != "http":
        raise ConfigurationError(
            f"HTTPS_PROXY (or ALL_PROXY) names a proxy of the kind {parts.scheme}://, and only http:// will do: {shape}"
        )
    authorization = None
    if parts.username is not None:
        secret = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
        authorization = f"Basic {b64encode(secret.encode()).decode('ascii')}"
    return Proxy(host, port or 80, authorization)


def connection(address: str, port: int, context: ssl.SSLContext) -> http.client.HTTPSConnection:
    """An HTTPS connection to the server, not yet made; on the way that the SuperNode would take.

    Raises:
        ConfigurationError: the environment names a proxy that cannot be used.
    """
    between = proxy(address)
    if between is None:
        return http.client.HTTPSConnection(address, port, timeout=SECONDS, context=context)
    made = http.client.HTTPSConnection(between.host, between.port, timeout=SECONDS, context=context)
    headers = {} if between.authorization is None else {"Proxy-Authorization": between.authorization}
    made.set_tunnel(address, port, headers)
    return made


def refused_by(between: Proxy, error: Exception) -> TransportError:
    """The cause of a failed CONNECT, with what to do."""
    text = str(error)
    if "Tunnel connection failed: 407" in text:
        what = "refuses this name or password" if between.authorization else "asks for a name and a password"
        return TransportError(
            f"the proxy {between} {what} (407): write HTTPS_PROXY=http://NAME:PASSWORD@{between} where the programs "
            "start (in the unit: Environment=, in a file of mode 0600); it must take them by Basic"
        )
    if "Tunnel connection failed" in text:
        said = printable(text.partition("failed: ")[2])
        return TransportError(
            f"the proxy {between} does not let this machine through ({said}): ask the network "
            "team to permit CONNECT to the server's address and port"
        )
    if isinstance(error, http.client.HTTPException):
        return TransportError(
            f"{between}, which HTTPS_PROXY names, answers and is no HTTP proxy ({type(error).__name__}): correct it"
        )
    why = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
    return TransportError(
        f"the proxy {between} that HTTPS_PROXY names does not answer ({why}): "
        "correct HTTPS_PROXY, or name the server in NO_PROXY where the way is direct"
    )
