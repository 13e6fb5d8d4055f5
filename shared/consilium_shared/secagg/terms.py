"""The terms of one secure sum: what is summed, from which model, by whom, and how many it takes to open it.

Both ends make the same terms from the approved contract and the request, and their digest goes into every key, seal,
commitment and signature of the sum. Sites that were told different things have masks that do not cancel, so nothing
but noise comes out (that answers model inconsistency: Pasquini et al. 2022).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field, model_validator

from consilium_shared import limits
from consilium_shared.canonical import canonical_bytes, canonical_digest
from consilium_shared.config import Strict
from consilium_shared.documents import signature_bytes
from consilium_shared.errors import PeerError
from consilium_shared.fields import Hex32, Hex64
from consilium_shared.identity import Identity, PublicIdentity
from consilium_shared.study import Aggregation, Name, Study, ThreatModel

PROTOCOL = "consilium-secagg/1"
ADVERT_DOMAIN = "secagg-advert"
SURVIVORS_DOMAIN = "secagg-survivors"

Purpose = Literal["training", "evaluation"]
Attempt = Annotated[int, Field(ge=1, le=limits.ATTEMPTS)]
Bits = Literal[16, 32, 64]


class Slot(Strict):
    """Slot of a sum: study, purpose, round and attempt that a site's keys are for; they serve no other."""

    federation: Hex32
    study: Hex32
    roster: Hex32
    purpose: Purpose
    round: Annotated[int, Field(ge=1, le=limits.ROUNDS)]
    attempt: Attempt


class Advert(Strict):
    """A site's public key for one slot, signed by its identity."""

    key: Hex32
    """X25519 (RFC 7748), fresh for this slot."""
    signed: Annotated[tuple[Attempt, ...], Field(max_length=limits.ATTEMPTS)] = ()
    """Earlier attempts at the same sum in which the site has signed a set of survivors. In all others before this one
    it has not, and never will."""
    counts: bool = False
    """Offer to add evaluation counts where a sum carries some, if enough others of the cohort offer them too."""
    signature: Hex64

    @classmethod
    def sign(
        cls,
        slot: Slot,
        site: str,
        key: bytes,
        identity: Identity,
        *,
        signed: tuple[int, ...] = (),
        counts: bool = False,
    ) -> Advert:
        """The advertisement of ``key`` (32 bytes) by ``site`` for ``slot``."""
        signature = identity.sign(ADVERT_DOMAIN, _advertised(slot, site, key.hex(), signed, counts))
        return cls(key=key.hex(), signed=signed, counts=counts, signature=signature.hex())

    def verify(self, slot: Slot, site: str, public: PublicIdentity) -> None:
        """Raises SignatureError unless ``site``, with this identity, advertised exactly this for ``slot``."""
        told = _advertised(slot, site, self.key, self.signed, self.counts)
        public.verify(ADVERT_DOMAIN, told, signature_bytes(self.signature))


class Segment(Strict):
    """A part of the summed vector: ``length`` integers modulo 2^``bits``."""

    name: Name
    bits: Bits
    length: Annotated[int, Field(ge=1, le=limits.PARAMETERS)]

    @property
    def bytes(self) -> int:
        """Bytes of one site's masked segment."""
        return self.bits // 8 * self.length


