"""A clipping norm that follows the gradients: where it goes, what it costs, and that a site goes on where it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import studies
from torch import nn

from consilium_client.state.clipping_norms import ClippingNorms
from consilium_client.state.results import Results
from consilium_client.training import trainer
from consilium_client.training.trainer import TrainResult, train
from consilium_shared import limits
from consilium_shared.errors import IntegrityError
from consilium_shared.limits import LEAST_CLIPPING_NORM, MOST_CLIPPING_NORM
from consilium_shared.privacy.event import DpSgdEvent
from consilium_shared.protocol.messages import Update
from consilium_shared.study import Study
from dpsgd import adaptive
from dpsgd.adaptive import AdaptiveClipping, following, marks
from dpsgd.noise import Noise
from dpsgd.private_optimizer import PrivateOptimizer
from dpsgd.row_owners import RowOwners
from dpsgd.tape import Tape

PATIENTS, PLACES = 400, 50


def optimizers(spec: AdaptiveClipping, noise: float, start: float) -> tuple[PrivateOptimizer, nn.Parameter]:
    parameter = nn.Parameter(torch.zeros(PLACES))
    optimizer = PrivateOptimizer(
        torch.optim.SGD([parameter], 0.0),
        Tape(),
        clipping_norm=start,
        noise_multiplier=noise,
        expected_batch=PATIENTS,
        noise=Noise(bytes(32)),
        adaptive=spec,
    )
    return optimizer, parameter


def norms(spec: AdaptiveClipping, noise: float = 0.0, start: float = 1.0, patients: int = PATIENTS) -> Iterator[float]:
    """After each step on patients whose gradients have the norms 1/400, 2/400 … 1."""
    optimizer, parameter = optimizers(spec, noise, start)
    gradients = torch.zeros(patients, PLACES)
    gradients[:, 0] = torch.linspace(1 / patients, 1, patients)
    while True:
        optimizer.begin()
        optimizer.tape.open(RowOwners(torch.arange(patients), torch.device("cpu")))
        optimizer.tape.record_gradients(parameter, gradients)
        optimizer.accumulate()
        optimizer.finish()
        yield optimizer.clipping_norm


def after(steps: int, found: Iterator[float]) -> float:
    return [next(found) for _ in range(steps)][-1]


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("start", [0.01, 1.0, 30.0])
def test_the_norm_comes_to_be_longer_than_the_asked_fraction_of_gradients(quantile: float, start: float) -> None:
    spec = AdaptiveClipping(quantile=quantile, rate=0.5)
    assert after(150, norms(spec, start=start)) == pytest.approx(quantile, rel=0.03)
    assert after(150, norms(spec, noise=1.0, start=start)) == pytest.approx(quantile, rel=0.2)


@pytest.mark.parametrize("patients", [100, 800])
def test_it_comes_there_however_many_patients_there_are(patients: int) -> None:
    spec = AdaptiveClipping(quantile=0.8)
    assert after(400, norms(spec, patients=patients)) == pytest.approx(0.8, rel=0.03)


def test_a_step_moves_it_by_the_published_rule() -> None:
    spec = AdaptiveClipping(quantile=0.7, rate=0.3)
    below = torch.full((PATIENTS,), math.inf, dtype=torch.float64)  # all gradients are zero: the fraction is 1
    total = float(marks(below, spec).sum())
    assert following(2.0, total, PATIENTS, spec) == pytest.approx(2.0 * math.exp(-0.3 * (1.0 - 0.7)))
    above = torch.full((PATIENTS,), 1e-9, dtype=torch.float64)
    total = float(marks(above, spec).sum())
    assert following(2.0, total, PATIENTS, spec) == pytest.approx(2.0 * math.exp(-0.3 * (0.0 - 0.7)))


def test_no_noise_moves_it_farther_than_all_patients_could() -> None:
    spec = AdaptiveClipping(quantile=0.25, rate=0.5)
    assert following(1.0, 1e9, PATIENTS, spec) == pytest.approx(math.exp(-0.5 * 0.75))
    assert following(1.0, -1e9, PATIENTS, spec) == pytest.approx(math.exp(0.5 * 0.25))


def test_it_stays_within_what_a_contract_may_ask_for() -> None:
    spec = AdaptiveClipping(rate=1.0)
    assert following(LEAST_CLIPPING_NORM, 1e9, 1, spec) == LEAST_CLIPPING_NORM
    assert following(MOST_CLIPPING_NORM, -1e9, 1, spec) == MOST_CLIPPING_NORM


def test_a_patient_who_is_dropped_has_no_mark_and_no_mark_exceeds_one() -> None:
    ratios = torch.tensor([0.0, 1e-300, 0.9, 1.0, 1.1, math.inf], dtype=torch.float64)
    for quantile in (0.05, 0.5, 0.95):
        found = marks(ratios, AdaptiveClipping(quantile=quantile))
        assert found[0] == 0.0
        assert (found.abs() <= 1.0).all()
        assert (found[1:].diff() >= 0).all()


def test_the_mark_gets_the_noise_of_every_other_number() -> None:
    """Of many noisy sums of nobody, in steps of the lattice, the last number's deviation is that of the others."""
    optimizer, _ = optimizers(AdaptiveClipping(rate=1e-9), 1.5, 1.0)
    drawn = []
    for _ in range(2000):
        optimizer.begin()
        assert optimizer._drawing is not None
        optimizer._drawing.result()
        drawn.append(optimizer._drawn.clone())
        optimizer.finish()
    deviation = torch.stack(drawn).std(dim=0) * optimizer.lattice.step
    assert len(deviation) == PLACES + 1
    assert float(deviation[-1]) == pytest.approx(1.5, rel=0.08)
    assert float(deviation[:-1].mean()) == pytest.approx(1.5, rel=0.02)


