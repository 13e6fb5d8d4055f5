"""Pace of this site's rounds: one that cannot be in time is refused before it is charged.

Before the first charge the site forecasts how long a round takes at the least, on invented records. After that it knows
how long it trained, also after a restart, and that nobody opened what it gave: its result is dropped when its shares
are released. Where the others wait for a slow site its updates are opened, and it goes on. Forgotten with another
device, processor, library or setting, and by ``consilium-site retry``.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from consilium_client.agent.study_service import StudyService
from consilium_client.state.paces import PaceOfRound
from consilium_shared.canonical import canonical_digest
from consilium_shared.errors import PolicyRefusal
from consilium_shared.privacy.plan import Plan, PrivacyPlan
from consilium_shared.study import Study, seconds

log = logging.getLogger("consilium.agent")

MARGIN = 1.25
"""A forecast is believed that is so many times longer than ``round_timeout``: the machine may have been busy."""


class Pace:
    """Pace of each study."""

    def __init__(self, service: StudyService) -> None:
        self._service, self._computing = service, ""

    @contextmanager
    def measured(self, study: Study, number: int) -> Iterator[None]:
        """Measure how long a round's training takes: the block."""
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        self._service.paces.put(study.digest, PaceOfRound(number, took, self._with()))
        if took > seconds(study.aggregation.round_timeout):
            log.warning(
                "study %s: round %d took %.0f s here, and its round_timeout is %s: its update, which was charged, is "
                "used only if the others wait for it",
                study.study,
                number,
                took,
                study.aggregation.round_timeout,
            )

    def check(self, study: Study, number: int) -> None:
        """Check that round ``number`` may be begun, by how long the last one took.

        Raises:
            PolicyRefusal: an earlier round took longer than ``round_timeout``, and what it gave was never opened.
        """
        kept, pace = self._service.results.about(study.digest, "training"), self._service.paces.get(study.digest)
        timeout = seconds(study.aggregation.round_timeout)
        if kept is None or pace is None or kept.round != pace.round or pace.round >= number or pace.seconds <= timeout:
            return
        if pace.computing != self._with():
            return
        raise PolicyRefusal(
            "too-slow",
            f"a round takes this site up to {enough(pace.seconds, timeout):g} s, and round_timeout is {timeout:g} s: "
            f"its update of round {pace.round} was charged and came too late",
        )

    def check_forecast(self, study: Study, plan: Plan, *, known: bool) -> None:
        """Refuse a first round that this machine cannot finish in time, before any round of the study is charged.

        It depends on nobody's data: records are invented, and the numbers are the plan's. Once a round was charged what
        it took is known, and ``check`` decides.

        Args:
            known: nothing is measured; what was not measured before counts as in time.

        Raises:
            PolicyRefusal: it takes longer than ``round_timeout``, by more than ``MARGIN``.
            MachineError: as ``Machine.fit``.
        """
        timeout, service = seconds(study.aggregation.round_timeout), self._service
        if not isinstance(plan, PrivacyPlan) or service.spending.begun(study.digest):
            return
        config = service.config
        least = service.machine.least_seconds(study, plan, config.device, config.gradients, known=known)
        if least <= MARGIN * timeout:
            return
        log.warning(
            "study %s: a round of %d steps takes this machine at least %.0f s, measured on invented records, and its "
            "round_timeout is %s: refused, and nothing was charged",
            study.study,
            plan.steps_per_round,
            least,
            study.aggregation.round_timeout,
        )
        raise PolicyRefusal(
            "too-slow",
            f"a round would take this site up to {enough(least, timeout):g} s or more, by invented records, and "
            f"round_timeout is {timeout:g} s: nothing was charged",
        )

    def _with(self) -> str:
        """Digest of what this site computes with."""
        if not self._computing:
            from consilium_client.training.fit import machine
            from dpsgd import device

            config = self._service.config
            about = {"machine": machine(device.choose(config.device)), "way": config.gradients}
            self._computing = canonical_digest(about)
        return self._computing


def enough(took: float, timeout: float) -> float:
    """The first of twice, four times, … ``timeout`` seconds that is as long as ``took``.

    How long a training takes follows a little from which patients were drawn. The coordinator sees when answers come,
    to the millisecond; what stands in its records, for everybody, is no finer than this.
    """
    return timeout * 2.0 ** max(math.ceil(math.log2(took / timeout)), 1)