class Terms(Strict):
    """One sum. The cohort are those whose advertisements stand here, sorted by name."""

    slot: Slot
    model: Hex32
    """SHA-256 of the model that the sites were sent."""
    segments: Annotated[tuple[Segment, ...], Field(min_length=1, max_length=4)]
    threat_model: ThreatModel
    adverts: Annotated[dict[Name, Advert], Field(min_length=2, max_length=limits.SITES)]
    corrupt: Annotated[int | None, Field(ge=0, le=limits.SITES)] = None
    """Number of sites of the cohort that may lie, by the contract and the roster (``tolerated``); None for what the
    threat model says of the cohort alone."""

    @model_validator(mode="after")
    def _distinct(self) -> Terms:
        if list(self.adverts) != sorted(self.adverts):
            raise ValueError("a cohort is sorted by name")
        if len({advert.key for advert in self.adverts.values()}) != len(self.adverts):
            raise ValueError("two sites advertise the same key")
        if len({segment.name for segment in self.segments}) != len(self.segments):
            raise ValueError("two segments have the same name")
        return self

    @property
    def cohort(self) -> tuple[str, ...]:
        """Sites whose keys take part."""
        return tuple(self.adverts)

    @property
    def threshold(self) -> int:
        """Number of sites that it takes to open the sum."""
        return threshold(len(self.adverts), self.threat_model, self.corrupt)

    @property
    def least(self) -> int:
        """Fewest sites whose sum these terms let anybody see: two more than may lie, where the terms say how many."""
        return (self.corrupt or 0) + 2

    @property
    def masked_bytes(self) -> int:
        """Bytes of one site's masked vector."""
        return sum(segment.bytes for segment in self.segments)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything above, 64 hex digits."""
        told = self.model_dump(mode="json", exclude={"corrupt"} if self.corrupt is None else None)
        return canonical_digest({"protocol": PROTOCOL, "terms": told})

    def point(self, site: str) -> int:
        """Point where a site's shares are evaluated: 1 … cohort size."""
        return self.cohort.index(site) + 1

    def check(self, identities: Mapping[str, PublicIdentity]) -> None:
        """Verify every advertisement.

        Args:
            identities: site to identity key, of the pinned roster.

        Raises:
            PeerError: a site that is not in the roster.
            SignatureError: an advertisement that its site did not sign for this slot.
        """
        for site, advert in self.adverts.items():
            if site not in identities:
                raise PeerError(f"{site} is in the cohort, but not in the roster")
            advert.verify(self.slot, site, identities[site])

    def survivors_signed(self, survivors: tuple[str, ...]) -> bytes:
        """Bytes that a site signs about the set of sites whose masked vectors are in the sum."""
        return canonical_bytes({"terms": self.digest, "survivors": list(survivors)})

    def dead(self, successors: Mapping[str, Advert]) -> bool:
        """True where this attempt can never be opened any more, as the advertisements for the next one prove.

        Whoever advertises a key for a later attempt has promised to sign no set of survivors here, unless it says that
        it has. Only then may the same update be masked anew.

        Args:
            successors: verified, of a later attempt at the same sum.
        """
        return self.promised(successors) >= self.enough_to_abandon

    def promised(self, successors: Mapping[str, Advert]) -> int:
        """Number of the cohort that promise, by their advertisements for a later attempt, to sign nothing here."""
        number = self.slot.attempt
        return sum(site in self.adverts and number not in each.signed for site, each in successors.items())

    def counting(self, sites: Iterable[str]) -> int:
        """Number of these sites of the cohort that offer counts."""
        return sum(self.adverts[site].counts for site in sites)

    def adds_counts(self, minimum: int) -> bool:
        """True where the sites that offer counts add them: the sum carries some, and ``minimum`` of the cohort offer.

        It follows from what every site of the cohort knows, so that no one adds counts where the others add zeros.
        """
        rides = any(segment.name == "counts" for segment in self.segments)
        return rides and self.counting(self.cohort) >= minimum

    def check_shares(self, survivors: int, honest: int) -> None:
        """Check that a sum over so many survivors holds the noise of ``honest`` honest sites, and no other is opened.

        Whatever all corrupt sites of the roster do: they know their own noise, and may have added none.

        Raises:
            PeerError: it may hold less.
        """
        if honest == 1:
            return
        liars = self.corrupt or 0
        if liars < 1:
            raise PeerError("noise is shared, and the terms reckon with no corrupt site")
        if survivors - liars < honest:
            raise PeerError(
                f"{survivors} sites, of which {liars} may be corrupt: fewer than the {honest} whose noise is the whole"
            )
        if 2 * self.threshold - len(self.adverts) <= liars:
            raise PeerError(f"{liars} corrupt sites could have two sets of these {len(self.adverts)} opened")

    def check_counts(self, survivors: Iterable[str], minimum: int) -> None:
        """Raises PeerError where the sum over these sites would have the counts of a few, fewer than ``minimum``.

        It binds those that add none as well: it is their shares, too, that would open the few others' counts.
        """
        counting = self.counting(survivors)
        if self.adds_counts(minimum) and 0 < counting < minimum:
            raise PeerError(f"{counting} of the survivors have added counts, and the least is {minimum}, or none")

    @property
    def enough_to_abandon(self) -> int:
        """Number of sites whose promises make it certain that the sum is never opened: n + n_C - t + 1.

        The promises of corrupt sites are worth nothing: where A sites promise, n - (A - n_C) can still sign, and with
        fewer than the threshold t nobody learns the sum.
        """
        sites = len(self.adverts)
        return sites + _liars(sites, self.threat_model, self.corrupt) - self.threshold + 1


