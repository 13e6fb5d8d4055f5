"""Checks of what this site is made of: enrolment, keys, site.yaml, the account, the programs that run."""

from __future__ import annotations

import os
import pwd
import socket
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from consilium_client.commands.ask import ask
from consilium_client.intake.settings import Receive
from consilium_client.site import Home
from consilium_client.state.ledger_file import check_never_begun, read_ledger
from consilium_shared.canonical import digest
from consilium_shared.errors import ConfigurationError, ConsiliumError, IntegrityError, PeerError
from consilium_shared.findings import Finding, attempt
from consilium_shared.protocol.joining import open_request
from consilium_shared.protocol.rotation import open_rotation
from consilium_shared.protocol.version import about

SOCKET_BYTES = 100
"""Longest path of a Unix socket, with some room (Linux: 107)."""


def look(home: Home) -> Iterator[Finding]:
    """Findings about the files of this site's home."""
    yield account(home)
    yield attempt("enrolment", lambda: f"federation {home.invitation().name}, site {home.invitation().site}")
    yield from _config(home)
    yield attempt("keys", lambda: home.identity().public.fingerprint)
    yield attempt("SuperNode key", lambda: _supernode_key(home))
    yield attempt("ledger", lambda: _ledger(home))
    yield attempt("sockets", lambda: _sockets(home))


def account(home: Home) -> Finding:
    """Account of this process beside the one that the agent runs as: the owner of the home folder."""
    try:
        owner = home.root.stat().st_uid
    except OSError as error:
        return Finding("account", "error", f"cannot look at {home.root}: {error.strerror}")
    here = os.geteuid()
    if here == owner:
        return Finding("account", "ok", f"{_name(here)}, to whom the home belongs")
    return Finding(
        "account",
        "error",
        f"this is {_name(here)}, and the home belongs to {_name(owner)}, as which the agent runs: what one may read "
        f"says nothing of the other. Run: sudo -u {_name(owner)} consilium-site doctor --home {home.root}",
    )


def _name(account: int) -> str:
    try:
        return pwd.getpwuid(account).pw_name
    except KeyError:
        return f"#{account}"


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
    """The key by which the server knows this site: there, readable, and the one of the last request."""
    file = home.keys / "supernode.key"
    lost = "restore keys/ from the backup; without one make a new key and have it admitted (consilium-site rotate)"
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), password=None)
        known = _known_keys(home, open_request(home.request_file.read_bytes()).supernode)
    except OSError as error:
        raise ConfigurationError(f"cannot read {error.filename}: {error.strerror}; {lost}") from error
    except (ValueError, UnsupportedAlgorithm, PeerError) as error:
        raise ConfigurationError(f"{file} or {home.request_file} is damaged; {lost}") from error
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    if public.decode() not in known:
        raise ConfigurationError(f"{file} is another key than the server knows this site by; {lost}")
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise ConfigurationError(f"{file} is readable by others; run: chmod 600 {file}")
    return "the one that the server knows this site by"


def _known_keys(home: Home, joined_with: str) -> set[str]:
    """Public keys that the server may know this site by: of its last rotation, else of its request to join."""
    if not home.rotation_file.exists():
        return {joined_with}
    rotated = open_rotation(home.rotation_file.read_bytes())
    return {rotated.new, rotated.old} if (home.keys / "supernode.key.new").exists() else {rotated.new}


def _ledger(home: Home) -> str:
    if not home.ledger.exists():
        check_never_begun(home.ledger)
        return "none yet; the first start begins it"
    try:
        verified = read_ledger(home.ledger, home.invitation().site, home.identity().public)
    except IntegrityError as error:
        raise IntegrityError(
            f"{home.ledger}: {error}: it was edited or damaged. Keep it, and put the newest whole copy of the backup "
            "in its place (runbook restore.md)"
        ) from error
    return f"{verified.head.seq} entries, all verified"


def _sockets(home: Home) -> str:
    length = len(os.fsencode(home.agent_socket))
    if length > SOCKET_BYTES:
        raise ConfigurationError(
            f"the path {home.agent_socket} has {length} bytes, and a socket's at most {SOCKET_BYTES}: move the home to "
            "a shorter path, as /var/lib/consilium-site"
        )
    return "their paths are short enough"


def running(home: Home) -> Finding:
    """The programs that run for this home: are they there, of this release, with the site.yaml of today?"""
    if not home.admin_socket.exists():
        return Finding("programs", "warning", "do not run; start them: consilium-site up")
    try:
        status = ask(home.admin_socket, "status")
    except ConsiliumError as error:
        return Finding("programs", "error", f"the agent does not answer ({error}): see {home.logs / 'agent.log'}")
    release = about()["consilium"]
    if status.get("release") != release:
        ran = status.get("release") or "an earlier one"
        return Finding(
            "programs", "warning", f"release {ran} runs, {release} is installed: start consilium-site up again"
        )
    try:
        now = digest(home.config_file.read_bytes())
    except OSError:  # another check's matter
        now = status.get("site_yaml")
    if status.get("site_yaml") != now:
        return Finding(
            "programs",
            "warning",
            "site.yaml was changed since the agent read it, which goes on with what it read: start consilium-site up "
            "again",
        )
    return Finding("programs", "ok", f"run since {status['up_seconds']} s, with this site.yaml")


def intake(home: Home) -> Finding | None:
    """The receiver of images: configured, running, with files of TLS that can be used. None where there is none."""
    try:
        settings = home.config().intake
    except ConsiliumError:
        return None
    if settings is None or settings.receive is None:
        return None
    receive = settings.receive.at(home.root)
    for file in () if receive.tls is None else (receive.tls.certificate, receive.tls.key, receive.tls.ca):
        if file is not None and not os.access(file, os.R_OK):
            return Finding("receiver", "error", f"cannot read {file}, which intake.receive.tls names: correct the path")
    where = f"{receive.ae_title} on {receive.host}:{receive.port}"
    if _receives(receive, home.inbox(settings)):
        return Finding("receiver", "ok", f"{where} receives")
    if _listens(receive):
        return Finding(
            "receiver",
            "error",
            f"another program has port {receive.port}: stop it, or change intake.receive.port and tell the archives",
        )
    start, log = ("its unit", "journalctl") if receive.unit else ("consilium-site up", f"{home.logs / 'receiver.log'}")
    return Finding(
        "receiver",
        "warning",
        f"{where} is configured and does not run, so archives cannot send: start {start} ({log} says why it ended)",
    )


def _receives(receive: Receive, inbox: Path) -> bool:
    """True where the receiver runs: a program writes into the inbox, and somebody listens."""
    try:
        inode = (inbox / "lock").stat().st_ino
        # Read, not tried: who takes the lock for a moment keeps a receiver that starts from putting the inbox in order.
        locked = f":{inode} " in Path("/proc/locks").read_text()
    except OSError:
        return False
    return locked and _listens(receive)


def _listens(receive: Receive) -> bool:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(receive.host, receive.host)  # noqa: S104
    try:
        with socket.create_connection((host, receive.port), timeout=2):
            return True
    except OSError:
        return False
