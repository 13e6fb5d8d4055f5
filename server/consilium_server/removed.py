"""Sites that were removed from the federation, and when: a signed list that only grows.

removed.json     signed by the coordinator: {"federation": …, "removed": [{"site", "identity", "supernode", "time",
                 "reason"}, …]}
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from pydantic import Field, ValidationError

from consilium_server.federation import Home
from consilium_shared import documents
from consilium_shared.config import Strict
from consilium_shared.errors import ConfigurationError, PeerError
from consilium_shared.fields import Hex32, Name
from consilium_shared.files import write_atomically
from consilium_shared.protocol.roster import Member, Roster, SuperNodeKey
from consilium_shared.protocol.rotation import open_rotation

DOMAIN = "removed"


class Removed(Strict):
    """One removed site, with the keys that are never taken again."""

    site: Name
    identity: Hex32
    supernode: SuperNodeKey
    time: Annotated[str, Field(max_length=40)]
    reason: Annotated[str, Field(min_length=1, max_length=300)]


class RemovedSites(Strict):
    """The list."""

    federation: Hex32
    removed: tuple[Removed, ...]


def read(home: Home) -> tuple[Removed, ...]:
    """Sites that were removed; raises ConfigurationError when the list was edited."""
    try:
        body, signature = documents.parse(home.removed_file.read_bytes())
        documents.verify(body, signature, DOMAIN, home.coordinator().public)
        found = RemovedSites.model_validate(body)
    except FileNotFoundError:
        return ()
    except (OSError, PeerError, ValidationError) as error:
        raise ConfigurationError(
            f"{home.removed_file} was edited or damaged: restore it from a backup; without it removed sites could come "
            "back"
        ) from error
    if found.federation != home.federation_id():
        raise ConfigurationError(f"{home.removed_file} belongs to another federation")
    return found.removed


def remove(home: Home, site: str, reason: str) -> Roster:
    """Take a site out of the federation; from now on nothing of it is taken, in studies that run neither.

    Raises:
        ConfigurationError: it was neither admitted nor invited, or was removed before.
    """
    roster, before = home.roster(), read(home)
    member = roster.member(site)
    invitation = home.invitations / f"{site}.json"
    if member is None:
        if any(each.site == site for each in before):
            invitation.unlink(missing_ok=True)  # a run before may have been killed here
            raise ConfigurationError(f"{site} was removed before")
        if not invitation.exists():
            raise ConfigurationError(f"{site} is no site of this federation; consilium-server status lists them")
    else:
        now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"
        entry = Removed(**member.model_dump(), time=now, reason=reason)
        if all(each.site != site for each in before):
            found = RemovedSites(federation=roster.federation, removed=(*before, entry))
            sealed = documents.seal(found.model_dump(mode="json"), DOMAIN, home.coordinator())
            write_atomically(home.removed_file, sealed)  # first: a crash leaves a site that is not asked
        members = tuple(each for each in roster.members if each.site != site)
        roster = Roster(federation=roster.federation, version=roster.version + 1, members=members)
        write_atomically(home.roster_file, roster.sign(home.coordinator()))
    invitation.unlink(missing_ok=True)
    return roster


def check_keys(home: Home, member: Member) -> None:
    """Refuse a name or keys of a removed site.

    Raises:
        PeerError: that name or one of those keys was removed.
    """
    for each in read(home):
        if each.site == member.site or each.identity == member.identity or each.supernode == member.supernode:
            raise PeerError(
                f"{each.site} was removed on {each.time[:10]} ({each.reason}), and its name and keys are not taken "
                "again: invite the hospital under a new name, and let it enroll into a new home"
            )


def used_keys(home: Home) -> set[str]:
    """SuperNode keys that the federation has or had: of its sites, of those that were removed, and rotated ones."""
    used = {each.supernode for each in read(home)} | {each.supernode for each in home.roster().members}
    return used | {open_rotation(file.read_bytes()).old for file in home.rotations.glob("*.json")}
