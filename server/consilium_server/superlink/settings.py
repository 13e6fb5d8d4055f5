"""Addresses and files of the SuperLink; its private directory, secrets and environment. No flwr here."""

from __future__ import annotations

import datetime
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from consilium_server.federation import Home
from consilium_shared.errors import ConfigurationError
from consilium_shared.files import remove_leftovers, write_atomically
from consilium_shared.process import flower_environment

LAST_WORD = "the SuperLink ends: "
"""Prefix of the last line of its log when it fails, with the cause, for ``consilium-server up`` to show."""


@dataclass(frozen=True)
class SuperLinkSettings:
    """Addresses and files of the SuperLink.

    Attributes:
        home: the coordinator's home directory.
        public_host, public_port: where hospitals connect.
        private_port: port on 127.0.0.1 for the coordinator's own processes.
    """

    home: Path
    public_host: str
    public_port: int
    private_port: int

    @property
    def directory(self) -> Path:
        """HOME/superlink, 0700: secrets, who was heard when, and Flower's own files."""
        return self.home / "superlink"

    @property
    def flower_home(self) -> Path:
        """FLWR_HOME of every process of the coordinator that uses Flower."""
        return self.directory / "flwr"

    @property
    def superexec_secret_file(self) -> Path:
        """Secret for acquiring tasks: whoever can read it may."""
        return self.directory / "superexec.secret"

    @property
    def control_token_file(self) -> Path:
        """Token for registering SuperNodes and starting runs: whoever can read it may."""
        return self.directory / "control.token"

    @property
    def ca_certificate(self) -> Path:
        """Certificate of the CA that every site trusts."""
        return self.home / "keys" / "ca.crt"

    @property
    def certificate(self) -> Path:
        """The SuperLink's own certificate."""
        return self.home / "keys" / "superlink.crt"

    @property
    def private_key(self) -> Path:
        """The key of the SuperLink's certificate."""
        return self.home / "keys" / "superlink.key"

    @property
    def private_address(self) -> str:
        """Address at which the coordinator's own processes reach the SuperLink."""
        return f"127.0.0.1:{self.private_port}"

    def forget_databases(self) -> None:
        """Delete the database in which earlier releases kept messages in transit; nothing reads it any more."""
        for file in self.directory.glob("state.db*"):
            file.unlink()

    def control_token(self) -> str:
        """The bearer token of the Control interface. Raises ConfigurationError when no SuperLink ever ran here."""
        return _read_secret(self.control_token_file).decode("ascii")

    def superexec_secret(self) -> bytes:
        """The secret for acquiring tasks. Raises ConfigurationError when no SuperLink ever ran here."""
        return _read_secret(self.superexec_secret_file)


def set_flower_environment(settings: SuperLinkSettings) -> None:
    """Set the environment of every process of this coordinator. Call before flwr starts."""
    flower_environment.set_flower_environment(settings.flower_home)


def prepare(settings: SuperLinkSettings) -> None:
    """Make the SuperLink's private directory and its secrets; both are reused on the next start.

    Raises:
        ConfigurationError: a key or certificate is missing, damaged or out of date, or the directory is open to other
            accounts.
    """
    for path in (settings.ca_certificate, settings.certificate, settings.private_key):
        if not path.is_file():
            raise ConfigurationError(f"{path} is missing. Run `consilium-server provision` first.")
    check_certificates(settings, datetime.datetime.now(datetime.UTC))
    for directory in (settings.directory, settings.flower_home):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise ConfigurationError(f"{directory} must belong to you alone. Run: chmod 700 {directory}")
    remove_leftovers(settings.directory)
    _make_secret(settings.superexec_secret_file)
    _make_secret(settings.control_token_file)


def check_certificates(settings: SuperLinkSettings, now: datetime.datetime) -> None:
    """Refuse to start with what every site would turn away from.

    Raises:
        ConfigurationError: a certificate is damaged, is not valid at ``now``, or belongs to another key.
    """
    renewal = "Renew it: consilium-server renew."
    found = {}
    for path in (settings.ca_certificate, settings.certificate):
        try:
            certificate = found[path] = x509.load_pem_x509_certificate(path.read_bytes())
        except ValueError:
            raise ConfigurationError(f"{path} is not a certificate (PEM). Restore it; {renewal}") from None
        if certificate.not_valid_after_utc < now:
            raise ConfigurationError(f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}. {renewal}")
        if certificate.not_valid_before_utc > now:
            raise ConfigurationError(
                f"{path} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, and this "
                f"machine's clock says {now:%Y-%m-%d %H:%M} UTC. Set the clock."
            )
    try:
        key = serialization.load_pem_private_key(settings.private_key.read_bytes(), password=None)
    except (ValueError, TypeError):
        raise ConfigurationError(f"{settings.private_key} is not a private key (PEM). {renewal}") from None
    if key.public_key() != found[settings.certificate].public_key():
        raise ConfigurationError(
            f"{settings.certificate} belongs to another key than {settings.private_key}. {renewal}"
        )


def _make_secret(path: Path) -> None:
    if not path.exists() or not path.stat().st_size:
        write_atomically(path, secrets.token_hex(32).encode("ascii"))


def _read_secret(path: Path) -> bytes:
    try:
        found = path.stat()
        content = path.read_bytes()
    except OSError:
        raise ConfigurationError(f"{path} is missing. Start the SuperLink with `consilium-server up`.") from None
    if stat.S_IMODE(found.st_mode) & 0o077 or not content:
        raise ConfigurationError(f"{path} is empty or open to other accounts. Delete it and start the SuperLink again.")
    return content


def settings_of(home: Home) -> SuperLinkSettings:
    """Addresses on which the SuperLink listens, from federation.yaml."""
    federation = home.federation()
    return SuperLinkSettings(
        home=home.root,
        public_host=federation.listen,
        public_port=federation.port,
        private_port=federation.private_port,
    )
