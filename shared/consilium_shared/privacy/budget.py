"""Budget of an asset over its lifetime, what remains of it, and the arithmetic of one more use. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal

from consilium_shared.errors import ConfigurationError
from consilium_shared.privacy.accountant import check_delta, epsilon
from consilium_shared.privacy.event import Event, SharedDpSgdEvent, alone


@dataclass(frozen=True)
class Budget:
    """Budget: what everything that ever touches an asset's patients may cost together.

    Attributes:
        epsilon: greater than 0; infinity sets no limit (and gives no guarantee).
        delta: the δ at which everything is composed.

    Raises:
        ConfigurationError: a number outside its range.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not self.epsilon > 0:
            raise ConfigurationError(f"a budget's epsilon must be positive, got {self.epsilon}")
        check_delta(self.delta)


@dataclass(frozen=True)
class Quote:
    """Arithmetic of a proposed use. ``str()`` says it in words: what is spent is rounded up, what is left down.

    Attributes:
        limit: ε of the budget.
        delta: δ at which all of it is composed.
        spent: ε of what was done before.
        total: ε of what was done, what is reserved and the proposal, composed: less than the sum of their ε.
        committed: ε of what was done and what is reserved for others, composed; None when nothing is reserved.
    """

    limit: float
    delta: float
    spent: float
    total: float
    committed: float | None = None

    @property
    def before(self) -> float:
        """ε of what was done and what is reserved."""
        return self.spent if self.committed is None else self.committed

    @property
    def reserved(self) -> float:
        """Increase of ε by the reservations; 0 when there are none, or the history is without privacy already."""
        return 0.0 if math.isinf(self.spent) else max(0.0, self.before - self.spent)

    @property
    def added(self) -> float:
        """Increase of ε by the proposal; 0 when what comes before is without privacy already."""
        return 0.0 if math.isinf(self.before) else max(0.0, self.total - self.before)

    @property
    def fits(self) -> bool:
        """True where the total stays within the limit."""
        return self.total <= self.limit

    @property
    def left(self) -> float:
        """Remainder of the limit afterwards; 0 when it does not fit."""
        if math.isinf(self.limit):
            return math.inf
        return max(0.0, self.limit - self.total)

    def __str__(self) -> str:
        limit = "no limit" if math.isinf(self.limit) else f"limit {in_words(self.limit)}"
        verdict = "" if self.fits else f": over by {in_words(self.total - self.limit)}"
        held = "" if self.committed is None else f"{in_words(self.reserved)} more is reserved for approved studies, "
        return (
            f"spent ε {in_words(self.spent)}, {held}this would add {in_words(self.added)} "
            f"and make {in_words(self.total)} at δ {self.delta:g}, {limit}{verdict}"
        )


def affords(budget: Budget, spent: Sequence[Event], proposed: Sequence[Event], reserved: Sequence[Event] = ()) -> Quote:
    """Cost of ``proposed`` on top of ``spent`` and what is ``reserved`` for others; see ``Quote.fits``.

    The costs are composed, not added: a proposal whose own ε exceeds what is left may still fit.

    >>> from consilium_shared.privacy.event import DpSgdEvent
    >>> spent = [DpSgdEvent(sampling_rate=0.01, noise_multiplier=1.0, steps=500)]
    >>> quote = affords(Budget(epsilon=3.0, delta=1e-5), spent, spent)
    >>> quote.fits, in_words(quote.spent), in_words(quote.left, up=False)
    (True, '1.327', '1.171')
    """
    return Quote(
        limit=budget.epsilon,
        delta=budget.delta,
        spent=epsilon(spent, budget.delta),
        total=epsilon([*spent, *reserved, *proposed], budget.delta),
        committed=epsilon([*spent, *reserved], budget.delta) if reserved else None,
    )


def alone_of(events: Sequence[Event], delta: float) -> float | None:
    """ε of events should own shares of noise be all that protects those whose noise is shared; None where none is.

    >>> from consilium_shared.privacy.event import DpSgdEvent
    >>> whole, shared = DpSgdEvent(1.0, 6.0, 8), SharedDpSgdEvent(1.0, 6.0, 8, honest_sites=4, colluding_sites=1)
    >>> alone_of([whole], 1e-5), alone_of([shared], 1e-5) > 2 * epsilon([shared], 1e-5)
    (None, True)
    """
    if not any(isinstance(event, SharedDpSgdEvent) for event in events):
        return None
    return epsilon(map(alone, events), delta)


def in_words(value: float, *, up: bool = True) -> str:
    """An ε with three decimals, rounded up (what is spent) or down (what is left); "unbounded" for infinity."""
    if math.isinf(value):
        return "unbounded"
    rounding = ROUND_CEILING if up else ROUND_FLOOR
    return str(Decimal(repr(value)).quantize(Decimal("0.001"), rounding=rounding))
