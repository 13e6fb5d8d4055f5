"""The SuperLink: Flower's message store, started so that hospitals reach the fleet interface and nothing else.

    python -m consilium_server.superlink --home HOME --public-host 0.0.0.0 --public-port 8443 --private-port 8444

Two TLS listeners over one application:

    public    /v1/fleet/* and /health; every request authenticated by a registered SuperNode key, of bounded size
    private   127.0.0.1 only: /v1/control/* (bearer token) and /v1/runtime/* (secret for acquiring tasks)

Its state is in memory (``docs/decisions/0030-superlink-in-memory.md``): what was in transit is asked for again after a
restart and answered with the same bytes, runs are started again, and the list of SuperNodes follows the roster.

The order of a start: the lock, the ports, the certificates; so a start that cannot succeed fails before anything is
made. Each failure ends as one line, the last of the log.

Leans on these internals of flwr 1.41 (pinned; tests/federation/test_transport.py is the smoke test):
``flwr.superlink.main.create_app`` with ``SuperLinkLifespanConfig`` and ``SuperLinkLifespan``, which take the objects'
store from ``ObjectStoreFactory``; the
``ControlAuthnPlugin`` interface; ``fleet_handlers.push_messages``, looked up in its module by the router for each
request. flwr is imported only after its environment is set.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import hmac
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from consilium_server.superlink.economy import save_repeated_work
from consilium_server.superlink.gate import OnlyPaths, SignedOnly
from consilium_server.superlink.layers import without_idle_layers
from consilium_server.superlink.presence import Presences
from consilium_server.superlink.renewal import Renewal
from consilium_server.superlink.settings import LAST_WORD, SuperLinkSettings, prepare, set_flower_environment
from consilium_server.superlink.wake import hold_back_empty_answers
from consilium_shared.errors import ConfigurationError, ConsiliumError
from consilium_shared.process import logs
from consilium_shared.process.process_lock import ProcessLock

__all__ = ["SuperLinkSettings", "prepare", "run", "set_flower_environment"]

logger = logging.getLogger(__name__)

PUBLIC_PATHS = ("/v1/fleet/", "/health")
THREADS = 2
"""Requests that are worked on at a time."""
PRIVATE_PATHS = ("/v1/control/", "/v1/runtime/", "/health")


def run(settings: SuperLinkSettings) -> None:
    """Run the SuperLink until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: as for ``prepare``; a port is in use; it runs already.
    """
    os.umask(0o077)
    prepare(settings)
    taken = f"a SuperLink runs already for {settings.home}"
    with ProcessLock(settings.directory / "run.lock", taken), contextlib.ExitStack() as opened:
        private = opened.enter_context(bind("127.0.0.1", settings.private_port))
        public = opened.enter_context(bind(settings.public_host, settings.public_port))
        set_flower_environment(settings)
        allow_many_files()
        logger.info("the ports are free; Flower is being loaded")
        settings.forget_databases()
        import uvloop  # one request costs a tenth less with it

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, private, public))


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket, without listening yet.

    Raises:
        ConfigurationError: the port is taken or reserved, or the address is not one of this machine.
    """
    place = f"{host}:{port}" if ":" not in host else f"[{host}]:{port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        bound = socket.socket(family, kind)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)  # who connects before it also listens is refused, and does not wait
        return bound
    except OSError as error:
        causes = {
            errno.EADDRINUSE: "another program has that port. Stop it, or change `port` or `private_port` in "
            "federation.yaml",
            errno.EACCES: "this account may not use that port; ports below 1024 are the system's",
            errno.EADDRNOTAVAIL: "no interface of this machine has that address. Change `listen` in federation.yaml",
        }
        cause = causes.get(error.errno or 0, error.strerror)
        raise ConfigurationError(f"Cannot listen on {place}: {cause}.") from None


async def _serve(settings: SuperLinkSettings, private: socket.socket, public: socket.socket) -> None:
    import uvicorn
    from anyio.to_thread import current_default_thread_limiter

    # Requests wait for each other's locks anyway; few at a time bound what they hold in memory.
    current_default_thread_limiter().total_tokens = THREADS
    application = _application(settings)

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # two servers in one process: the signals are handled once, below

    def server(app: Any, http: Any, lifespan: Any) -> uvicorn.Server:
        configuration = uvicorn.Config(
            app,
            http=http,
            ws="none",
            lifespan=lifespan,
            proxy_headers=False,
            ssl_certfile=str(settings.certificate),
            ssl_keyfile=str(settings.private_key),
            access_log=False,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=3,
        )
        return Server(configuration)

    def node_of(key: bytes) -> int | None:
        found: int | None = application.state.linkstate_factory.state().get_node_id_by_public_key(key)
        return found

    holding = hold_back_empty_answers(without_idle_layers(application))
    presences = Presences(settings.directory)
    renewal = Renewal(settings.certificate, settings.private_key)
    gate = SignedOnly(OnlyPaths(holding, PUBLIC_PATHS), node_of, presences)
    private_paths = OnlyPaths(holding, PRIVATE_PATHS)
    inside = server(private_paths, "auto", "on")
    outside = server(gate, gate.strangers.protocol(), "off")

    def stop() -> None:
        inside.should_exit = outside.should_exit = True
        holding.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)

    async def until_it_ends(work: Any) -> None:
        try:
            await work
        finally:
            stop()

    beside = [
        asyncio.create_task(presences.keep()),
        asyncio.create_task(
            renewal.keep(lambda: [s.config.ssl for s in (inside, outside) if s.config.ssl is not None])
        ),
    ]
    try:
        await asyncio.gather(
            until_it_ends(inside.serve(sockets=[private])), until_it_ends(outside.serve(sockets=[public]))
        )
    finally:
        for task in beside:
            task.cancel()
    if private_paths.failure is not None:
        raise private_paths.failure


def _application(settings: SuperLinkSettings) -> Any:
    from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
    from flwr.supercore.object_store import ObjectStoreFactory
    from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
    from flwr.superlink.config_loader import SuperLinkLifespanConfig
    from flwr.superlink.main import create_app

    from consilium_server.superlink.objects import ObjectsInTransit  # and with it flwr

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
        database=FLWR_IN_MEMORY_DB_NAME,
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
    objects = ObjectsInTransit(settings.directory)
    ObjectStoreFactory.store = lambda self: objects  # type: ignore[method-assign]
    refuse_foreign_senders()
    save_repeated_work()
    logs.take_over_flower()
    return create_app(configuration, SuperLinkLifespan)


def allow_many_files() -> None:
    """Let this process open as many files as the system permits: each large object in transit is one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


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
        print(f"{LAST_WORD}{error}", file=sys.stderr)
        return 2
    except Exception as error:
        logger.exception("the SuperLink ends")
        # SQL and its parameters stand on the lines after an error's first.
        text = str(error).strip().splitlines() or ["no text"]
        print(f"{LAST_WORD}{type(error).__name__}: {text[0]}", file=sys.stderr)
        return 1
    return 0
