"""Preflight checks: everything that would stop this site, each finding with what to do."""

from __future__ import annotations

from collections.abc import Iterator

from consilium_client.commands.checks import installation, resources
from consilium_client.site import Home
from consilium_client.transport import connection
from consilium_shared.errors import ConsiliumError
from consilium_shared.findings import Finding


def examine(home: Home) -> Iterator[Finding]:
    """Run every check; each finding comes as it is made.

    Raises:
        ConfigurationError: no site has its home there.
    """
    home.check_there()
    yield from installation.look(home)
    yield from resources.assets(home)
    try:
        way = connection.Way(home.invitation(), home.keys, home.request_file)
    except ConsiliumError:
        pass  # said under enrolment: there is no server to call
    else:
        yield from connection.look(way)
    yield from resources.machine(home)
    yield installation.running(home)
    receiver = installation.intake(home)
    if receiver is not None:
        yield receiver
