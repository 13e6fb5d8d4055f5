"""A new key for this site's SuperNode: made here, asked for, and taken into use when the server knows it.

keys/supernode.key.new      the new key, until the server takes it
rotation-request.json       the request, for the coordinator; it stays
"""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from consilium_client.site import Home
from consilium_client.transport import connection
from consilium_shared.errors import ConfigurationError, PeerError
from consilium_shared.files import write_atomically
from consilium_shared.identity import write_secret
from consilium_shared.protocol import rotation
from consilium_shared.protocol.joining import open_request


def rotate(home: Home) -> bytes:
    """Make a new SuperNode key and the request to take it in place of the old; asked again, the same request.

    The request is about the key that lies in ``supernode.key.new`` until the server takes that one. A key without its
    request, or with an older one, was left by a run that was killed: nobody has heard of it, and another is made.

    Raises:
        ConfigurationError: the site was not enrolled, a file of it cannot be read, or the server, which alone knows
            whether it took a key that is lost, does not answer.
    """
    invitation, identity = home.invitation(), home.identity()
    fresh = home.keys / "supernode.key.new"
    last, old_key = _last(home), _load(home.keys / "supernode.key")
    if last is not None and _public(_load(fresh)) == last.new:
        return home.rotation_file.read_bytes()
    old = _known(home, last, _public(old_key))
    if _public(old_key) != old:
        old_key = None  # another key than the server knows proves nothing
    fresh.unlink(missing_ok=True)
    new = ec.generate_private_key(ec.SECP384R1())
    form = serialization.PrivateFormat.OpenSSH
    write_secret(fresh, new.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    request = rotation.make(invitation.federation, invitation.site, identity, old, new, old_key)
    write_atomically(home.rotation_file, request, mode=0o644)
    return request


def _last(home: Home) -> rotation.Rotation | None:
    """The last rotation that was asked for; None where there was none."""
    try:
        return rotation.open_rotation(home.rotation_file.read_bytes()) if home.rotation_file.exists() else None
    except (OSError, PeerError) as error:
        raise ConfigurationError(f"{home.rotation_file} is damaged: restore it from the backup") from error


def _known(home: Home, last: rotation.Rotation | None, in_use: str | None) -> str:
    """The public key that the server knows: of the last rotation, where it was admitted, or of the request to join."""
    if last is None:
        try:
            return open_request(home.request_file.read_bytes()).supernode
        except (OSError, PeerError) as error:
            raise ConfigurationError(f"{home.request_file} is damaged: restore it from the backup") from error
    if in_use != last.old:
        return last.new
    taken = connection.takes(home.root, home.keys / "supernode.key")
    if taken is None:
        raise ConfigurationError(
            "the new key of the last rotation is lost, and whether the server took it cannot be told while the server "
            "does not answer. See consilium-site doctor, and run this again"
        )
    return last.old if taken else last.new


def _public(key: ec.EllipticCurvePrivateKey | None) -> str | None:
    return None if key is None else rotation.openssh(key.public_key())


def _load(file: Path) -> ec.EllipticCurvePrivateKey | None:
    try:
        key = serialization.load_ssh_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError):
        return None
    return key if isinstance(key, ec.EllipticCurvePrivateKey) else None
