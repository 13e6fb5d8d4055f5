"""Certificates of a federation: for how long and for whom one is valid, and what to do before it is not."""

from __future__ import annotations

import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from consilium_shared.findings import Finding

WARNED_DAYS = 30
"""Days left at which somebody should act."""


def of_stranger(content: bytes) -> x509.Certificate:
    """A certificate that anybody may have made, every part of which that is looked at here can be read.

    Args:
        content: DER.

    Raises:
        ValueError: it is none, or something in it cannot be read.
    """
    try:
        found = x509.load_der_x509_certificate(content)
        for read in (issuer, names, lambda made: (made.subject, made.not_valid_before_utc, made.not_valid_after_utc)):
            read(found)
    except Exception as error:  # parts are parsed when they are asked for, and each has errors of its own
        raise ValueError(f"no certificate that can be read ({type(error).__name__})") from None
    return found


def names(certificate: x509.Certificate) -> list[str]:
    """Names and addresses that a certificate is for, as text."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    addresses = [str(each) for each in found.get_values_for_type(x509.IPAddress)]
    return [*found.get_values_for_type(x509.DNSName), *addresses]


def days_left(certificate: x509.Certificate, now: datetime.datetime) -> int:
    """Whole days until a certificate is not valid any more; negative when it ran out."""
    return (certificate.not_valid_after_utc - now).days


def signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """True where an authority signed a certificate."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def issuer(certificate: x509.Certificate) -> str:
    """Name of whoever signed a certificate, for people."""
    found = [str(each.value) for each in certificate.issuer if each.oid == x509.NameOID.COMMON_NAME]
    return found[0] if found else certificate.issuer.rfc4514_string() or "nobody"


def validity(check: str, certificate: x509.Certificate, now: datetime.datetime, renewal: str) -> Finding:
    """The finding about a certificate's time.

    Args:
        check: what it is called.
        certificate: that is looked at.
        now: the time, with its zone.
        renewal: what to do before it runs out, or after.
    """
    until, left = certificate.not_valid_after_utc, days_left(certificate, now)
    if now < certificate.not_valid_before_utc:
        return Finding(
            check,
            "error",
            f"is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, and this machine's clock says "
            f"{now:%Y-%m-%d %H:%M}: set the clock (NTP)",
        )
    if until < now:
        return Finding(check, "error", f"ran out on {until:%Y-%m-%d}: {renewal}")
    whom = names(certificate)
    said = f"valid until {until:%Y-%m-%d}, {left} days" + (f", for {', '.join(whom)}" if whom else "")
    if left < WARNED_DAYS:
        return Finding(check, "warning", f"{said}: {renewal}")
    return Finding(check, "ok", said)
