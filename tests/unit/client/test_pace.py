"""A site that comes too late is charged once, and then says so before it is charged; one that is waited for goes on."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.site import Coordinator, Site

from consilium_client.agent import pace, round_work
from consilium_client.agent.pace import enough
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import Advertise, Advertised, Refusal, Update
from consilium_shared.study import Study


@pytest.fixture
def coordinator(tmp_path: Any) -> Coordinator:
    """Of a study whose round_timeout is 20 s."""
    made = Coordinator(tmp_path)
    contract = made.study.contract
    made.study = Study.model_validate({**contract, "aggregation": {**contract["aggregation"], "round_timeout": "20s"}})
    made.model = made.pack(made.study)
    return made


@pytest.fixture
def slow(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A site whose training takes ``slow.seconds``."""
    clock = SimpleNamespace(now=0.0, seconds=65.0, monotonic=lambda: clock.now)
    train = round_work.train

    def later(*arguments: Any, **named: Any) -> Any:
        clock.now += clock.seconds
        return train(*arguments, **named)

    monkeypatch.setattr(round_work, "train", later)
    monkeypatch.setattr(pace, "time", clock)
    site.approve()
    clock.site = site
    yield clock


def keys(site: Site, number: int, attempt: int = 1) -> messages.Answer:
    request = Advertise(**site.coordinator.common(), of="training", round=number, attempt=attempt)
    return site.ask(messages.encode(request, site.coordinator.key))


def trained(site: Site, number: int) -> tuple[bytes, tuple[bytes, bytes]]:
    header = site.coordinator.train(number)
    answer = site.requests.handle(header, site.coordinator.model)
    assert isinstance(site.coordinator.read(answer), Update), site.coordinator.read(answer)
    return header, answer


def test_an_update_that_came_too_late_is_the_last_that_is_charged_and_the_site_says_what_it_needs(slow: Any) -> None:
    trained(slow.site, 1)
    said = keys(slow.site, 2)
    assert isinstance(said, Refusal) and said.reason == "too-slow"
    assert said.detail.startswith("a round takes this site up to 80 s, and round_timeout is 20 s: its update of")
    assert slow.site.charges() == 1
    slow.site.restart()  # on a faster machine
    assert isinstance(keys(slow.site, 3), Advertised)


def test_a_key_that_was_given_before_is_no_way_to_a_charge_either(slow: Any) -> None:
    early = slow.site.coordinator.train(2)
    trained(slow.site, 1)
    said = slow.site.ask(early, slow.site.coordinator.model)
    assert isinstance(said, Refusal) and said.reason == "too-slow" and slow.site.charges() == 1


def test_the_round_itself_is_asked_for_again_and_its_late_update_may_still_be_used(slow: Any) -> None:
    trained(slow.site, 1)
    assert isinstance(keys(slow.site, 1, attempt=2), Advertised)


def test_a_slow_site_that_is_waited_for_goes_on(slow: Any) -> None:
    header, answer = trained(slow.site, 1)
    slow.site.coordinator.opened(header, answer)
    assert isinstance(keys(slow.site, 2), Advertised)


def test_one_that_was_in_time_and_not_opened_goes_on(slow: Any) -> None:
    slow.seconds = 19.0
    trained(slow.site, 1)
    assert isinstance(keys(slow.site, 2), Advertised)


@pytest.mark.parametrize(("took", "said"), [(20.001, 40), (40.0, 40), (40.1, 80), (65.0, 80), (700.0, 1280)])
def test_of_the_time_that_it_took_no_more_than_the_power_of_two_is_said(took: float, said: float) -> None:
    assert enough(took, 20.0) == said
