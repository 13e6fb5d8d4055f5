"""The site's supervised programs: agent (no network), SuperNode and courier (outbound connections), the receiver."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from consilium_client.commands import conditions, receiver
from consilium_client.site import Home
from consilium_client.transport.sandbox import without_network
from consilium_client.transport.supernode import LAST_WORD
from consilium_shared.process.process_lock import ProcessLock
from consilium_shared.process.supervisor import CARRIES, Program, Supervisor

if TYPE_CHECKING:
    from consilium_client.site_config import SiteConfig


def up_forever(home: Home, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        ConfigurationError: site.yaml is wrong, the site is not enrolled, or it is served already.
    """
    config = home.config()
    invitation = home.invitation()
    home.agent_socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with ProcessLock(home.root / "run" / "up.lock", f"consilium-site up runs already for {home.root}"):
        prefix = without_network()
        if not prefix:
            say(
                "this system lets nobody start a program without network (unshare). The agent runs with it and is "
                "held back by its own guard alone; under systemd, PrivateNetwork=yes does the same"
            )
        port = str(_free_port())
        python = sys.executable
        place = ["--home", str(home.root)]
        supervisor = Supervisor(home.logs, say)
        supervisor.add(Program("agent", [*prefix, python, "-m", "consilium_client.agent", *place]))
        supervisor.add(
            Program(
                "supernode",
                [
                    *(python, "-m", "consilium_client.transport.supernode", *place, "--runtime-port", port),
                    *("--superlink", f"{invitation.address}:{invitation.port}"),
                ],
                CARRIES,
                last_word=LAST_WORD,
            )
        )
        supervisor.add(
            Program(
                "courier",
                [python, "-m", "consilium_client.transport.courier", *place, "--runtime-port", port],
                CARRIES,
                # The SuperNode would wait a minute for a dead courier's task; started anew it is asked again at once.
                takes_down="supernode",
            )
        )
        for program in receiving(home, config):
            supervisor.add(program)
        say(f"site {config.site} serves federation {invitation.name} at {invitation.address}:{invitation.port}")
        conditions.watch(home, f"{invitation.name}, site {config.site}", config.notify, say)
        supervisor.run()


def receiving(home: Home, config: SiteConfig) -> list[Program]:
    """The receiver of images as a program, where site.yaml has one and leaves it to nobody else."""
    receive = None if config.intake is None else config.intake.receive
    if receive is None or receive.unit:
        return []
    command = [sys.executable, "-m", "consilium_client.commands.receiver", "--home", str(home.root)]
    return [Program("receiver", command, last_word=receiver.LAST_WORD)]


def _free_port() -> int:
    """A loopback port for the SuperNode's runtime interface, which is between these two programs only."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
