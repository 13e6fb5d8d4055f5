"""Provisioning from federation.yaml: the coordinator's key, the CA, the SuperLink's certificate, the invitations.

A re-run changes nothing that exists: keys and certificates are not made again, invitations of known sites stay as
they are, new sites in the file get theirs. Where the file has another address or port the federation moves there: the
certificate is made anew, and each site gets an invitation that its home takes in place of the one before.
"""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from consilium_server import removed
from consilium_server.federation import Federation, Home, federation_id
from consilium_shared.config import load_yaml
from consilium_shared.errors import ConfigurationError
from consilium_shared.files import write_atomically
from consilium_shared.identity import Identity, write_secret
from consilium_shared.protocol.joining import Invitation, open_invitation
from consilium_shared.protocol.roster import Roster

CA_DAYS = 3650
CERTIFICATE_DAYS = 825  # what common TLS clients accept at most for a server's certificate


def provision(home: Home, federation_yaml: Path) -> list[str]:
    """Make what is missing in ``home``; returns one line for each thing made (none on a re-run).

    Raises:
        ConfigurationError: the file is wrong, names another federation than the one here, or lacks a site that was not
            removed.
    """
    wanted = load_yaml(federation_yaml, Federation)
    made: list[str] = []
    moved = False
    if home.federation_file.exists():
        _check_unchanged(home.federation(), wanted, federation_yaml)
        _check_sites(home, wanted, federation_yaml)
        moved = (home.federation().address, home.federation().port) != (wanted.address, wanted.port)
    home.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    key_file = home.keys / "coordinator.key"
    if not key_file.exists():
        Identity.generate().save(key_file)
        made.append(f"coordinator's signing key: {key_file}")
    coordinator = home.coordinator()
    if not (home.keys / "ca.crt").exists():
        if any(home.invitations.glob("*.json")):
            raise ConfigurationError(
                f"{home.keys / 'ca.crt'} is missing, and invitations name that authority. Restore it from a backup; "
                "it also stands in every invitation as ca_certificate."
            )
        _make_ca(home, wanted.federation)
        made.append(f"certificate authority: {home.keys / 'ca.crt'}")
    if moved or not (home.keys / "superlink.crt").exists():
        _make_certificate(home, wanted)
        made.append(f"SuperLink's certificate for {', '.join(_names(wanted))}: {home.keys / 'superlink.crt'}")
    identifier = federation_id(wanted.federation, coordinator)
    if not home.roster_file.exists():
        empty = Roster(federation=identifier, version=1, members=())
        write_atomically(home.roster_file, empty.sign(coordinator))
        made.append(f"empty roster: {home.roster_file}")
    ca_pem = (home.keys / "ca.crt").read_text(encoding="ascii")
    for site in wanted.sites:
        file = home.invitations / f"{site}.json"
        if file.exists() and not moved:
            continue
        if file.exists():
            _set_aside(home, file)
        invitation = Invitation.new(
            federation=identifier,
            name=wanted.federation,
            site=site,
            address=wanted.address,
            port=wanted.port,
            ca_certificate=ca_pem,
            coordinator=coordinator.public.hex(),
        )
        write_atomically(file, invitation.sign(coordinator), mode=0o644)
        made.append(f"invitation for {site}: {file}")
    write_atomically(home.federation_file, federation_yaml.read_bytes())
    return made


def renew(home: Home) -> x509.Certificate:
    """Make a new certificate and key for the server, under the same CA; a server that runs takes them by itself.

    Raises:
        ConfigurationError: nothing was provisioned, or the CA's key is not here.
    """
    federation = home.federation()
    if not (home.keys / "ca.key").is_file():
        raise ConfigurationError(
            f"{home.keys / 'ca.key'} is missing, and signs the certificate: put it there for the renewal (where it was "
            "kept apart), or restore it from the backup"
        )
    _make_certificate(home, federation)
    return x509.load_pem_x509_certificate((home.keys / "superlink.crt").read_bytes())


def _set_aside(home: Home, invitation: Path) -> None:
    """Keep an invitation that a new one replaces: a request may still answer it."""
    content = invitation.read_bytes()
    write_atomically(home.earlier_invitations / f"{open_invitation(content).digest}.json", content, mode=0o644)


def _check_unchanged(old: Federation, new: Federation, file: Path) -> None:
    if old.federation != new.federation:
        raise ConfigurationError(
            f"{file}: federation is {new.federation!r}, but this home was provisioned with {old.federation!r}, which "
            "stands in every ledger and record and cannot be changed. Provision another home (--home), or change it "
            "back."
        )


def _check_sites(home: Home, wanted: Federation, file: Path) -> None:
    """Refuse a file that lacks a site which is invited or admitted, or has one that was removed."""
    gone = sorted({each.stem for each in home.invitations.glob("*.json")} - set(wanted.sites))
    if gone:
        raise ConfigurationError(
            f"{file}: {', '.join(gone)} was invited before; to take a site out: consilium-server remove {gone[0]}"
        )
    back = sorted({each.site for each in removed.read(home)} & set(wanted.sites))
    if back:
        raise ConfigurationError(f"{file}: {', '.join(back)} was removed; invite the hospital under a new name")


def _names(federation: Federation) -> list[str]:
    return list(dict.fromkeys([federation.address, *federation.also_known_as, "localhost", "127.0.0.1"]))


def _san(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _builder(subject: str, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject[:64])]))
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))  # a site's clock may be a little behind ours
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _make_ca(home: Home, name: str) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    subject = f"Consilium CA {name}"
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject[:64])])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        _builder(subject, issuer, key.public_key(), CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA384())
    )
    key_file = home.keys / "ca.key"
    key_file.unlink(missing_ok=True)  # left by a run that was killed before its certificate was written
    write_secret(key_file, _pem(key))
    write_atomically(home.keys / "ca.crt", certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)


def _make_certificate(home: Home, federation: Federation) -> None:
    ca_key = serialization.load_pem_private_key((home.keys / "ca.key").read_bytes(), password=None)
    if not isinstance(ca_key, ec.EllipticCurvePrivateKey):
        raise ConfigurationError(f"{home.keys / 'ca.key'} is not an elliptic-curve key")
    ca = x509.load_pem_x509_certificate((home.keys / "ca.crt").read_bytes())
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = (
        _builder(federation.address, ca.subject, key.public_key(), CERTIFICATE_DAYS)
        .add_extension(x509.SubjectAlternativeName([_san(name) for name in _names(federation)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA384())
    )
    key_file = home.keys / "superlink.key"
    key_file.unlink(missing_ok=True)  # left by a run that was killed before its certificate was written
    write_secret(key_file, _pem(key))
    write_atomically(home.keys / "superlink.crt", certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