# At a site


def test_the_norm_goes_on_from_the_round_before_and_a_round_made_again_begins_as_it_did(tmp_path: Path) -> None:
    kept = ClippingNorms(tmp_path)
    assert kept.before("study", 1) is None
    for number, norm in ((1, 0.5), (2, 0.25), (3, 0.125)):
        kept.put("study", number, norm)
    again = ClippingNorms(tmp_path)
    assert [again.before("study", number) for number in (3, 4, 9)] == [0.25, 0.125, 0.125]
    again.put("study", 3, 0.75)
    assert (again.before("study", 3), again.before("study", 4)) == (0.25, 0.75)
    assert again.before("another", 2) is None
    again.put("study", 1, 0.3)  # the rounds after it are to be made again
    assert (again.before("study", 1), again.before("study", 2), again.before("study", 9)) == (None, 0.3, 0.3)
    again.forget("study")
    assert again.before("study", 4) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"one":1}', b'{"1":"a"}', b'{"1":0}', b'{"1":1e300}'])
def test_a_damaged_file_is_named_and_not_believed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "study.json").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"damaged|no study has"):
        ClippingNorms(tmp_path).before("study", 2)


def test_a_contract_without_privacy_has_nothing_to_clip() -> None:
    content: dict[str, Any] = studies.contract(
        "logistic",
        {"features": [{"name": "x"}]},
        training={"expected_batch": 1, "adaptive_clipping": {}},
        privacy={"epsilon": 1.0, "delta": 1e-3, "clipping_norm": 1.0},
    )
    spec = Study.model_validate(content).training.adaptive_clipping
    assert spec is not None
    assert (spec.quantile, spec.rate) == (0.5, 0.2)
    with pytest.raises(ValueError, match="nothing is clipped"):
        Study.model_validate({**content, "privacy": {"mode": "none"}})


def test_the_range_of_an_adaptive_norm_is_what_a_message_may_say() -> None:
    """The engine has limits of its own; a site's next norm must pass those of the protocol."""
    assert (adaptive.LEAST_NORM, adaptive.MOST_NORM) == (limits.LEAST_CLIPPING_NORM, limits.MOST_CLIPPING_NORM)


@pytest.fixture
def site(coordinator: Any, new_site: Callable[[Any], Any]) -> Any:
    content = coordinator.study.contract
    content["training"]["adaptive_clipping"] = {"quantile": 0.5, "rate": 0.5}
    coordinator.study = Study.model_validate(content)
    coordinator.model = coordinator.pack(coordinator.study)
    made = new_site(coordinator)
    made.approve()
    return made


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float | None, TrainResult]]:
    """What each round here began with and gave."""
    found: list[tuple[float | None, TrainResult]] = []

    def note(*arguments: Any, clipping_norm: float | None, **named: Any) -> TrainResult:
        found.append((clipping_norm, train(*arguments, clipping_norm=clipping_norm, **named)))
        return found[-1][1]

    monkeypatch.setattr(trainer, "train", note)
    return found


def test_a_site_begins_each_round_where_it_ended_the_one_before_and_is_charged_as_ever(
    site: Any, trained: list[tuple[float | None, TrainResult]]
) -> None:
    for number in (1, 2, 3):
        assert isinstance(site.ask(site.coordinator.train(number), site.coordinator.model), Update)
        site.restart()
    ended = [result.clipping_norm for _, result in trained]
    assert [began for began, _ in trained] == [None, *ended[:2]]
    assert {*ended} != {1.0}  # a step's change is held to a fraction's, so two may undo each other
    plan = site.service.spending.approval(site.coordinator.study.digest).plan
    events = site.service.spending.state("synthetic-table").study(site.coordinator.study.digest)
    assert [event for event in events if isinstance(event, DpSgdEvent)] == [plan.event()] * 3


def test_a_round_that_a_crash_interrupted_is_the_same_round_again(
    site: Any, trained: list[tuple[float | None, TrainResult]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Crash(BaseException):
        pass

    def crash(*_: Any) -> None:
        raise Crash

    coordinator = site.coordinator
    site.ask(coordinator.train(1), coordinator.model)
    with monkeypatch.context() as dying, pytest.raises(Crash):
        dying.setattr(Results, "put", crash)  # when the norm that the round ended with is on the disk
        site.requests.handle(coordinator.train(2), coordinator.model)
    site.restart()
    site.ask(coordinator.train(2), coordinator.model)
    (_, first), (before, lost), (again, kept) = trained
    assert before == again == first.clipping_norm
    assert (lost.update == kept.update).all()
    assert lost.clipping_norm == kept.clipping_norm
    assert site.charges() == 2
