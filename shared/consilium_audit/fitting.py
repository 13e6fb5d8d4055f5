"""Limits at each charge: did it fit when it was made? Many are judged at once, so that long ledgers take no hours.

When a charge is made, three kinds of charges stand in the ledger: what ran, what was never settled, and what a later
entry settles with fewer steps, which counts in full until then. For a block of charges the state at its last one, and
beside it one step that is worse than every charge given back within the block, cost at least as much as the state at
each charge of the block. Where even that is within the smallest limit of the block, all of it fits. Else a smaller
block is looked at, and a block of one charge is judged by exactly its state.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

from consilium_shared.errors import ConfigurationError, LedgerError
from consilium_shared.ledger.chain import Charged
from consilium_shared.privacy.accountant import Pair, as_steps, within
from consilium_shared.privacy.event import NonPrivateEvent, event_from_dict

_TRY = 100
"""Cost of judging one block: that of so many different steps to compose."""

_PATIENCE = 60
"""Number of different steps composed for each charge, and for 1,000 more, before giving up: some minutes."""


@dataclass(frozen=True)
class Use:
    """One charge, as its limit is concerned.

    Attributes:
        line: of the charge.
        pair: what it is accounted as.
        charged: steps of that.
        ran: of these, how many count after its settlement.
        until: line of the settlement; infinity where there is none.
        limit: ε that all uses so far may cost together.
        delta: δ of the limit.
    """

    line: int
    pair: Pair
    charged: int
    ran: int
    until: float
    limit: float
    delta: float

    @classmethod
    def of(cls, charge: Charged, settled: int | None, limit: float, delta: float) -> Use:
        """The use of a charge that is settled in that line."""
        event = event_from_dict(charge.body.event.model_dump())
        pair, steps = as_steps(event)
        ran = steps if charge.settled is None else charge.settled
        if isinstance(event, NonPrivateEvent):
            ran = min(ran, 1)
        return cls(charge.seq, pair, steps, ran, math.inf if settled is None else settled, limit, delta)

    @property
    def returned(self) -> int:
        """Steps that its settlement gives back."""
        return self.charged - self.ran


class Fitting:
    """All uses of one asset, or of one study, in order."""

    def __init__(self, uses: Sequence[Use]) -> None:
        self._uses = uses
        back = sorted((use for use in uses if use.returned), key=lambda use: use.until)
        self._back, self._until = back, [use.until for use in back]
        changes: list[tuple[float, Pair, int]] = [(use.line, use.pair, use.charged) for use in uses]
        self._changes = sorted([*changes, *((use.until, use.pair, -use.returned) for use in back)])
        self._lines = [line for line, _, _ in self._changes]
        self._room = _PATIENCE * (len(uses) + 1000)

    def first_beyond(self, tolerance: float) -> Use | None:
        """The first use with which its limit was exceeded by more than ``tolerance``, or None.

        Raises:
            LedgerError: with the line: so many different charges come so near to their limits, and are given back, that
                to tell would take too long; or the numbers allow no cost to be computed.
        """
        state, start, size = Counter[Pair](), 0, len(self._uses)
        while start < len(self._uses):
            block = self._uses[start : start + size]
            block = list(takewhile(lambda use, delta=block[0].delta: use.delta == delta, block))  # type: ignore[misc]
            after = self._after(state, start, block)
            if self._fits(after + self._worst(block), block, tolerance):
                state, start, size = after, start + len(block), 2 * len(block)
            elif len(block) == 1:
                return block[0]
            else:
                size = len(block) // 2
        return None

    def _after(self, state: Counter[Pair], start: int, block: Sequence[Use]) -> Counter[Pair]:
        """The state at the last charge of the block, from that at the charge before it."""
        done = bisect_right(self._lines, self._uses[start - 1].line) if start else 0
        after = Counter(state)
        for _, pair, steps in self._changes[done : bisect_right(self._lines, block[-1].line)]:
            after[pair] += steps
        return after

    def _worst(self, block: Sequence[Use]) -> Counter[Pair]:
        """Steps that cost no less than those which some charge of the block sees and the last one does not."""
        first, last = bisect_right(self._until, block[0].line), bisect_right(self._until, block[-1].line)
        back = self._back[first:last]
        if not back:
            return Counter()
        return Counter({(max(use.pair[0] for use in back), min(use.pair[1] for use in back)): _most_at_once(back)})

    def _fits(self, state: Counter[Pair], block: Sequence[Use], tolerance: float) -> bool:
        limit = min(use.limit for use in block) + tolerance
        self._room -= len(state) + _TRY
        if self._room < 0:
            why = "too many different charges near it were given back"
            raise LedgerError(f"whether a limit was kept cannot be told in reasonable time: {why}", line=block[0].line)
        try:
            return within(state, block[0].delta, limit)
        except (ConfigurationError, ArithmeticError, ValueError) as error:
            raise LedgerError(f"no cost can be computed from its events: {error}", line=block[0].line) from error


def _most_at_once(uses: Sequence[Use]) -> int:
    """Most steps that stood in the ledger at the same time, to be given back."""
    changes = [*((use.line, use.returned) for use in uses), *((use.until, -use.returned) for use in uses)]
    return max(accumulate(change for _, change in sorted(changes)))
