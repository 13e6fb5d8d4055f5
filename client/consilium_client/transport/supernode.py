"""SuperNode launcher: Flower's site process, with short pauses, and ended when it has lost its server.

    python -m consilium_client.transport.supernode --superlink HOST:PORT --home SITEHOME --runtime-port N

Outbound connections only, except its Runtime interface on 127.0.0.1, which the courier alone can use: TLS with a
certificate made at each start, and a secret that only this account can read. Supervise it with "always restart":

    exit 75   the SuperNode left its main loop (stock Flower would stay alive and do nothing)
    exit 76   its heartbeat to the SuperLink broke for good
    exit 1    refused by the SuperLink (key not admitted, wrong CA), or stopped by it

Leans on these internals of flwr 1.41 (pinned): ``flwr.supernode.cli.flower_supernode`` and its options;
``start_client_internal.time`` and ``.pull_objects``, looked up in that module at each use; ``HeartbeatSender._run``;
``FleetHttpClient.ActivateNode``; ``signal_handler.SIGNAL_TO_EXIT_CODE``; ``NodeAuthHttpInterceptor.intercept``;
``flwr.supernode.main.create_app``, looked up when the Runtime interface starts; ``InMemoryNodeState.store_message`` and
``.store_object``, and that a task is there before its message is stored.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import ipaddress
import logging
import os
import secrets
import signal
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

from consilium_client.transport import connection
from consilium_client.transport.contact import Note
from consilium_shared.errors import ConfigurationError
from consilium_shared.files import write_atomically
from consilium_shared.process import flower_environment, logs
from consilium_shared.protocol import version
from consilium_shared.transport.large import Asked
from consilium_shared.transport.long_polling import Holding, Waits

logger = logging.getLogger(__name__)

POLL_S = 0.2
"""Pause between two looks for a message while a study is active; a site that trains does not look at all."""
IDLE_POLL_S = 1.0
"""Pause when no message came for ``IDLE_AFTER_S``: a hundred idle sites must not keep the SuperLink busy."""
IDLE_AFTER_S = 120.0
HELD_PAUSE_S = 0.01
"""Pause after an answer that was held back: there is something now, or it was held long enough."""
LAST_WORD = "the SuperNode ends: "
"""Begins the last line of its log when it fails: the cause, for ``consilium-site up`` to show."""
RELEASE = "consilium-release"
"""Header that says this site's release to the server's people."""
EXIT_LEFT_LOOP = 75
EXIT_HEARTBEAT = 76


def set_flower_environment(home: Path) -> None:
    """Set the environment of this site's SuperNode and courier."""
    flower_home = home / "run" / "flwr"
    flower_home.mkdir(mode=0o700, parents=True, exist_ok=True)
    flower_environment.set_flower_environment(flower_home)


def runtime_files(home: Path) -> tuple[Path, Path, Path]:
    """(certificate, private key, secret) of the Runtime interface between SuperNode and courier."""
    return home / "run" / "runtime.crt", home / "run" / "runtime.key", home / "run" / "superexec.secret"


def make_runtime_files(home: Path) -> None:
    """Make the Runtime interface's certificate anew, and its secret on the first start; all 0600."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    certificate_file, key_file, secret_file = runtime_files(home)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "consilium runtime")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    write_atomically(key_file, key.private_bytes(pem, *plain))
    write_atomically(certificate_file, certificate.public_bytes(pem))
    if not secret_file.exists():
        write_atomically(secret_file, secrets.token_hex(32).encode("ascii"))


class Polling:
    """Pauses of the SuperNode's loop, in place of ``time``: none where the SuperLink has held its answer back.

    Where it does not, a SuperLink of an earlier release: short ones while there is work, longer ones when idle.
    """

    def __init__(self, waits: Waits) -> None:
        """``waits``: of its looks for a message."""
        self._waits = waits
        self._last_work = time.monotonic()
        self.stored = threading.Event()
        """Set when the courier has stored something."""

    def sleep(self, seconds: float) -> None:
        """Pause. Stock Flower pauses 3 s without a message, and 0.5 s while it waits for the courier's reply."""
        if seconds < 3:
            self._last_work = time.monotonic()
            self.stored.wait(seconds)
            self.stored.clear()  # whoever waits looks again after this
        elif self._waits.held:
            time.sleep(HELD_PAUSE_S)
        else:
            idle = time.monotonic() - self._last_work > IDLE_AFTER_S
            time.sleep(IDLE_POLL_S if idle else POLL_S)


