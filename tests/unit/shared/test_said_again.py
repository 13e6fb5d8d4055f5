"""What the ledger says of a result that leaves in a second attempt: that it left before, only where it did."""

from __future__ import annotations

from typing import Any

import pytest

from consilium_shared.ledger.entry import Release


def said(site: Any) -> list[tuple[bool, bool]]:
    """Of each update that left: whether it is said to carry counts, and to be one that left before."""
    bodies = [entry.body for entry in site.service.ledger.entries if isinstance(entry.body, Release)]
    return [(body.counts, body.again) for body in bodies if body.message == "update"]


def test_the_same_update_in_a_second_attempt_is_said_to_have_left_before(coordinator: Any, site: Any) -> None:
    site.approve()
    for attempt in (1, 2):
        site.ask(coordinator.train(attempt=attempt), coordinator.model)
    assert said(site) == [(False, False), (False, True)] and site.charges() == 1


def test_an_update_that_a_crash_kept_from_leaving_is_not_said_to_have_left(
    coordinator: Any, site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.approve()
    header = coordinator.train()

    class Killed(BaseException):
        pass

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(site.requests.handler, "_release", killed)
        site.requests.handle(header, coordinator.model)
    site.restart()
    site.ask(coordinator.train(attempt=2), coordinator.model)
    assert said(site) == [(False, False)] and site.charges() == 1
