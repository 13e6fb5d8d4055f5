"""Joining a federation: keys are made here and stay here; what goes out is a request with the public halves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from consilium_client.site import Home
from consilium_shared.errors import ConfigurationError
from consilium_shared.files import write_atomically
from consilium_shared.identity import Identity, PublicIdentity, write_secret
from consilium_shared.protocol.joining import Invitation, make_request, open_invitation

STARTER = """\
# What this site has, what it permits, where it computes. consilium-site doctor checks it.
site: {site}

assets: {{}}
#  chest-xray:                      # the name that a study asks for
#    kind: dicom                    # or table, timeseries: deploy/config/site.full.yaml has all
#    path: /data/chest-xray

policy:
  budgets: {{}}                       # over an asset's whole life, all studies together
#    chest-xray: {{epsilon: 10.0, delta: 1.0e-5}}
  minimum_patients: 50              # no study on fewer patients
  minimum_held_back: 10             # no evaluation counts of fewer held-back patients
  minimum_sites: 2                  # no study that adds up fewer sites
  # How many corrupt sites a study must hold against: fewer than a third of its roster (third), or a number.
  corrupt_sites: third
  maximum_epsilon: 5.0              # most that one study may cost
  allow_without_privacy: false      # true: studies without differential privacy may be approved
  # Counts of held-back patients may leave: with noise and charged, in studies with differential privacy; exact in those
  # without; false: none do.
  allow_evaluation_counts: true
  # Days without a word of the coordinator's after which a study that was never closed is ended here, as by reject.
  quiet_days: 90

device: auto
"""


@dataclass(frozen=True)
class Enrolment:
    """Outcome of an enrolment."""

    invitation: Invitation
    request: bytes
    """The signed request (JSON) for the coordinator."""
    identity: PublicIdentity
    new: bool
    """False: this home was enrolled before with the same invitation, and nothing changed."""
    moved: bool = False
    """True: this home was enrolled before, and calls the server at another address from now on."""


def enroll(home: Home, invitation_file: Path, coordinator_fingerprint: str | None = None) -> Enrolment:
    """Accept an invitation: make both keys, store the invitation and the CA certificate, write the request.

    A re-run with the same invitation changes nothing and returns the same request.

    Raises:
        ConfigurationError: the file cannot be read, the fingerprint is not the coordinator's, or this home was
            enrolled with another invitation.
        PeerError: the invitation is malformed or was edited.
    """
    try:
        document = invitation_file.read_bytes()
    except OSError as error:
        raise ConfigurationError(f"cannot read {invitation_file}: {error.strerror}") from error
    invitation = open_invitation(document)
    coordinator = PublicIdentity.from_hex(invitation.coordinator)
    if coordinator_fingerprint is not None and _plain(coordinator_fingerprint) != _plain(coordinator.fingerprint):
        raise ConfigurationError(
            f"the invitation's coordinator has the fingerprint {coordinator.fingerprint}, not the one you gave. Do not "
            "enroll: ask the coordinator, by telephone, how the invitation was sent"
        )
    if home.request_file.exists():
        known = home.invitation()
        if known.digest != invitation.digest and _moved(known, invitation):
            write_atomically(home.invitation_file, document)
            return Enrolment(invitation, home.request_file.read_bytes(), home.identity().public, new=False, moved=True)
        if known.digest != invitation.digest:
            raise ConfigurationError(
                f"{home.root} is enrolled with another invitation; one home serves one federation. Use another --home"
            )
        return Enrolment(invitation, home.request_file.read_bytes(), home.identity().public, new=False)
    identity = _identity(home)
    supernode = _supernode_key(home)
    write_atomically(home.keys / "ca.crt", invitation.ca_certificate.encode(), mode=0o644)
    write_atomically(home.invitation_file, document)
    if not home.config_file.exists():
        write_atomically(home.config_file, STARTER.format(site=invitation.site).encode())
    request = make_request(invitation, identity, supernode)
    write_atomically(home.request_file, request, mode=0o644)  # last: it marks the enrolment as complete
    return Enrolment(invitation, request, identity.public, new=True)


def _moved(known: Invitation, new: Invitation) -> bool:
    """True where two invitations differ in the server's address and port alone, of the same coordinator and CA."""
    apart = {"address": new.address, "port": new.port, "nonce": new.nonce, "formats": new.formats}
    return known.model_copy(update=apart) == new


def _plain(fingerprint: str) -> str:
    return "".join(fingerprint.lower().split())


def _identity(home: Home) -> Identity:
    file = home.keys / "identity.key"
    if not file.exists():
        Identity.generate().save(file)
    return Identity.load(file)


def _supernode_key(home: Home) -> ec.EllipticCurvePrivateKey:
    """The key in OpenSSH form, as Flower's SuperNode reads it."""
    file = home.keys / "supernode.key"
    if not file.exists():
        made = ec.generate_private_key(ec.SECP384R1())
        private = made.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        )
        write_secret(file, private)
    key = serialization.load_ssh_private_key(file.read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigurationError(f"{file} is not an elliptic-curve key")
    return key
