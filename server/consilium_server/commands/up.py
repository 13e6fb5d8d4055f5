"""The coordinator's supervised programs: the SuperLink, and one process for each study that is wanted."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from consilium_server.commands import conditions
from consilium_server.federation import Home
from consilium_server.state import study_folder
from consilium_server.superlink.control import register_nodes
from consilium_server.superlink.settings import SuperLinkSettings, settings_of
from consilium_server.superlink.start import wait_for_superlink
from consilium_shared.errors import ConsiliumError, TransportError
from consilium_shared.process.process_lock import ProcessLock
from consilium_shared.process.supervisor import CARRIES, Program, Supervisor

LOOK_SECONDS = 0.5


def up_forever(home: Home, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Raises:
        ConfigurationError: it runs already for this home, or the home is not provisioned.
    """
    link = settings_of(home)
    home.roster()  # refuse an edited roster before anything listens
    home.run.mkdir(parents=True, exist_ok=True, mode=0o700)
    with ProcessLock(home.run / "up.lock", f"consilium-server up runs already for {home.root}"):
        supervisor = Supervisor(home.logs, say)
        supervisor.add(
            Program(
                "superlink",
                [
                    *(sys.executable, "-m", "consilium_server.superlink", "--home", str(home.root)),
                    *("--public-host", link.public_host, "--public-port", str(link.public_port)),
                    *("--private-port", str(link.private_port)),
                ],
                CARRIES,
            )
        )
        wait_for_superlink(home.logs / "superlink.log", link, supervisor, say)
        conditions.watch(home, say)
        say(f"sites reach this server at {home.federation().address}:{link.public_port}")
        supervisor.run(_Watch(home, link, supervisor, say).look)


class _Watch:
    """Keeps the SuperLink's node list equal to the roster, and a process for each wanted study."""

    def __init__(self, home: Home, link: SuperLinkSettings, supervisor: Supervisor, say: Callable[[str], None]) -> None:
        self._home = home
        self._link = link
        self._supervisor = supervisor
        self._say = say
        self._registered: tuple[str, int | None] = ("", None)
        self._complained: set[str] = set()
        self._next = 0.0

    def look(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + LOOK_SECONDS
        self._sync_roster()
        for folder in study_folder.all_folders(self._home):
            name = f"study-{folder.name}"
            try:
                wanted = folder.state()[0] in ("wanted", "running")
            except ConsiliumError as error:  # one damaged study does not end the others
                if str(error) not in self._complained:
                    self._complained.add(str(error))
                    self._say(str(error))
                continue
            if wanted and not self._supervisor.has(name):
                command = [sys.executable, "-m", "consilium_server.study", "--home", str(self._home.root)]
                self._supervisor.add(Program(name, [*command, "--study", folder.name], CARRIES, restart=False))

    def _sync_roster(self) -> None:
        try:
            roster = self._home.roster()
            # A SuperLink that starts again may have begun a new list of SuperNodes.
            wanted = (roster.digest, self._supervisor.process("superlink"))
            if wanted == self._registered:
                return
            keys = {member.site: member.supernode.encode() for member in roster.members}
            register_nodes(self._link, keys)
            known, self._registered = self._registered[0], wanted
            if known == roster.digest:
                return
            self._say(f"roster version {roster.version}: {', '.join(keys) or 'no site admitted yet'}")
        except TransportError:
            return  # the SuperLink is starting again; the next look tries anew
        except ConsiliumError as error:
            self._say(str(error))
            self._next = time.monotonic() + 30.0
