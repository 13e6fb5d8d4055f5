"""Preflight: what would stop this site, found before a study does, each finding with what to do."""

from __future__ import annotations

import shutil
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from consilium_client.network import without_network
from consilium_client.site import Home
from consilium_client.store import read_ledger
from consilium_shared.errors import ConsiliumError

FREE_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Finding:
    """One check. ``state``: ok, warning (it works, less well), or error (it does not work)."""

    check: str
    state: str
    detail: str


def examine(home: Home) -> Iterator[Finding]:
    """Every check, as it is done."""
    yield _try("enrolment", lambda: f"federation {home.invitation().name}, site {home.invitation().site}")
    yield _try("site.yaml", lambda: _config(home))
    yield _try("keys", lambda: home.identity().public.fingerprint)
    yield from _assets(home)
    yield _try("coordinator", lambda: _reach(home))
    yield _try("ledger", lambda: _ledger(home))
    yield _network()
    yield _disk(home.root)
    yield _try("device", lambda: _device(home))


def _try(check: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(check, "ok", look())
    except ConsiliumError as error:
        return Finding(check, "error", str(error))


def _config(home: Home) -> str:
    config = home.config()
    missing = sorted(set(config.assets) - set(config.policy.budgets))
    note = f"; no budget, so of no use yet: {', '.join(missing)}" if missing else ""
    return f"{len(config.assets)} assets, {len(config.policy.budgets)} budgets{note}"


def _assets(home: Home) -> Iterator[Finding]:
    try:
        config = home.config()
    except ConsiliumError:
        return
    for name, asset in sorted(config.assets.items()):
        placed = asset.at(home.root)
        paths = [value for value in vars(placed).values() if isinstance(value, Path)]
        absent = [str(path) for path in paths if not path.exists()]
        if absent:
            yield Finding(f"asset {name}", "error", f"not there: {', '.join(absent)}; correct the path in site.yaml")
        else:
            yield Finding(f"asset {name}", "ok", ", ".join(str(path) for path in paths))


def _reach(home: Home) -> str:
    """A TLS connection with the federation's CA alone, as the SuperNode makes it; nothing is sent."""
    invitation = home.invitation()
    authority = home.keys / "ca.crt"  # what the SuperNode trusts; the invitation says what it should be
    try:
        context = ssl.create_default_context(cadata=authority.read_text())
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise ConsiliumError(f"{authority} cannot be read as a certificate; enroll again in a new home") from error
    where = f"{invitation.address}:{invitation.port}"
    try:
        with (
            socket.create_connection((invitation.address, invitation.port), timeout=10) as plain,
            context.wrap_socket(plain, server_hostname=invitation.address) as secure,
        ):
            return f"{where} answers, {secure.version()}"
    except ssl.SSLCertVerificationError as error:
        raise ConsiliumError(
            f"{where} shows a certificate that the federation's CA did not sign for it ({error.verify_message}): a "
            "proxy that opens TLS, another server, or a wrong clock here. Ask the network team first"
        ) from error
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConsiliumError(
            f"cannot reach {where} ({reason}): is the server up, does the firewall let this machine out to that port?"
        ) from error


def _ledger(home: Home) -> str:
    if not home.ledger.exists():
        return "none yet; the first start begins it"
    verified = read_ledger(home.ledger, home.invitation().site, home.identity().public)
    return f"{verified.head.seq} entries, all verified"


def _network() -> Finding:
    if without_network():
        return Finding("isolation", "ok", "the agent will run in a namespace without any network")
    return Finding(
        "isolation",
        "warning",
        "this account may not start programs without network; PrivateNetwork=yes under systemd may",
    )


def _disk(root: Path) -> Finding:
    place = next(path for path in (root, *root.parents) if path.exists())
    free = shutil.disk_usage(place).free
    state = "ok" if free > FREE_BYTES else "warning"
    return Finding("disk", state, f"{free / 1024**3:.1f} GiB free at {place}")


def _device(home: Home) -> str:
    from consilium_client.training import device

    return str(device.choose(home.config().device))
