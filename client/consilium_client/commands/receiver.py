"""The receiver as a program that ``consilium-site up`` supervises: ``python -m consilium_client.commands.receiver``.

Its standard error is a log file; where it cannot receive, the last line there says why.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from consilium_client.site import Home
from consilium_shared.errors import ConfigurationError, ConsiliumError
from consilium_shared.printable import printable
from consilium_shared.process import logs

LAST_WORD = "the receiver ends: "


def receive(home: Home, say: Callable[[str], None]) -> None:
    """Receive from those whom site.yaml names, until SIGINT or SIGTERM.

    Raises:
        ConfigurationError: site.yaml has no ``intake.receive``, or the receiver cannot listen there.
    """
    from consilium_client.intake.inbox import Inbox
    from consilium_client.intake.receiver import receive_forever

    settings = home.config().intake
    if settings is None or settings.receive is None:
        raise ConfigurationError(f"{home.config_file}: intake.receive says who may send, and is missing")
    logs.configure()
    receive_forever(settings.receive.at(home.root), Inbox(home.inbox(settings), settings.limits), say)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="consilium_client.commands.receiver", description="Receive images.")
    parser.add_argument("--home", type=Path, required=True)
    options = parser.parse_args(arguments)
    os.umask(0o077)
    try:
        receive(Home(options.home), lambda line: print(line, file=sys.stderr, flush=True))
    except ConsiliumError as error:
        print(f"{LAST_WORD}{printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
