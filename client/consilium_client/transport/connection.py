"""Checks of the way to the server: proxy, address, certificate, clock, admission, release.

The doctor shows each; the SuperNode, which Flower ends without a cause, names the first that fails as its own.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from consilium_client.transport import admission, way_out
from consilium_client.transport.admission import Answer
from consilium_shared import certificates
from consilium_shared.errors import ConsiliumError, TransportError, VersionError
from consilium_shared.findings import Finding, attempt
from consilium_shared.printable import printable
from consilium_shared.protocol.joining import Invitation, open_invitation
from consilium_shared.protocol.version import about

AHEAD_SECONDS = 5
BEHIND_SECONDS = 300
"""Clock errors beyond which the server's Flower refuses each message of the site, for its signed time (flwr 1.41:
``SYSTEM_TIME_TOLERANCE``, ``TIMESTAMP_TOLERANCE``)."""
NOTED_AHEAD_SECONDS = 3
NOTED_BEHIND_SECONDS = 60
"""Clock errors beyond which a clock is not kept, and will be refused one day."""
RENEWAL = "the coordinator's people renew it (consilium-server renew); this site needs nothing new for it"


@dataclass(frozen=True)
class Way:
    """The server that a site calls, and with what: its invitation, the folder of its keys, its request to join."""

    invitation: Invitation
    keys: Path
    request: Path


def of(root: Path) -> Way:
    """The way of the site in a home folder; raises ConsiliumError or OSError where it was not enrolled."""
    return Way(open_invitation((root / "invitation.json").read_bytes()), root / "keys", root / "join-request.json")


def cause(root: Path) -> str:
    """Cause for which a site's SuperNode cannot connect: the first error on its way, or that there is none now."""
    try:
        found = next((each for each in look(of(root)) if each.state == "error"), None)
    except (ConsiliumError, OSError) as error:
        return str(error)
    if found is not None:
        return f"{found.check}: {found.detail}"
    return "the connection broke, and the server answers now"


def look(way: Way) -> Iterator[Finding]:
    """Findings about the way to the server, in the order in which one causes the next."""
    proxy = _proxy(way)
    if proxy is not None:
        yield proxy
        if proxy.state == "error":
            return
    yield _authority(way)
    yield attempt("coordinator", lambda: reach(way))
    yield _certificate(way)
    clock = _clock(way)
    yield clock
    answer = _ask(way)
    yield admitted(way, answer, clock)
    yield _release(answer)


def _proxy(way: Way) -> Finding | None:
    """The proxy that the environment names, where there is one; the programs must be started with the same."""
    try:
        between = way_out.proxy(way.invitation.address)
    except ConsiliumError as error:
        return Finding("proxy", "error", str(error))
    if between is None:
        return None
    login = "with a name and a password" if between.authorization else "without a password"
    return Finding(
        "proxy",
        "ok",
        f"{between}, {login}, as HTTPS_PROXY says here; the unit that starts the programs must say it too",
    )


def _authority(way: Way) -> Finding:
    """The federation's CA, which the SuperNode trusts and nobody else."""
    try:
        found = _ca(way)
    except ConsiliumError as error:
        return Finding("CA", "error", str(error))
    cure = "only a new federation has a new CA: ask the coordinator"
    return certificates.validity("CA", found, datetime.now(UTC), cure)


def _ca(way: Way) -> x509.Certificate:
    file = way.keys / "ca.crt"
    try:
        return x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        raise ConsiliumError(
            f"{file} cannot be read as a certificate: restore it from the backup, or copy it out of invitation.json "
            "(ca_certificate)"
        ) from error


