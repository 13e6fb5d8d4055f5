"""Present activity of the agent, as ``consilium-site status`` shows it."""

from __future__ import annotations

from typing import Literal

Doing = Literal["waiting", "reading data", "training", "evaluating"]


class Activity:
    """Present activity. It is replaced as a whole, so that any thread may read it.

    Attributes:
        now: ``doing``, and of which study, round and step where that says something.
    """

    def __init__(self) -> None:
        self.now: dict[str, str | int] = {"doing": "waiting"}

    def begin(self, doing: Doing, **progress: str | int) -> None:
        """Replace the activity: from now on the agent does this."""
        self.now = {"doing": doing, **progress}

    def wait(self) -> None:
        """Replace the activity: the agent waits for a request."""
        self.begin("waiting")