def install_shims(home: Path) -> None:
    """Change what of stock Flower's behaviour does not fit a hospital; see the module's first lines."""
    import httpx
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest
    from flwr.supercore import heartbeat
    from flwr.supercore.exit import ExitCode, signal_handler
    from flwr.supercore.run import RunNotRunningException
    from flwr.supernode import fleet_http_client, start_client_internal

    loop: Any = start_client_internal
    waits = Waits("/v1/fleet/pull-messages")
    polling = Polling(waits)
    loop.time = types.SimpleNamespace(sleep=polling.sleep)
    ask_for_held_answers(waits, Note(home))
    wake_the_courier(polling)
    # A message is announced before all of it is uploaded; stock Flower then waits 1, 2, 4 … 10 s.
    patient = functools.partial(loop.pull_objects, initial_backoff=0.05, backoff_cap=1.0, max_tries_per_object=10_000)

    def pull_whole_or_nothing(*arguments: Any, **named: Any) -> Any:
        # When a run ends in the middle of a message, stock Flower keeps its task, which the courier waits for in vain,
        # and a minute later an error in its place, which goes out instead of the reply to another message.
        try:
            return patient(*arguments, **named)
        except RunNotRunningException:
            raise RuntimeError("the run ended in the middle of a message") from None

    loop.pull_objects = pull_whole_or_nothing

    run = heartbeat.HeartbeatSender._run

    def run_or_die(self: Any) -> None:
        try:
            run(self)
        except BaseException as error:
            logger.error("the heartbeat broke (%s); exiting", type(error).__name__)
            os._exit(EXIT_HEARTBEAT)

    heartbeat.HeartbeatSender._run = run_or_die  # type: ignore[method-assign]

    # SIGINT is how Flower stops itself when the SuperLink no longer knows the key: that is no success.
    signal_handler.SIGNAL_TO_EXIT_CODE[signal.SIGINT] = ExitCode.SUPERNODE_CONNECTION_ERROR

    # After a kill, stock Flower is refused for up to 60 s, until the SuperLink believes that the old process is gone.
    node_file = home / "run" / "node"
    activate = fleet_http_client.FleetHttpClient.ActivateNode

    def activate_again(self: Any, request: Any) -> Any:
        with contextlib.suppress(OSError, ValueError, httpx.HTTPStatusError):
            self.DeactivateNode(DeactivateNodeRequest(node_id=int(node_file.read_text())))
        response = activate(self, request)
        write_atomically(node_file, str(response.node_id).encode("ascii"))
        return response

    fleet_http_client.FleetHttpClient.ActivateNode = activate_again  # type: ignore[method-assign]


def ask_for_held_answers(waits: Waits, note: Note) -> None:
    """Say in each request which release this is, and in each look for a message for how long an answer may be held."""
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    sign = NodeAuthHttpInterceptor.intercept

    release, asked = version.about()["consilium"], Asked()

    def signed(self: Any, context: Any, call_next: Any) -> Any:
        return asked.intercept(context, lambda more: sign(self, more, call_next))

    def intercept(self: Any, context: Any, call_next: Any) -> Any:
        context.request.headers[RELEASE] = release
        answer = waits.intercept(context, lambda more: signed(self, more, call_next))
        if answer.status_code == 200:
            note.answered()
        return answer

    NodeAuthHttpInterceptor.intercept = intercept  # type: ignore[method-assign]