def threshold(sites: int, threat_model: ThreatModel, liars: int | None = None) -> int:
    """Shares that open a sum of ``sites`` sites, at least 2.

    ``malicious-server``: floor(2n/3) + 1. With n_C < n/3 corrupt sites 2t > n + n_C, so that no two different sets of
    survivors are both signed by t sites, of which the honest sign once (Bonawitz et al. 2017, theorem 6.5).
    ``honest-but-curious``: floor(n/2) + 1, against t - 1 curious sites.

    Where more of these sites may lie, since all the liars of a larger roster may be among them (``liars``), at least
    floor((n + n_C) / 2) + 1: then 2t > n + n_C again, and from n_C + 2 sites on n_C < t <= n.

    >>> threshold(10, "malicious-server"), threshold(10, "honest-but-curious")
    (7, 6)
    >>> threshold(4, "malicious-server", liars=3)  # of a roster of ten
    4
    """
    least = 2 * sites // 3 + 1 if threat_model == "malicious-server" else sites // 2 + 1
    return max(2, least, (sites + (liars or 0)) // 2 + 1)


def corrupt(sites: int, threat_model: ThreatModel) -> int:
    """Number of sites that may lie: fewer than a third; in the honest-but-curious model none does."""
    return (sites - 1) // 3 if threat_model == "malicious-server" else 0


def tolerated(rules: Aggregation, roster: int) -> int | None:
    """Number of sites of a roster of so many that may lie, by a study's contract, wherever the coordinator puts them.

    None where only the cohort of each round counts: in contracts that came before the key, and where nobody lies.
    """
    if rules.threat_model != "malicious-server" or rules.corrupt_sites is None:
        return None
    return corrupt(roster, rules.threat_model) if rules.corrupt_sites == "third" else rules.corrupt_sites


def least_sites(rules: Aggregation, roster: int) -> int:
    """Fewest sites whose sum is opened in a study with a roster of so many, and fewest whose counts are added up.

    Two more than may lie: those could subtract their own parts, and what is left is of two hospitals or more.
    """
    return max(rules.min_sites, (tolerated(rules, roster) or 0) + 2)


def fewest_sites(study: Study, roster: Sized) -> int:
    """Fewest sites whose sum is opened in a study: ``least_sites`` of its contract and of its roster.

    Args:
        study: the contract.
        roster: the members of its roster, or anything that has one item for each.
    """
    return least_sites(study.aggregation, len(roster))


def holds_against(rules: Aggregation, roster: int, liars: int) -> bool:
    """True where no cohort under the contract can be split or emptied by so many lying sites of the roster.

    Nor may their false promises make an attempt look dead that can be opened (``Terms.enough_to_abandon``).
    """
    told, least = tolerated(rules, roster), least_sites(rules, roster)
    cohorts = range(least, roster + 1)
    needed = {sites: threshold(sites, rules.threat_model, told) for sites in cohorts}
    reckoned = min((_liars(sites, rules.threat_model, told) for sites in cohorts), default=liars)
    split = any(2 * needed[sites] <= sites + liars for sites in cohorts)
    return least >= liars + 2 and reckoned >= liars and not split


def _liars(sites: int, threat_model: ThreatModel, told: int | None) -> int:
    """Number of lying sites, of so many, that the rules for giving up an attempt reckon with."""
    return max(corrupt(sites, threat_model), told or 0)


def _advertised(slot: Slot, site: str, key: str, signed: tuple[int, ...], counts: bool) -> bytes:
    about = {"slot": slot.model_dump(mode="json"), "site": site}
    return canonical_bytes({**about, "key": key, "signed": list(signed), "counts": counts})
