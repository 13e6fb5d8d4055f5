"""A site that comes too late is charged once, and then says so before it is charged; one that is waited for goes on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support.site import Coordinator, Site

from consilium_client.agent import pace, round_work
from consilium_client.agent.administration import Administration
from consilium_client.agent.pace import enough
from consilium_client.state.paces import PaceOfRound, Paces
from consilium_client.training import fit, forecast
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.protocol import messages
from consilium_shared.protocol.messages import Advertise, Advertised, Refusal, Update
from consilium_shared.study import Study
from dpsgd.engines import Engine


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
    clock: Any = SimpleNamespace(now=0.0, seconds=65.0, monotonic=lambda: clock.now)
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


def reason(answer: messages.Answer) -> str:
    assert isinstance(answer, Refusal), answer
    return answer.reason


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


def test_a_restart_knows_how_long_it_took_and_charges_no_second_late_round(slow: Any) -> None:
    trained(slow.site, 1)
    for _ in range(2):
        slow.site.restart()
        assert reason(keys(slow.site, 2)) == "too-slow"
    assert slow.site.charges() == 1


def test_another_machine_or_a_word_of_its_people_gives_it_another_try(
    slow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(slow.site, 1)
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(fit, "_processor", lambda: "a faster one")
        slow.site.restart()
        assert isinstance(keys(slow.site, 2), Advertised)
    slow.site.restart()
    assert reason(keys(slow.site, 3)) == "too-slow"
    Administration(slow.site.service).retry("synthetic-study")
    assert isinstance(keys(slow.site, 3), Advertised)


def test_the_pace_is_for_this_account_alone_and_goes_with_the_study(slow: Any) -> None:
    trained(slow.site, 1)
    study = slow.site.coordinator.study.digest
    file = slow.site.service.paces.folder / f"{study}.json"
    assert file.stat().st_mode & 0o777 == 0o600 and slow.site.service.paces.get(study).seconds == 65.0
    slow.site.service.reject(slow.site.service.proposals.find(study), "tester", "we stop")
    assert not file.exists()


@pytest.mark.parametrize("damaged", [b"", b"{}", b'{"format":2,"round":1,"seconds":65}', b"[1]", b"\xff"])
def test_a_pace_that_cannot_be_read_is_none(tmp_path: Path, damaged: bytes) -> None:
    kept = Paces(tmp_path)
    kept.put("a" * 64, PaceOfRound(3, 1.23456, "b" * 64))
    assert kept.get("a" * 64) == PaceOfRound(3, 1.235, "b" * 64) and kept.get("c" * 64) is None
    (tmp_path / f"{'a' * 64}.json").write_bytes(damaged)
    assert kept.get("a" * 64) is None


# -- before anything was ever charged


@pytest.fixture
def forecast_of(site: Site, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``forecast_of.seconds``: what a round takes at the least; ``.asked``: how often that was measured."""
    found = SimpleNamespace(seconds=65.0, asked=0, site=site)

    def measured(*_: Any) -> float:
        found.asked += 1
        return found.seconds

    monkeypatch.setattr(forecast, "least_seconds", measured)
    site.approve()
    return found


def test_a_machine_that_cannot_be_in_time_refuses_its_first_round_before_it_is_charged(
    forecast_of: Any, caplog: pytest.LogCaptureFixture
) -> None:
    site = forecast_of.site
    asked = site.coordinator.train(1)
    said = site.ask(asked, site.coordinator.model)
    assert (said.reason, site.charges()) == ("too-slow", 0)
    assert said.detail.startswith("a round would take this site up to 80 s or more, by invented records, and round_ti")
    assert "takes this machine at least 65 s" in caplog.text
    assert reason(keys(site, 2)) == "too-slow", "and gives no key any more that costs the others an attempt"
    assert forecast_of.asked == 1
    forecast_of.seconds = 19.0
    Administration(site.service).retry("synthetic-study")
    trained(site, 2)


def test_a_forecast_a_little_too_long_is_not_believed(forecast_of: Any) -> None:
    forecast_of.seconds = 20.0 * pace.MARGIN
    trained(forecast_of.site, 1)


def test_once_a_round_was_charged_what_it_took_is_believed_and_no_forecast(forecast_of: Any) -> None:
    site, forecast_of.seconds = forecast_of.site, 1.0
    trained(site, 1)
    forecast_of.seconds = 1e6
    site.restart()
    assert isinstance(keys(site, 2), Advertised)
    trained(site, 2)
    assert forecast_of.asked == 1


def test_a_forecast_follows_from_the_plan_and_from_no_record(site: Site) -> None:
    """Twice the steps take twice as long; what is drawn is reckoned from the noised number of patients."""
    study, plan = site.coordinator.study, PrivacyPlan(0.5, 1.0, 1.0, 10, 3, 1e-3, 2.0, patients=40, count_noise=10.0)
    assert forecast.drawn(study, plan) == min(study.training.expected_batch, 20.0)
    assert forecast.drawn(study, replace(plan, patients=None, count_noise=None)) == study.training.expected_batch
    times = iter([(0.25, 0.5)] * 3 + [(9.0, 0.5), (0.25, 7.0), (0.25, 0.5)])

    class Steps:
        def __init__(self, *_: Any) -> None: ...

        def try_out(self, _: Any) -> None: ...

        def timed(self, *_: Any) -> tuple[float, float]:
            return next(times)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forecast, "PrivateSteps", Steps)
        cpu, fitting = torch.device("cpu"), 32
        once = forecast.least_seconds(study, plan, cpu, "book-keeping", fitting)
        assert once == pytest.approx(10 * (0.5 + 0.25 * forecast.drawn(study, plan) / fitting))
        twice = forecast.least_seconds(study, replace(plan, steps_per_round=20), cpu, "book-keeping", fitting)
        assert twice == pytest.approx(2 * once), "a moment in which the machine was busy does not count"


STEPS_BY_ENGINE: tuple[tuple[int, Engine], ...] = ((1, "book-keeping"), (10_000, "opacus"))


def test_what_is_measured_are_real_steps(site: Site) -> None:
    plan = PrivacyPlan(0.5, 1.0, 1.0, 10, 3, 1e-3, 2.0)
    few, many = (
        forecast.least_seconds(site.coordinator.study, replace(plan, steps_per_round=n), torch.device("cpu"), way, 32)
        for n, way in STEPS_BY_ENGINE
    )
    assert 0 < few < many


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
