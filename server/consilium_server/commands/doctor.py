"""Preflight checks of the coordinator: what stops the server, a study or a site, each finding with what to do."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from consilium_server.commands import status
from consilium_server.commands.status import is_up
from consilium_server.federation import Home
from consilium_server.state import progress, study_folder
from consilium_server.superlink import presence
from consilium_server.superlink.presence import Presence
from consilium_server.superlink.settings import settings_of
from consilium_shared import certificates, findings
from consilium_shared.errors import ConfigurationError, ConsiliumError
from consilium_shared.findings import Finding, attempt

LEAST_MEMORY = 256 * 1024**2
"""Least memory: SuperLink and supervisor take about as much at rest."""
ENOUGH_MEMORY = 1024**3
RENEWAL = "run consilium-server renew; studies go on, and no site needs anything"


def examine(home: Home) -> Iterator[Finding]:
    """Run every check; each finding comes as it is made.

    Raises:
        ConfigurationError: no federation has its home there.
    """
    federation = home.federation()
    yield _account(home)
    yield attempt("coordinator's key", lambda: home.coordinator().public.fingerprint)
    yield from _certificates(home, federation.address)
    yield attempt("roster", lambda: _roster(home))
    yield _name(federation.address)
    yield from _serving(home, federation.address)
    yield from _sites(home)
    yield from _studies(home)
    yield findings.disk(home.root)
    yield findings.memory(LEAST_MEMORY, ENOUGH_MEMORY, "the server's programs")
    yield findings.pinned("server")


def _account(home: Home) -> Finding:
    here, owner = os.geteuid(), home.root.stat().st_uid
    if here == owner:
        return Finding("account", "ok", "the one to which the home belongs")
    return Finding(
        "account",
        "error",
        f"the home belongs to account #{owner}, and this is #{here}: what one may read says nothing of the other. Run "
        f"it as that account: sudo -u '#{owner}' consilium-server doctor --home {home.root}",
    )


def _certificates(home: Home, address: str) -> Iterator[Finding]:
    """The CA's and the server's certificate: time, key, signature, names."""
    now = datetime.now(UTC)
    try:
        authority, own = (_certificate(home, name) for name in ("ca.crt", "superlink.crt"))
    except ConfigurationError as error:
        yield Finding("certificate", "error", str(error))
        return
    yield certificates.validity("CA", authority, now, "every site then needs a new federation: plan it")
    if not certificates.signed_by(own, authority):
        yield Finding(
            "certificate", "error", "the federation's CA did not sign it: restore it, or run consilium-server renew"
        )
    elif not _fits(home, own):
        yield Finding(
            "certificate",
            "error",
            "it belongs to another key than superlink.key: restore both, or run consilium-server renew",
        )
    elif address not in certificates.names(own):
        names = ", ".join(certificates.names(own))
        yield Finding(
            "certificate", "error", f"it is for {names}, and sites call {address}: run consilium-server renew"
        )
    else:
        yield certificates.validity("certificate", own, now, RENEWAL)


def _certificate(home: Home, name: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate((home.keys / name).read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{home.keys / name} cannot be read as a certificate: restore it") from error


def _fits(home: Home, certificate: x509.Certificate) -> bool:
    """True where the certificate is of the private key beside it."""
    try:
        key = serialization.load_pem_private_key((home.keys / "superlink.key").read_bytes(), password=None)
    except (OSError, ValueError, TypeError):
        return False
    return key.public_key() == certificate.public_key()


def _roster(home: Home) -> str:
    roster = home.roster()
    if not roster.members:
        raise ConfigurationError("no site is admitted yet: consilium-server admit join-request.json")
    return f"version {roster.version}, {len(roster.members)} sites"


def _name(address: str) -> Finding:
    """The name that the sites call, as this machine knows it."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        return Finding(
            "address",
            "warning",
            f"{address} is not known here ({error.strerror}); where the sites do not know it either, none connects: "
            "ask for its entry in the DNS",
        )
    return Finding("address", "ok", f"{address} is a name that is known here")


def _serving(home: Home, address: str) -> Iterator[Finding]:
    """The programs: do they run, does the port answer, with the certificate that lies here?"""
    link, here = settings_of(home), None
    if not is_up(home):
        for port in (link.public_port, link.private_port):
            with contextlib.closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    yield Finding(
                        "programs",
                        "error",
                        f"do not run, and another program has port {port}: stop it, or change federation.yaml",
                    )
                    return
        yield Finding("programs", "warning", "do not run; start them: consilium-server up")
        return
    try:
        shown = ssl.get_server_certificate(("127.0.0.1", link.public_port), timeout=5)
    except OSError as error:
        yield Finding(
            "programs",
            "error",
            f"run, and nothing answers on port {link.public_port} ({error.strerror or type(error).__name__}): see "
            f"{home.logs / 'superlink.log'}",
        )
        return
    with contextlib.suppress(ConfigurationError):  # said under certificate
        here = _certificate(home, "superlink.crt")
    if here is not None and x509.load_pem_x509_certificate(shown.encode()) != here:
        yield Finding(
            "programs",
            "warning",
            "answer with an older certificate than lies here: they take the new one within seconds; else start again",
        )
        return
    yield Finding("programs", "ok", f"run, and answer on port {link.public_port}")


def _sites(home: Home) -> Iterator[Finding]:
    """Each admitted site: is it connected, and what keeps it off?"""
    try:
        there = presence.of_sites(settings_of(home).directory, home.roster())
        states, online = status.sites(home), status.connected(home)
    except ConsiliumError:  # said under roster
        return
    for site, state in states.items():
        check = f"site {site}"
        if state == "invited":
            yield Finding(check, "warning", "invited, and not admitted: ask for its join-request.json, then admit it")
        elif state.startswith("halted"):
            yield Finding(check, "error", f"{state}; then consilium-server readmit {site} (runbook two-homes.md)")
        else:
            yield _site(check, there[site], None if online is None else site in online)


def _site(check: str, found: Presence, online: bool | None) -> Finding:
    said = status.said(found, online)
    if found.wrong_clock() is not None and not online:
        return Finding(check, "error", f"{said}; its people set it (NTP), and so do you if every site is off alike")
    if online is None:
        return Finding(check, "ok", f"admitted; connected: {said}")
    release = f", release {found.release}" if found.release else ""
    if online:
        return Finding(check, "ok", f"connected{release}")
    return Finding(
        check,
        "warning",
        f"not connected ({said}){release}: its people run consilium-site doctor, which names the cause",
    )


def _studies(home: Home) -> Iterator[Finding]:
    """Studies that stand, and for what."""
    for folder in study_folder.all_folders(home):
        check = f"study {folder.name}"
        try:
            p = progress.read(folder)
        except ConsiliumError as error:
            yield Finding(check, "error", str(error))
            continue
        if p.state == "failed":
            yield Finding(check, "error", f"failed: {p.why}; see {home.logs / f'study-{folder.name}.log'}")
        elif p.state == "stopped":
            yield Finding(check, "warning", f"stopped: {p.why}; consilium-server resume {folder.name} goes on")
        elif p.waiting:
            yield Finding(check, "warning", f"{p.state}, {p.waiting} (runbook failed-round.md)")
        else:
            yield Finding(check, "ok", p.state)
