"""Admission of a site: its request becomes a line of the signed roster."""

from __future__ import annotations

from consilium_server import removed
from consilium_server.federation import Home
from consilium_shared.errors import PeerError
from consilium_shared.files import write_atomically
from consilium_shared.protocol.joining import JoinRequest, open_invitation, open_request
from consilium_shared.protocol.roster import Member, Roster
from consilium_shared.protocol.rotation import Rotation, open_rotation


def admit(home: Home, request_file: bytes) -> tuple[JoinRequest, bool]:
    """Check a request and add its site to the roster.

    Returns:
        The request, and whether the roster changed (False: that site with those keys was in it already).

    Raises:
        PeerError: the request is malformed, edited, for another federation, answers no invitation of ours, or claims
            a name that another key has, or a key that was used before.
    """
    request = open_request(request_file)
    roster = home.roster()
    if request.federation != roster.federation:
        raise PeerError("the request is for another federation")
    invitation_file = home.invitations / f"{request.site}.json"
    if not invitation_file.exists():
        raise PeerError(f"{request.site} was never invited; add it to federation.yaml and provision again")
    invitation = open_invitation(invitation_file.read_bytes())
    earlier = home.earlier_invitations / f"{request.invitation}.json"
    if invitation.digest != request.invitation and not (
        earlier.exists() and open_invitation(earlier.read_bytes()).site == request.site
    ):
        raise PeerError(f"the request does not answer the invitation that was made for {request.site}")
    member = Member(site=request.site, identity=request.identity, supernode=request.supernode)
    known = roster.member(request.site)
    if known == member:
        return request, False
    removed.check_keys(home, member)
    if known is not None:
        raise PeerError(
            f"{request.site} is in the roster with other keys. For a new SuperNode key it sends a rotation "
            "(consilium-site rotate); with a new identity invite it under a new name: a ledger belongs to one identity "
            "for its whole life"
        )
    for other in roster.members:
        if member.identity == other.identity or member.supernode == other.supernode:
            raise PeerError(f"{other.site} has one of these keys already; every site makes its own")
    if member.supernode in removed.used_keys(home):
        raise PeerError(f"{request.site} brings a SuperNode key that a site had before; it enrolls into a new home")
    members = tuple(sorted((*roster.members, member), key=lambda m: m.site))
    grown = Roster(federation=roster.federation, version=roster.version + 1, members=members)
    write_atomically(home.roster_file, grown.sign(home.coordinator()))
    return request, True


def exchange(home: Home, rotation_file: bytes) -> tuple[Rotation, bool]:
    """Check a site's request for another SuperNode key, and write that key into the roster.

    Returns:
        The request, and whether the roster changed.

    Raises:
        PeerError: the request is malformed, edited, for another federation, of a site or identity that is not in the
            roster, in place of another key than that has now, or for a key that was used before.
    """
    request = open_rotation(rotation_file)
    roster = home.roster()
    if request.federation != roster.federation:
        raise PeerError("the rotation is for another federation")
    known = roster.member(request.site)
    if known is None or known.identity != request.identity:
        raise PeerError(f"{request.site} is not in the roster with that identity")
    if known.supernode == request.new:
        return request, False
    if known.supernode != request.old:
        raise PeerError(f"the roster has another SuperNode key of {request.site} than the one to be replaced")
    member = Member(site=request.site, identity=request.identity, supernode=request.new)
    if request.new in removed.used_keys(home):
        raise PeerError("that SuperNode key was used before; make a new one")
    version = roster.version + 1
    # First, so that of every key that the roster ever had the request in whose place it came is kept.
    write_atomically(home.rotations / f"{version:06d}-{request.site}.json", rotation_file)
    members = tuple(member if each.site == request.site else each for each in roster.members)
    changed = Roster(federation=roster.federation, version=version, members=members)
    write_atomically(home.roster_file, changed.sign(home.coordinator()))
    return request, True
