"""Charges of rounds, with the seed of the draw that each pays for; after a crash, the same draw on the same charge.

Each of these is on the disk before the next begins: the seed, the charge in the ledger, (training, its result,) the
settlement; then the seed is deleted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from consilium_client.agent.accounts import Account, ChargedUse
from consilium_client.agent.spending import Spending
from consilium_client.state.draw_seeds import DrawSeeds, Use

log = logging.getLogger("consilium.agent")


class Charges:
    """Charges of studies' rounds, from the seed of the draw to the settlement."""

    def __init__(self, spending: Spending, draw_seeds: DrawSeeds) -> None:
        self._spending, self._draw_seeds = spending, draw_seeds

    def check(self, account: Account, uses: Sequence[Use]) -> None:
        """Check that every charge which these uses of the data still need can be made, before the first one is.

        Raises:
            PolicyRefusal, BudgetRefused: as ``Spending.reserve``.
        """
        needed = [use for use in uses if self._under_way(account, use) is None]
        if needed:
            self._spending.check(account, needed)

    @contextmanager
    def begin(self, account: Account, use: Use) -> Iterator[ChargedUse]:
        """Charge a use of the data while the block runs; after a crash, take up the charge and the seed that it left.

        If the block raises, the outside learns that this draw failed: its seed is deleted, and its charge is never
        refunded. A crash of the process leaves the seed, so that the very same draw is made again on the same charge.

        Raises:
            PolicyRefusal, BudgetRefused: as ``Spending.reserve``.
        """
        charged = self._under_way(account, use)
        if charged is None:
            number = self._spending.attempts(account.study, use.round, use.purpose) + 1
            seed = self._draw_seeds.begin(account.study, use, number)
            charged = self._spending.reserve(account, use, seed)
        else:
            log.info("%s of round %d goes on with its charge, entry %d", use.purpose, use.round, charged.seq)
        try:
            yield charged
        except Exception:
            self._draw_seeds.end(account.study, use.purpose)
            raise

    def settle(self, charged: ChargedUse, steps: int) -> None:
        """Settle the charge with the steps that ran, then delete the seed; the result is on the disk before."""
        self._spending.settle(charged, steps)
        self._draw_seeds.end(charged.study, charged.use.purpose)

    def settle_kept(self, account: Account, use: Use) -> None:
        """Settle a charge in full after a crash between keeping its result and settling it; delete the seed."""
        if self._draw_seeds.under_way(account.study, use) is None:
            return
        charged = self._under_way(account, use)
        if charged is not None:
            self._spending.settle(charged, account.plan.steps_per_round if use.purpose == "training" else 1)
        self._draw_seeds.end(account.study, use.purpose)

    def _under_way(self, account: Account, use: Use) -> ChargedUse | None:
        """The unsettled charge of exactly this use that a crash left, with the seed of its draw; or None."""
        left = self._draw_seeds.under_way(account.study, use)
        return None if left is None else self._spending.unsettled(account, use, *left)
