"""Process of one study, a Flower ServerApp: the composition root, and what becomes of each failure.

Started by ``up`` for each wanted study and started again when it dies; it goes on at the round where it stood.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
from pathlib import Path

from consilium_server.federation import Home
from consilium_server.state import study_folder
from consilium_server.study.context import Halted, StudyContext
from consilium_server.study.rounds import StudyRun
from consilium_server.superlink.control import node_names
from consilium_server.superlink.settings import settings_of
from consilium_server.transport.exchange import open_grid
from consilium_shared.errors import ConsiliumError, TransportError
from consilium_shared.process import logs
from consilium_shared.process.process_lock import LockHeld, ProcessLock

log = logging.getLogger("consilium.study")

AGAIN = 75
"""Exit status: the transport failed, start again and resume (EX_TEMPFAIL of sysexits.h)."""


def conduct(home: Home, name: str) -> int:
    """Run one study to its end; returns the exit status (0: nothing more to do, ``AGAIN``: start again)."""
    folder = study_folder.folder(home, name)
    folder.study()
    with ProcessLock(folder.root / "lock", f"study {name} runs already"):
        if folder.state()[0] not in ("wanted", "running"):
            return 0  # stopped between up's look and now
        link = settings_of(home)
        try:
            folder.set_state("running")
            with open_grid(link, folder.root / "run") as grid:
                StudyRun(StudyContext(home, folder, grid, node_names(link), lambda: node_names(link))).run()
        except Halted as halt:
            folder.set_state("stopped", str(halt))
        except TransportError as error:
            log.warning("%s", error)
            return AGAIN
        except ConsiliumError as error:
            folder.set_state("failed", str(error))
            log.error("%s", error)
        except Exception as error:
            folder.set_state("failed", f"a defect of Consilium ({type(error).__name__}); the study's log has the place")
            log.exception("defect")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Command line of the process that ``up`` starts."""
    parser = argparse.ArgumentParser(prog="consilium_server.study", description="Conduct one study.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--study", required=True)
    options = parser.parse_args(arguments)
    os.umask(0o077)
    logs.configure()
    home = Home(options.home)
    try:
        return conduct(home, options.study)
    except (LockHeld, TransportError) as error:  # another process owns the study; leave its state alone
        log.warning("%s", error)
        return AGAIN
    except ConsiliumError as error:
        log.error("%s", error)
        with contextlib.suppress(ConsiliumError):
            study_folder.folder(home, options.study).set_state("failed", str(error))
        return 0