def wake_the_courier(polling: Polling) -> None:
    """Hold the courier's looks for a task until there is one; wake the loop when the courier has stored something."""
    from flwr.supernode import main as runtime
    from flwr.supernode.nodestate import InMemoryNodeState

    make, store_message, store_object = (
        runtime.create_app,
        InMemoryNodeState.store_message,
        InMemoryNodeState.store_object,
    )
    made: list[Holding] = []

    def create_app(*arguments: Any, **named: Any) -> Any:
        made.append(Holding(make(*arguments, **named), {"/v1/runtime/acquire-task": lambda _: "tasks"}))
        return made[-1]

    def stored_message(self: Any, message: Any) -> Any:
        found = store_message(self, message)
        polling.stored.set()
        for holding in made:
            holding.ring()
        return found

    def stored_object(self: Any, *arguments: Any, **named: Any) -> Any:
        found = store_object(self, *arguments, **named)
        polling.stored.set()
        return found

    runtime.create_app = create_app
    InMemoryNodeState.store_message = stored_message  # type: ignore[method-assign]
    InMemoryNodeState.store_object = stored_object  # type: ignore[method-assign]


def take_new_key(home: Path) -> bool:
    """Put a rotated key in the place of the old one as soon as the server takes it; returns whether it did.

    The server knows one key of a site at a time: with the other one this SuperNode is refused, ends, is started again,
    and finds out here.
    """
    fresh = home / "keys" / "supernode.key.new"
    if not fresh.exists() or not connection.takes(home, fresh):
        return False
    fresh.replace(home / "keys" / "supernode.key")
    logger.info("the server takes this site's new SuperNode key; it is in use from now on")
    return True


def run(superlink: str, home: Path, runtime_port: int) -> int:
    """Run the SuperNode; returns the exit status, or never returns (see the module's first lines).

    Raises:
        ConfigurationError: a key file of the site is missing.
    """
    os.umask(0o077)
    take_new_key(home)
    ca, key = home / "keys" / "ca.crt", home / "keys" / "supernode.key"
    for path in (ca, key):
        if not path.is_file():
            raise ConfigurationError(f"{path} is missing; consilium-site doctor says what to do")
    (home / "run").mkdir(mode=0o700, exist_ok=True)
    set_flower_environment(home)
    make_runtime_files(home)
    install_shims(home)
    from flwr.supernode.cli import flower_supernode

    certificate, runtime_key, secret = runtime_files(home)
    sys.argv = [
        "flower-supernode",
        *("--superlink", superlink),
        *("--root-certificates", str(ca)),
        *("--auth-supernode-private-key", str(key)),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(secret)),
        *("--host", "127.0.0.1"),
        *("--port", str(runtime_port)),
        *("--ssl-certfile", str(certificate)),
        *("--ssl-keyfile", str(runtime_key)),
        *("--ssl-ca-certfile", str(certificate)),
    ]
    try:
        logs.take_over_flower()
        flower_supernode()
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    return EXIT_LEFT_LOOP


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``python -m consilium_client.transport.supernode``."""
    parser = argparse.ArgumentParser(
        prog="consilium_client.transport.supernode", description="Start the site's SuperNode."
    )
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--runtime-port", type=int, required=True)
    given = parser.parse_args(arguments)
    logs.configure()
    try:
        status = run(given.superlink, given.home.resolve(), given.runtime_port)
    except ConfigurationError as error:
        print(f"{LAST_WORD}{error}", file=sys.stderr)
        status = 2
    if status not in (0, 2):  # a SuperNode that was told to end gives 0
        cause = connection.cause(given.home.resolve())
        Note(given.home.resolve()).ended(cause)
        print(f"{LAST_WORD}{cause}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the Runtime interface's thread would keep a dead SuperNode alive


if __name__ == "__main__":
    main()
