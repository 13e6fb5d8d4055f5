"""Admission of a site: its request becomes a line of the signed roster."""

from __future__ import annotations

from consilium_server.federation import Home
from consilium_shared.errors import PeerError
from consilium_shared.files import write_atomically
from consilium_shared.protocol.joining import JoinRequest, open_invitation, open_request
from consilium_shared.protocol.roster import Member, Roster


def admit(home: Home, request_file: bytes) -> tuple[JoinRequest, bool]:
    """Check a request and add its site to the roster.

    Returns:
        The request, and whether the roster changed (False: that site with those keys was in it already).

    Raises:
        PeerError: the request is malformed, edited, for another federation, answers no invitation of ours, or claims
            a name that another key has.
    """
    request = open_request(request_file)
    roster = home.roster()
    if request.federation != roster.federation:
        raise PeerError("the request is for another federation")
    invitation_file = home.invitations / f"{request.site}.json"
    if not invitation_file.exists():
        raise PeerError(f"{request.site} was never invited; add it to federation.yaml and provision again")
    if open_invitation(invitation_file.read_bytes()).digest != request.invitation:
        raise PeerError(f"the request does not answer the invitation that was made for {request.site}")
    member = Member(site=request.site, identity=request.identity, supernode=request.supernode)
    known = roster.member(request.site)
    if known == member:
        return request, False
    if known is not None:
        raise PeerError(
            f"{request.site} is in the roster with other keys. If the hospital really made new ones, invite it under a "
            "new name: a ledger belongs to one key for its whole life"
        )
    for other in roster.members:
        if member.identity == other.identity or member.supernode == other.supernode:
            raise PeerError(f"{other.site} has one of these keys already; every site makes its own")
    members = tuple(sorted((*roster.members, member), key=lambda m: m.site))
    grown = Roster(federation=roster.federation, version=roster.version + 1, members=members)
    write_atomically(home.roster_file, grown.sign(home.coordinator()))
    return request, True
