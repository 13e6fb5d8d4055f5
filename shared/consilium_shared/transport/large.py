"""Memory of large messages, given back when they are done with.

A request and its answer hold each other in httpx, so Python frees them when it next looks for such circles: after
some number of objects, whatever they hold. Two dozen pieces of 5 MiB would wait for it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

LARGE_BYTES = 1 << 20


class Asked:
    """Interceptor of Flower's clients that frees, before the next request, what a large one has left."""

    def __init__(self) -> None:
        self._left = 0

    def intercept(self, context: Any, call_next: Callable[[Any], Any]) -> Any:
        """Send one request."""
        if self._left >= LARGE_BYTES:
            gc.collect(1)
        answer = call_next(context)
        self._left = len(context.request.content) + len(answer.content)
        return answer
