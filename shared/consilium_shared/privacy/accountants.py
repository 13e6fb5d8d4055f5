"""Cross-check of ε: one history accounted by programs of others, for an auditor to compare, never to decide by."""

from __future__ import annotations

import math
from collections.abc import Iterable

from consilium_shared.limits import MOST_NOISE
from consilium_shared.privacy.accountant import LEAST_RATE, epsilon
from consilium_shared.privacy.event import DpSgdEvent, Event, GaussianEvent, NonPrivateEvent

OURS = "Consilium (privacy loss distributions)"
PLD = "dp-accounting (privacy loss distributions)"
RENYI = "dp-accounting (Rényi)"

_LARGE = 1000.0
"""Largest ε by its distributions, which beyond would fill the memory: then its Rényi bound stands in both places."""

_ORDERS = (*range(2, 65), 80, 96, 128, 192, 256, 512, 1024, 2048, 4096)


def side_by_side(events: Iterable[Event], delta: float) -> dict[str, float]:
    """ε at ``delta`` by each accountant, all as upper bounds for adding or removing one patient.

    dp-accounting shares no code with ours and sees the events' own numbers, not our grid, within the
    accountant's range of q and σ. Its distributions are on an
    interval of at least 1e-3 (1e-4 beyond 10,000 steps), so for very little loss it may answer more than ours. It takes
    about a tenth of a second for each different sampling rate and noise multiplier.

    Returns:
        ε by the accountant's name; infinity by all of them where an event was not private.

    Raises:
        ConfigurationError: ``delta`` is refused by ``check_delta``.
    """
    history = list(events)
    ours = epsilon(history, delta)
    private = [event for event in history if not isinstance(event, NonPrivateEvent)]
    if len(private) < len(history):
        return dict.fromkeys((OURS, PLD, RENYI), math.inf)
    if not private:
        return dict.fromkeys((OURS, PLD, RENYI), 0.0)
    renyi = _renyi(private, delta)
    return {OURS: ours, PLD: _pld(private, delta, renyi), RENYI: renyi}


def _renyi(events: list[DpSgdEvent | GaussianEvent], delta: float) -> float:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.rdp import RdpAccountant

    accountant = RdpAccountant(_ORDERS, NeighboringRelation.ADD_OR_REMOVE_ONE)
    for (q, sigma), count in _counted(events).items():
        accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), count)
    return float(accountant.get_epsilon(delta))


def _pld(events: list[DpSgdEvent | GaussianEvent], delta: float, renyi: float) -> float:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    counted = _counted(events)
    interval = 1e-3 if sum(counted.values()) <= 10_000 else 1e-4
    if renyi > _LARGE:
        return renyi
    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, interval)
    for (q, sigma), count in counted.items():
        accountant.compose(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), count)
    return float(accountant.get_epsilon(delta))


def _counted(events: list[DpSgdEvent | GaussianEvent]) -> dict[tuple[float, float], int]:
    counted: dict[tuple[float, float], int] = {}
    for event in events:
        q, count = (1.0, 1) if isinstance(event, GaussianEvent) else (event.sampling_rate, event.steps)
        pair = max(q, LEAST_RATE), min(event.noise_multiplier, MOST_NOISE)
        counted[pair] = counted.get(pair, 0) + count
    return counted
