"""A new key for this site's SuperNode: made here, asked for, and taken into use when the server knows it.

keys/supernode.key.new      the new key, until the server takes it
rotation-request.json       the request, for the coordinator; it stays
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from consilium_client.site import Home
from consilium_shared.errors import ConfigurationError, PeerError
from consilium_shared.files import write_atomically
from consilium_shared.identity import write_secret
from consilium_shared.protocol import rotation
from consilium_shared.protocol.joining import open_request


def rotate(home: Home) -> bytes:
    """Make a new SuperNode key and the request to take it in place of the old; asked again, the same request.

    Raises:
        ConfigurationError: the site was not enrolled, or a file of it cannot be read.
    """
    invitation, identity = home.invitation(), home.identity()
    fresh = home.keys / "supernode.key.new"
    if fresh.exists() and home.rotation_file.exists():
        return home.rotation_file.read_bytes()
    old_key = _load(home.keys / "supernode.key")
    old = _known(home)
    if old_key is not None and rotation.openssh(old_key.public_key()) != old:
        old_key = None  # another key than the server knows proves nothing
    fresh.unlink(missing_ok=True)  # left by a run that was killed before its request was written
    new = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    write_secret(fresh, new.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    request = rotation.make(invitation.federation, invitation.site, identity, old, new, old_key)
    write_atomically(home.rotation_file, request, mode=0o644)
    return request


def _known(home: Home) -> str:
    """The public key that the server knows: of the last rotation, or of the request to join."""
    try:
        if home.rotation_file.exists():
            return rotation.open_rotation(home.rotation_file.read_bytes()).new
        return open_request(home.request_file.read_bytes()).supernode
    except (OSError, PeerError) as error:
        raise ConfigurationError(f"{home.rotation_file} or {home.request_file} is damaged: restore it") from error


def _load(file: Path) -> ec.EllipticCurvePrivateKey | None:
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError):
        return None
    return key if isinstance(key, ec.EllipticCurvePrivateKey) else None
