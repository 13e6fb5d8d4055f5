"""The SuperLink: Flower's message store, started so that hospitals reach the fleet interface and nothing else.

    python -m consilium_server.superlink --home HOME --public-host 0.0.0.0 --public-port 8443 --private-port 8444

Two TLS listeners over one application and one SQLite file (HOME/superlink/state.db):

    public    /v1/fleet/* and /health; every request authenticated by a registered SuperNode key, of bounded size
    private   127.0.0.1 only: /v1/control/* (bearer token) and /v1/runtime/* (secret for acquiring tasks)

Leans on these internals of flwr 1.41 (pinned; tests/federation/test_transport.py is the smoke test):
``flwr.superlink.main.create_app`` with ``SuperLinkLifespanConfig`` and ``SuperLinkLifespan``; the
``ControlAuthnPlugin`` interface; ``fleet_handlers.push_messages``, looked up in its module by the router for each
request; ``ControlHttpClient`` and its protobuf requests. flwr is imported only after its environment is set.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hmac
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilium_server.superlink_settings import SuperLinkSettings, prepare, set_flower_environment
from consilium_server.superlink_store import keep_small, prepare_store
from consilium_shared import logs
from consilium_shared.errors import ConfigurationError, ConsiliumError, TransportError

if TYPE_CHECKING:
    import httpx
    from flwr.supercore.control.control_http_client import ControlHttpClient

__all__ = [
    "SuperLinkSettings",
    "node_names",
    "online_nodes",
    "open_control",
    "prepare",
    "register_nodes",
    "run",
    "set_flower_environment",
    "wait_until_ready",
]

logger = logging.getLogger(__name__)

PUBLIC_PATHS = ("/v1/fleet/", "/health")
PRIVATE_PATHS = ("/v1/control/", "/v1/runtime/", "/health")
PUBLIC_REQUEST_BYTES = 8 * 1024**2
"""Largest request of a site: Flower cuts arrays into pieces of 5 MiB, everything else is far smaller."""


def run(settings: SuperLinkSettings) -> None:
    """Run the SuperLink until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: as for ``prepare``, or a port is in use.
    """
    os.umask(0o077)  # the database holds models and updates
    prepare(settings)
    set_flower_environment(settings)
    asyncio.run(_serve(settings))


async def _serve(settings: SuperLinkSettings) -> None:
    import uvicorn
    from anyio.to_thread import current_default_thread_limiter

    # One request at a time works on the database. SQLite has one writer: forty threads wait for its lock in turns
    # of up to 5 s (measured: four times slower), and some of them in vain, which a SuperNode answers by exiting.
    current_default_thread_limiter().total_tokens = 1
    application = _application(settings)

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # two servers in one process: the signals are handled once, below

    def server(host: str, port: int, app: Any, lifespan: Any) -> uvicorn.Server:
        configuration = uvicorn.Config(
            app,
            host=host,
            port=port,
            lifespan=lifespan,
            ssl_certfile=str(settings.certificate),
            ssl_keyfile=str(settings.private_key),
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=3,
        )
        return Server(configuration)

    servers = [
        server("127.0.0.1", settings.private_port, OnlyPaths(application, PRIVATE_PATHS), "on"),
        server(
            settings.public_host,
            settings.public_port,
            OnlyPaths(application, PUBLIC_PATHS, request_bytes=PUBLIC_REQUEST_BYTES),
            "off",
        ),
    ]

    def stop() -> None:
        for each in servers:
            each.should_exit = True

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)

    async def serve_until_one_ends(each: uvicorn.Server) -> None:
        try:
            await each.serve()
        except SystemExit:  # uvicorn's way to say that the port is taken; it has logged which
            raise ConfigurationError(f"Cannot listen on {each.config.host}:{each.config.port}.") from None
        finally:
            stop()

    sweeping = asyncio.create_task(keep_small(settings.database))
    try:
        await asyncio.gather(*(serve_until_one_ends(each) for each in servers))
    finally:
        sweeping.cancel()


def _application(settings: SuperLinkSettings) -> Any:
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app

    files = (settings.ca_certificate, settings.certificate, settings.private_key)
    ca, certificate, key = (path.read_bytes() for path in files)
    configuration = SuperLinkLifespanConfig(
        host="127.0.0.1",
        port=settings.private_port,
        insecure=False,
        certificates=(ca, certificate, key),
        ssl_ca_certfile=str(files[0]),
        ssl_certfile=str(files[1]),
        ssl_keyfile=str(files[2]),
        database=str(settings.database),
        isolation="process",
        superexec_auth_secret=settings.superexec_secret(),
        authn_plugin=_bearer_plugin(settings.control_token()),
        enable_supernode_auth=True,
        runtime_dependency_install=False,
        simulation=False,
        control_address="127.0.0.1:0",
        health_server_address=None,
        event_log_plugin=None,
        fleet_event_log_plugin=None,
        enable_event_log=False,
        artifact_provider=None,
        fleet_api_type="grpc-rere",
        fleet_api_address=None,
    )
    prepare_store(settings.database)
    refuse_foreign_senders()
    logs.take_over_flower()
    return create_app(configuration, SuperLinkLifespan)


class OnlyPaths:
    """ASGI wrapper: 404 for every path outside ``prefixes``, 413 for a request body above ``request_bytes``."""

    def __init__(self, app: Any, prefixes: tuple[str, ...], *, request_bytes: int | None = None) -> None:
        self._app = app
        self._prefixes = prefixes
        self._request_bytes = request_bytes

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        if not any(path == each or (each.endswith("/") and path.startswith(each)) for each in self._prefixes):
            await _refuse(send, 404)
            return
        if self._request_bytes is not None:
            headers = dict(scope["headers"])
            declared = headers.get(b"content-length", b"0")
            # Without a declared length a body could grow in memory before anyone counts it.
            if b"transfer-encoding" in headers or not declared.isdigit():
                await _refuse(send, 411)
                return
            if int(declared[:20]) > self._request_bytes:
                await _refuse(send, 413)
                return
        await self._app(scope, receive, send)


async def _refuse(send: Any, status: int) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})


def refuse_foreign_senders() -> None:
    """Make the fleet interface refuse a reply whose sender is not the SuperNode that authenticated the request.

    Stock Flower compares the sender with the addressee of the question, not with the key that signed the request,
    so that one site could answer in another's name.
    """
    from flwr.supercore.error import ApiErrorCode, FlowerError
    from flwr.superlink.servicer.fleet import fleet_handlers

    stock = fleet_handlers.push_messages

    def push_messages(request: Any, state: Any) -> Any:
        if any(message.metadata.src_node_id != request.node.node_id for message in request.messages_list):
            raise FlowerError(ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED, "the reply names another node as its sender")
        return stock(request=request, state=state)

    fleet_handlers.push_messages = push_messages


def _bearer_plugin(token: str) -> Any:
    from flwr.common.constant import ACCESS_TOKEN_KEY
    from flwr.superlink.auth_plugin.noop_auth_plugin import NoOpControlAuthnPlugin

    class BearerToken(NoOpControlAuthnPlugin):
        """One account, and only for whoever can read the token file."""

        def validate_tokens_in_metadata(self, metadata: Any) -> Any:
            presented = dict(metadata).get(ACCESS_TOKEN_KEY, "")
            raw = presented if isinstance(presented, bytes) else str(presented).encode()
            if not hmac.compare_digest(raw, token.encode()):
                return False, None
            return super().validate_tokens_in_metadata(metadata)

        def refresh_tokens(self, metadata: Any) -> Any:
            return None, None

    return BearerToken()


# --- the coordinator's own processes, as clients of the private side ---


@contextlib.contextmanager
def open_control(settings: SuperLinkSettings) -> Iterator[ControlHttpClient]:
    """A client of the Control interface; failures of the network and refusals become TransportError."""
    set_flower_environment(settings)
    import httpx
    from flwr.supercore.control.control_http_client import ControlHttpClient
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

    token = settings.control_token()

    class Bearer:
        def intercept(self, context: Any, call_next: Any) -> httpx.Response:
            context.request.headers["authorization"] = f"Bearer {token}"
            response: httpx.Response = call_next(context)
            return response

    client = ControlHttpClient.from_server_address(
        settings.private_address,
        False,
        settings.ca_certificate.read_bytes(),
        [RuntimeVersionHttpInterceptor(component_name="consilium"), Bearer()],
    )
    try:
        yield client
    except httpx.HTTPStatusError as error:
        raise TransportError(f"The SuperLink refused a request (HTTP {error.response.status_code}).") from None
    except httpx.TransportError as error:
        raise TransportError(
            f"The SuperLink does not answer on {settings.private_address} ({type(error).__name__}). "
            "Is `consilium-server up` running?"
        ) from None
    finally:
        client._client.close()


def wait_until_ready(settings: SuperLinkSettings, timeout: float = 30.0) -> None:
    """Wait until the SuperLink answers on its private side.

    Raises:
        TransportError: not within ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            node_names(settings)
        except (TransportError, ConfigurationError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def node_names(settings: SuperLinkSettings) -> dict[str, int]:
    """Site name -> node id of every registered SuperNode."""
    return {node.name: node.node_id for node in _nodes(settings)}


def online_nodes(settings: SuperLinkSettings) -> set[str]:
    """Names of the sites whose SuperNode is connected now."""
    return {node.name for node in _nodes(settings) if node.status == "online"}


def register_nodes(settings: SuperLinkSettings, keys: Mapping[str, bytes]) -> dict[str, int]:
    """Make the SuperLink's list of SuperNodes equal to ``keys``; a second call changes nothing.

    A SuperNode that is not in ``keys`` is unregistered, which is how a site is removed; Flower never takes that
    key again, so such a site enrolls anew.

    Args:
        settings: of the running SuperLink.
        keys: site name -> public ECDSA key (NIST curve), OpenSSH line or PEM.

    Returns:
        Site name -> node id.

    Raises:
        ConfigurationError: no site at all, a key that is not ECDSA, a key used before, or one key for two sites.
        TransportError: the SuperLink does not answer.
    """
    from flwr.proto.control_pb2 import RegisterNodeRequest, UnregisterNodeRequest

    if not keys:
        raise ConfigurationError("The roster names no site; no SuperNode is registered or removed.")
    wanted = {site: _normal_key(site, key) for site, key in keys.items()}
    if len(set(wanted.values())) != len(wanted):
        raise ConfigurationError("Two sites of the roster have the same SuperNode key. Enroll one of them anew.")
    registered: dict[str, int] = {}
    known = {(node.name, node.public_key): node.node_id for node in _nodes(settings)}
    with open_control(settings) as control:
        for (name, key), node_id in known.items():
            if wanted.get(name) == key:
                registered[name] = node_id
            else:
                control.UnregisterNode(UnregisterNodeRequest(node_id=node_id))
                logger.warning("unregistered the SuperNode %r: it is not in the roster", name)
        for site in wanted.keys() - registered.keys():
            request = RegisterNodeRequest(public_key=wanted[site], name=site)
            registered[site] = _register(control, site, request)
    return registered


def _register(control: ControlHttpClient, site: str, request: Any) -> int:
    import httpx

    try:
        return int(control.RegisterNode(request).node_id)
    except httpx.HTTPStatusError as error:
        raise ConfigurationError(
            f"The SuperLink does not take the SuperNode key of {site!r} (HTTP {error.response.status_code}). A key "
            "that was removed once cannot come back: run `consilium-site enroll` with a new key there."
        ) from None


def _nodes(settings: SuperLinkSettings) -> list[Any]:
    from flwr.proto.control_pb2 import ListNodesRequest

    with open_control(settings) as control:
        found = control.ListNodes(ListNodesRequest()).nodes_info
    return [node for node in found if node.status != "unregistered"]


def _normal_key(site: str, key: bytes) -> bytes:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        ssh = key.startswith(b"ecdsa-sha2-")
        public = serialization.load_ssh_public_key(key) if ssh else serialization.load_pem_public_key(key)
    except ValueError:
        public = None
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise ConfigurationError(f"The SuperNode key of {site!r} is not an ECDSA public key.")
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``python -m consilium_server.superlink``; 0 after SIGTERM, 2 on a wrong configuration."""
    parser = argparse.ArgumentParser(prog="consilium_server.superlink", description="Start the SuperLink.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--public-host", default="0.0.0.0")  # noqa: S104 - hospitals connect to it
    parser.add_argument("--public-port", type=int, required=True)
    parser.add_argument("--private-port", type=int, required=True)
    given = parser.parse_args(arguments)
    logs.configure()
    settings = SuperLinkSettings(given.home.resolve(), given.public_host, given.public_port, given.private_port)
    try:
        run(settings)
    except ConsiliumError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
