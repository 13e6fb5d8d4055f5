"""Pace of this site's rounds: after an update that came too late, the next is refused before it is charged.

The site knows how long it trained, and that nobody opened what it gave: its result is dropped when its shares are
released. Where the others wait for a slow site its updates are opened, and it goes on. Forgotten when the agent starts
again, as after any change that makes it faster; then one round is tried.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from consilium_client.state.results import Results
from consilium_shared.errors import PolicyRefusal
from consilium_shared.study import Study, seconds

log = logging.getLogger("consilium.agent")


class Pace:
    """Pace of each study: how long its last training took."""

    def __init__(self, results: Results) -> None:
        self._results = results
        self._took: dict[str, tuple[int, float]] = {}
        """Study to round and seconds."""

    @contextmanager
    def measured(self, study: Study, number: int) -> Iterator[None]:
        """Around the training of a round."""
        began = time.monotonic()
        yield
        took = time.monotonic() - began
        self._took[study.digest] = number, took
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
        """Whether round ``number`` may be begun.

        Raises:
            PolicyRefusal: an earlier round took longer than ``round_timeout``, and what it gave was never opened.
        """
        kept, (last, took) = self._results.about(study.digest, "training"), self._took.get(study.digest, (0, 0.0))
        timeout = seconds(study.aggregation.round_timeout)
        if kept is None or kept.round != last or last >= number or took <= timeout:
            return
        raise PolicyRefusal(
            "too-slow",
            f"a round takes this site up to {enough(took, timeout):g} s, and round_timeout is {timeout:g} s: "
            f"its update of round {last} was charged and came too late",
        )


def enough(took: float, timeout: float) -> float:
    """The first of twice, four times, … ``timeout`` seconds that is as long as ``took``.

    How long a training takes follows a little from which patients were drawn. The coordinator sees when answers come,
    to the millisecond; what stands in its records, for everybody, is no finer than this.
    """
    return timeout * 2.0 ** max(math.ceil(math.log2(took / timeout)), 1)
