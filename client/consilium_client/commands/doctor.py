"""Preflight checks: everything that would stop this site, each finding with what to do."""

from __future__ import annotations

import http.client
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from consilium_client.data.asset import AssetSpec
from consilium_client.policy import AssetBudget
from consilium_client.site import Home
from consilium_client.state.ledger_file import check_never_begun, read_ledger
from consilium_client.transport.admission import takes
from consilium_client.transport.sandbox import without_network
from consilium_shared.errors import ConfigurationError, ConsiliumError, PeerError
from consilium_shared.privacy.accountant import check_delta
from consilium_shared.protocol.joining import open_request

FREE_BYTES = 2 * 1024**3
LEAST_FREE_BYTES = 64 * 1024**2
"""Least free space: with less no round can be charged and kept."""

AHEAD_SECONDS = 5
BEHIND_SECONDS = 300
"""Clock errors beyond which the server's Flower refuses each message of the site, for its signed time (flwr 1.41:
``SYSTEM_TIME_TOLERANCE``, ``TIMESTAMP_TOLERANCE``)."""
NOTED_AHEAD_SECONDS = 3
NOTED_BEHIND_SECONDS = 60
"""Clock errors beyond which a clock is not kept, and will be refused one day."""


@dataclass(frozen=True)
class Finding:
    """One check. ``state``: ok, warning (it works, less well), or error (it does not work)."""

    check: str
    state: str
    detail: str


def examine(home: Home) -> Iterator[Finding]:
    """Run every check; each finding comes as it is made."""
    yield _try("enrolment", lambda: f"federation {home.invitation().name}, site {home.invitation().site}")
    yield from _config(home)
    yield _try("keys", lambda: home.identity().public.fingerprint)
    yield _try("SuperNode key", lambda: _supernode_key(home))
    yield from _assets(home)
    yield _try("coordinator", lambda: _reach(home))
    clock = _clock(home)
    yield clock
    yield _admission(home, clock)
    yield _try("ledger", lambda: _ledger(home))
    yield _network()
    yield _disk(home.root)
    yield _try("device", lambda: _device(home))
    yield _try("rows", lambda: _rows(home))


def _try(check: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(check, "ok", look())
    except ConsiliumError as error:
        return Finding(check, "error", str(error))


def _config(home: Home) -> Iterator[Finding]:
    try:
        config = home.config()
    except ConsiliumError as error:
        yield Finding("site.yaml", "error", str(error))
        return
    assets, budgets = set(config.assets), set(config.policy.budgets)
    notes = []
    if not assets:
        notes.append("name under assets: what data there is, with kind and path")
    if lacking := sorted(assets - budgets):
        notes.append(f"give {', '.join(lacking)} a budget under policy.budgets: until then no study may use it")
    if unknown := sorted(budgets - assets):
        notes.append(f"policy.budgets has {', '.join(unknown)}, which is no asset: correct the name on one side")
    if not budgets and not lacking:
        notes.append("give each a budget under policy.budgets, with epsilon and delta")
    counted = f"{_count(assets, 'asset')}, {_count(budgets, 'budget')}"
    yield Finding("site.yaml", "warning" if notes else "ok", "; ".join([counted, *notes]))


def _count(things: Collection[str], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _supernode_key(home: Home) -> str:
    """The key by which the server knows this site: there, readable, and the one in the request to join."""
    file = home.keys / "supernode.key"
    lost = "restore keys/ from the backup; without one this site joins under a new name (runbook key-loss.md)"
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), password=None)
        request = open_request(home.request_file.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"cannot read {error.filename}: {error.strerror}; {lost}") from error
    except (ValueError, UnsupportedAlgorithm, PeerError) as error:
        raise ConfigurationError(f"{file} or {home.request_file} is damaged; {lost}") from error
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    if public.decode() != request.supernode:
        raise ConfigurationError(f"{file} is another key than this site joined with; {lost}")
    return "the one that this site joined with"


def _assets(home: Home) -> Iterator[Finding]:
    try:
        config = home.config()
    except ConsiliumError:
        return
    for name, asset in sorted(config.assets.items()):
        yield _asset(name, asset.at(home.root), config.policy.budgets.get(name))


def _asset(name: str, asset: AssetSpec, budget: AssetBudget | None) -> Finding:
    """Check an asset: open its files as a study would, and compare the budget's δ with the patients in them."""
    from consilium_client.data.head import look

    check = f"asset {name}"
    paths = [value for value in vars(asset).values() if isinstance(value, Path)]
    try:
        absent = [str(path) for path in paths if not path.exists()]
        if absent:
            return Finding(check, "error", f"not there: {', '.join(absent)}; correct the path in site.yaml")
        patients = look(asset)
    except OSError as error:  # a folder on the way that this account may not enter
        return Finding(check, "error", f"cannot read {error.filename}: {error.strerror}")
    except ConsiliumError as error:
        return Finding(check, "error", str(error))
    if budget is not None:
        try:
            check_delta(budget.delta, patients)
        except ConfigurationError as error:
            # A budget without limit may be for studies without privacy, which have no use for a δ.
            return Finding(check, "warning" if budget.epsilon == "unlimited" else "error", f"its budget: {error}")
    return Finding(check, "ok", ", ".join(str(path) for path in paths) + f": {patients} patients")


