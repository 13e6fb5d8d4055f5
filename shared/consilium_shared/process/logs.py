"""Logs: one line per event, one format for every program, nothing below INFO from anybody."""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"


def configure() -> None:
    """Log to standard error, which the supervisor keeps in the program's own file."""
    logging.basicConfig(level=logging.INFO, format=FORMAT)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request
    take_over_flower()


def take_over_flower() -> None:
    """Send Flower's log lines through ours. Its logger brings a coloured handler and lets DEBUG through.

    Call it again after Flower was imported, which sets its logger up anew.
    """
    flower = logging.getLogger("flwr")
    flower.handlers.clear()
    flower.setLevel(logging.INFO)
