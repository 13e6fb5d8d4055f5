"""Account of a study on an asset, its approval, and a charged use of the data: plain values, without behaviour."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from consilium_client.state.draw_seeds import Use
from consilium_shared.privacy.budget import Budget
from consilium_shared.privacy.event import Event
from consilium_shared.privacy.plan import Plan


@dataclass(frozen=True)
class Account:
    """Account of a study on an asset: who is charged, by which plan, within which budget.

    Attributes:
        study: the study's digest.
        name: its name.
        asset: whose patients it uses.
        plan: the approved one, or the one to be approved.
        budget: the asset's, as the site's policy has it.
        most_alone: ε that the asset may come to should own shares of noise be all that protects it, by that policy.
    """

    study: str
    name: str
    asset: str
    plan: Plan
    budget: Budget
    most_alone: float = math.inf


@dataclass(frozen=True)
class Approval:
    """A study that somebody here approved, as the ledger has it."""

    study: str
    name: str
    asset: str
    epsilon: float
    by: str
    plan: Plan
    roster: str | None


@dataclass(frozen=True)
class ChargedUse:
    """A use of the data whose charge is in the ledger. The steps of ``event`` may run now, on this seed, and no others.

    Attributes:
        study: the study's digest.
        use: what the charge pays for.
        seq: number of the charge's entry.
        number: 1 for the first charge of this round and purpose.
        event: what was charged.
        study_epsilon: ε of this study's own history with it, at the study's δ; infinity without privacy.
        seed: 32 secret bytes of this draw alone.
    """

    study: str
    use: Use
    seq: int
    number: int
    event: Event
    study_epsilon: float
    seed: bytes = field(repr=False)


def reported(epsilon: float) -> float | None:
    """ε of a study as it is reported to the coordinator: rounded up to thousandths; None for infinity.

    >>> reported(1.23401), reported(math.inf)
    (1.235, None)
    """
    return None if math.isinf(epsilon) else math.ceil(epsilon * 1000) / 1000