def reach(way: Way) -> str:
    """Make a TLS connection with the federation's CA alone, as the SuperNode makes it; nothing is sent.

    Raises:
        TransportError: it cannot be made; the text says why and who can mend that.
    """
    invitation, context = way.invitation, trusted(way)
    where = f"{invitation.address}:{invitation.port}"
    between = way_out.proxy(invitation.address)
    connection = way_out.connection(invitation.address, invitation.port, context)
    try:
        connection.connect()
        version = connection.sock.version() if isinstance(connection.sock, ssl.SSLSocket) else None
        return f"{where} answers, {version}" + (f", through the proxy {between}" if between else "")
    except ssl.SSLCertVerificationError as error:
        raise TransportError(_untrusted(way, error)) from error
    except ssl.SSLError as error:
        raise TransportError(
            f"{where} answers, and not with TLS ({error.reason or 'no reason given'}): another program has that "
            "address and port. Compare both with the coordinator"
        ) from error
    except (socket.gaierror, UnicodeError) as error:
        name = between.host if between else invitation.address
        said = error.strerror if isinstance(error, OSError) else "it is no name of a machine"
        raise TransportError(
            f"the name {name!r} is not known here ({said}): ask the network team for its entry in the DNS, "
            "or write it into /etc/hosts"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        if between is not None:
            raise way_out.refused_by(between, error) from error
        reason = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
        raise TransportError(
            f"cannot reach {where} ({reason}): is the server up, does the firewall let this machine out to that port? "
            "Where the only way out is a proxy, name it: HTTPS_PROXY=http://proxy:3128"
        ) from error
    finally:
        connection.close()


def trusted(way: Way) -> ssl.SSLContext:
    """TLS context with the certificate that the SuperNode trusts; the invitation says what it should be."""
    _ca(way)
    return ssl.create_default_context(cafile=str(way.keys / "ca.crt"))


def presented(way: Way) -> x509.Certificate:
    """The certificate that the server shows, whoever signed it. Nothing is sent to it and nothing believed.

    Raises:
        OSError, ValueError, ConsiliumError: it shows none.
    """
    invitation = way.invitation
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = way_out.connection(invitation.address, invitation.port, context)
    try:
        connection.connect()
        shown = connection.sock.getpeercert(binary_form=True) if isinstance(connection.sock, ssl.SSLSocket) else None
    finally:
        connection.close()
    return certificates.of_stranger(shown or b"")


def _untrusted(way: Way, error: ssl.SSLCertVerificationError) -> str:
    """The cause of a certificate that does not pass, and who can mend it."""
    invitation = way.invitation
    where = f"{invitation.address}:{invitation.port}"
    try:
        shown, authority = presented(way), _ca(way)
    except (OSError, ValueError, ConsiliumError, http.client.HTTPException):
        return f"{where} shows a certificate that does not pass ({error.verify_message}): ask the coordinator"
    if not certificates.signed_by(shown, authority):
        between = way_out.proxy(invitation.address)
        who = f"the proxy {between}" if between else "a proxy"
        return (
            f"{where} shows a certificate that the federation's CA did not sign; it is by "
            f"{printable(certificates.issuer(shown))!r}: {who} opens TLS, or that is another server. Ask the network "
            "team to let the connection to that address and port through unopened"
        )
    dated = certificates.validity("certificate", shown, datetime.now(UTC), RENEWAL)
    if dated.state == "error":
        return f"the server's certificate {dated.detail}"
    return (
        f"the server's certificate is for {', '.join(certificates.names(shown))}, and this site calls "
        f"{invitation.address}: the coordinator adds that name under also_known_as and renews the certificate "
        "(consilium-server renew)"
    )


def _certificate(way: Way) -> Finding:
    """Days that the server's certificate has left, and its names."""
    try:
        shown = presented(way)
        authority = _ca(way)
    except (OSError, ValueError, ConsiliumError, http.client.HTTPException):
        return Finding("certificate", "warning", "cannot be told: see coordinator")
    if not certificates.signed_by(shown, authority):
        return Finding("certificate", "error", "not of this federation's CA: see coordinator")
    return certificates.validity("certificate", shown, datetime.now(UTC), RENEWAL)


def _clock(way: Way) -> Finding:
    """Clock of this machine beside the server's, as far as the whole seconds of an HTTP answer tell it."""
    try:
        ahead = _ahead(way)
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


def _apart(ahead: float) -> str:
    return f"this machine's clock is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"


def _ahead(way: Way) -> float | None:
    """Seconds by which this clock is ahead of the server's, give or take one; None where the answer has no time.

    Any answer will do, of whatever status and whoever signed its certificate: a wrong clock makes a good certificate
    look bad. The request says nothing of this site.
    """
    invitation = way.invitation
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    connection = way_out.connection(invitation.address, invitation.port, context)
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


def _ask(way: Way, key_file: Path | None = None) -> Answer | None:
    """The server's answer to a question that is signed with this site's SuperNode key; None where there is none."""
    invitation = way.invitation
    try:
        key = serialization.load_ssh_private_key((key_file or way.keys / "supernode.key").read_bytes(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            return None
        return admission.ask(invitation.address, invitation.port, trusted(way), key)
    except (ConsiliumError, OSError, ValueError, UnsupportedAlgorithm, http.client.HTTPException):
        return None


def takes(root: Path, key_file: Path) -> bool | None:
    """True where the server takes the SuperNode key of a file, for a home folder's site; None: it does not tell."""
    try:
        answer = _ask(of(root), key_file)
    except (ConsiliumError, OSError):
        return None
    return None if answer is None else answer.taken


def admitted(way: Way, answer: Answer | None, clock: Finding) -> Finding:
    """The answer to whether the server takes this site's SuperNode key: it takes those of the roster alone."""
    if answer is None:
        return Finding("admission", "warning", "cannot be told: see SuperNode key and coordinator")
    if answer.taken is None:
        return Finding("admission", "warning", "cannot be told: the server answers any key alike; ask the coordinator")
    if answer.taken:
        return Finding("admission", "ok", "the server takes this site's SuperNode key")
    if clock.state == "error":
        return Finding("admission", "warning", "cannot be told with this clock, with which the server takes no key")
    return Finding(
        "admission",
        "error",
        f"not admitted: the server does not take this site's SuperNode key. Send {way.request} to the "
        "coordinator, whose people run consilium-server admit; where they have, their server has not been started "
        "since, or another home of this site's was admitted, or this site was removed",
    )


def _release(answer: Answer | None) -> Finding:
    """Releases at both ends, and whether they have a protocol in common."""
    here = about()["consilium"]
    if answer is None or not answer.taken or answer.formats is None or answer.release is None:
        return Finding("releases", "ok", f"{here} here; the server tells its own to sites that it takes")
    said = f"{here} here, {printable(answer.release)} at the server"
    try:
        answer.formats.check("the server")
    except VersionError as error:
        return Finding("releases", "error", f"{said}: {error}")
    return Finding("releases", "ok", said)
