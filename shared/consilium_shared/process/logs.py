"""Logs: one line per event, one format for every program, nothing below INFO from anybody.

What a library warns of, or an exception that nobody caught says, may quote the data that it was given: of both a log
has the kind and the place.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from types import TracebackType
from typing import TextIO

log = logging.getLogger("consilium.libraries")
_SAID: set[tuple[str, int]] = set()
"""Places that have warned already."""

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def configure() -> None:
    """Log to standard error, which the supervisor keeps in the program's own file."""
    logging.basicConfig(level=logging.INFO, format=FORMAT)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request
    warnings.showwarning = _warned
    sys.excepthook = _raised
    threading.excepthook = lambda about: _raised(about.exc_type, about.exc_value, about.exc_traceback)
    take_over_flower()


def _warned(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    del message, file, line  # pydicom's quotes the value of a tag, a reader of tables a cell
    if (filename, lineno) in _SAID:  # how many there are follows from the data, too
        return
    _SAID.add((filename, lineno))
    log.warning("%s at %s:%d", category.__name__, filename, lineno)


def _raised(kind: type[BaseException], _: BaseException | None, trace: TracebackType | None) -> None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = "?" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
    log.error("%s at %s, which nobody caught", kind.__name__, place)


def take_over_flower() -> None:
    """Send Flower's log lines through ours. Its logger brings a coloured handler and lets DEBUG through.

    Call it again after Flower was imported, which sets its logger up anew.
    """
    flower = logging.getLogger("flwr")
    flower.handlers.clear()
    flower.setLevel(logging.INFO)
