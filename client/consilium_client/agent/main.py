"""Agent of a site: composition root and socket services. Holds data, keys, policy and ledger; needs no network.

Started by ``consilium-site up`` as ``python -m consilium_client.agent --home HOME``.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from consilium_client.agent.administration import Administration
from consilium_client.agent.requests import RequestHandler
from consilium_client.agent.study_service import StudyService
from consilium_client.site import Home
from consilium_client.state import instance
from consilium_client.state.data_claims import Claims
from consilium_client.transport.agent_socket import serve, serve_admin
from consilium_client.transport.sandbox import forbid_network
from consilium_shared.errors import ConsiliumError
from consilium_shared.process import logs

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")

log = logging.getLogger("consilium.agent")

BAD_START = 78
"""Exit status: the site's own files do not allow a start (EX_CONFIG of sysexits.h)."""

LEDGER_BROKEN = 1
"""Exit status: an entry of the ledger could not be written."""

HOUR = 3600.0
"""Seconds between two looks for studies of which nothing has been heard for ``policy.quiet_days``."""


def run(home: Home) -> None:
    """Serve the coordinator's requests and the site's commands, on two sockets, until SIGTERM or SIGINT."""
    forbid_network()
    home.agent_socket.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    service = StudyService(home)
    claims = Claims(service.config, home.root)
    instance.note(home)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    # Two sockets, two handlers: the site's own people, and the courier with what the coordinator asks.
    admin = serve_admin(home.admin_socket, ending_when_broken(service, Administration(service).handle))
    exchange = serve(home.agent_socket, ending_when_broken(service, warming(RequestHandler(service).handle, _warm)))
    log.info("site %s serves; ledger has %d entries", service.site, service.ledger.head.seq)
    end_quiet = ending_when_broken(service, service.leftovers.end_quiet)
    while not stop.wait(HOUR):
        end_quiet(service.config.policy.quiet_days)
    exchange.stop(grace=None)
    admin.stop(grace=None)
    service.close()
    claims.release()
    log.info("stopped")
    os._exit(0)  # a training in flight has no clean end; its charge stands in full


def ending_when_broken(
    service: StudyService, handle: Callable[Arguments, Answer], end: Callable[[int], object] = os._exit
) -> Callable[Arguments, Answer]:
    """Wrap a handler: once the ledger can no longer be written, the process ends with status 1.

    An agent without a ledger can only refuse. Started again by its supervisor it reads the file anew, recovers a torn
    last line, and goes on or says what is wrong.
    """

    def guarded(*arguments: Arguments.args, **named: Arguments.kwargs) -> Answer:
        try:
            return handle(*arguments, **named)
        finally:
            if service.ledger.broken is not None:
                log.error("the ledger %s; this agent ends, to be started again", service.ledger.broken)
                end(LEDGER_BROKEN)

    return guarded


def warming(handle: Callable[Arguments, Answer], warm: Callable[[], object]) -> Callable[Arguments, Answer]:
    """Wrap a handler: its first call also starts ``warm`` in a thread. Until a study comes an idle site stays small."""
    begun = threading.Lock()

    def handled(*arguments: Arguments.args, **named: Arguments.kwargs) -> Answer:
        if begun.acquire(blocking=False):  # never released: once
            threading.Thread(target=warm, daemon=True).start()
        return handle(*arguments, **named)

    return handled


def _warm() -> None:
    """Import what training needs before the first round asks for it: some seconds and 400 MiB, torch's for the most."""
    importlib.import_module("consilium_client.training.trainer")
    importlib.import_module("consilium_client.data.table")
    importlib.import_module("consilium_shared.privacy.composition")
    log.info("ready to train")


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="consilium_client.agent", description="Start the site's agent.")
    parser.add_argument("--home", type=Path, required=True)
    options = parser.parse_args(arguments)
    os.umask(0o077)
    logs.configure()
    try:
        run(Home(options.home))
    except ConsiliumError as error:
        log.error("%s", error)
        return BAD_START
    return 0