def _reach(home: Home) -> str:
    """A TLS connection with the federation's CA alone, as the SuperNode makes it; nothing is sent."""
    invitation, context = home.invitation(), _trusted(home)
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


def _trusted(home: Home) -> ssl.SSLContext:
    """TLS context with the certificate that the SuperNode trusts; the invitation says what it should be."""
    authority = home.keys / "ca.crt"
    try:
        return ssl.create_default_context(cadata=authority.read_text())
    except (OSError, ValueError) as error:  # an SSLError is an OSError
        raise ConsiliumError(f"{authority} cannot be read as a certificate; enroll again in a new home") from error


def _clock(home: Home) -> Finding:
    """Check of this machine's clock against the server's, to the whole seconds of an HTTP answer."""
    try:
        ahead = _ahead(home)
    except (ConsiliumError, OSError, http.client.HTTPException):
        return Finding("clock", "warning", "cannot be told while the server does not answer: see coordinator")
    if ahead is None:
        return Finding("clock", "warning", "cannot be told: the server's answer has no time; compare it by hand")
    if -NOTED_BEHIND_SECONDS <= ahead <= NOTED_AHEAD_SECONDS:
        return Finding("clock", "ok", "as the server's, to a few seconds" if abs(ahead) <= 2 else _apart(ahead))
    refused = ahead > AHEAD_SECONDS or ahead < -BEHIND_SECONDS
    return Finding(
        "clock",
        "error" if refused else "warning",
        f"{_apart(ahead)}; Flower refuses more than {AHEAD_SECONDS} s ahead or {BEHIND_SECONDS} s behind: set it (NTP)",
    )


def _admission(home: Home, clock: Finding) -> Finding:
    """Check that the server takes this site's SuperNode key: it takes those of the roster alone."""
    invitation = home.invitation()
    try:
        key = serialization.load_ssh_private_key((home.keys / "supernode.key").read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise ValueError
        taken = takes(invitation.address, invitation.port, _trusted(home), key)
    except (ConsiliumError, OSError, ValueError, UnsupportedAlgorithm, http.client.HTTPException):
        return Finding("admission", "warning", "cannot be told: see SuperNode key and coordinator")
    if taken is None:
        return Finding("admission", "warning", "cannot be told: the server answers any key alike; ask the coordinator")
    if taken:
        return Finding("admission", "ok", "the server takes this site's SuperNode key")
    if clock.state == "error":
        return Finding("admission", "warning", "cannot be told with this clock, with which the server takes no key")
    return Finding(
        "admission",
        "error",
        f"not admitted: the server does not take this site's SuperNode key. Send {home.request_file} to the "
        "coordinator, whose people run consilium-server admit; where they have, their server has not been started "
        "since, or another home of this site's was admitted, or this key left the roster",
    )


def _apart(ahead: float) -> str:
    return f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"


def _ahead(home: Home) -> float | None:
    """Seconds by which this clock is ahead of the server's, give or take one; None where the answer has no time.

    Any answer will do, of whatever status; the request says nothing of this site.
    """
    invitation = home.invitation()
    connection = http.client.HTTPSConnection(invitation.address, invitation.port, timeout=10, context=_trusted(home))
    try:
        connection.connect()
        before = time.time()
        connection.request("GET", "/health")
        told = connection.getresponse().getheader("Date")
        here = (before + time.time()) / 2
    finally:
        connection.close()
    try:
        # The server cuts to the second, and makes the text once a second: on average it is one old.
        return None if told is None else here - (parsedate_to_datetime(told).timestamp() + 1)
    except ValueError:
        return None


def _ledger(home: Home) -> str:
    if not home.ledger.exists():
        check_never_begun(home.ledger)
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
    said = f"{free / 1024**3:.1f} GiB free at {place}"
    if free < LEAST_FREE_BYTES:
        return Finding("disk", "error", f"{said}: make room; the ledger, and so a round, needs some")
    return Finding("disk", "ok" if free > FREE_BYTES else "warning", said)


def _rows(home: Home) -> str:
    """Findings of the agent about this machine (``machine.py``)."""
    from consilium_client.agent.machine import FindingFiles
    from consilium_client.state.trials import Trials
    from consilium_client.training import fit
    from dpsgd import device

    found = [*FindingFiles(home.store / "machine").all(fit.machine(device.choose(home.config().device)))]
    failed = [f"{model}: {finding.failed}" for model, finding in found if not finding.rows]
    for trial in Trials(home.store / "machine" / "trying").all():
        failed.append(
            f"study {trial['name']}: the agent was ended again and again while it tried pieces of {trial['rows']} "
            f"records ({trial['device']}), as for memory; with more of it, consilium-site retry {trial['name']}"
        )
    if failed:
        raise ConsiliumError(f"no private round of these models runs on this device: {'; '.join(failed)}")
    if not found:
        return "no private study yet; before the first, its model is tested here"
    slow = [f"; slower than it could be, {model}: {finding.failed}" for model, finding in found if finding.failed]
    return f"no record's result depends on another's, with {', '.join(sorted({m for m, _ in found}))}{''.join(slow)}"


def _device(home: Home) -> str:
    from dpsgd import device

    return str(device.choose(home.config().device))
