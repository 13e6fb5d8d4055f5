"""What leaves a site in a study with ``privacy.sums`` is the sum of clipped gradients and its whole noise, no more."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import studies
from tests.support.sums import Federation, Sum, same, seed
from tests.support.training import DATA, records, run

from consilium_client.data.dataset import ArrayDataset
from consilium_shared import task
from consilium_shared.errors import ConfigurationError
from consilium_shared.models import build
from consilium_shared.models.vector import to_vector, trained, width
from consilium_shared.privacy.plan import PrivacyPlan, plan_of
from consilium_shared.private_sums import Grid, Integers
from consilium_shared.protocol.summand import read
from consilium_shared.secagg.terms import Segment
from consilium_shared.study import Study
from dpsgd.noise import Noise
from dpsgd.tape import ERROR

CPU = torch.device("cpu")
CLIPPING_NORM = 0.5


def study_of(model: str = "mlp", rate: float = 1.0, **changes: Any) -> Study:
    """A study of 40 expected patients, in the form that ``changes`` of its parts give it."""
    training = {"rounds": 3, "steps_per_round": 1, "expected_batch": 40, "optimizer": {"lr": 0.7}}
    privacy = {"mode": "dp", "epsilon": 3.0, "delta": 1e-3, "clipping_norm": CLIPPING_NORM, "noise_multiplier": 4.0}
    privacy |= {"sums": {"sampling_rate": rate}, **changes.pop("privacy", {})}
    training |= changes.pop("training", {})
    return studies.study({"name": model, "hidden": 8}, DATA[model], training=training, privacy=privacy, **changes)


def plan(study: Study) -> PrivacyPlan:
    found = plan_of(study, 0)
    assert isinstance(found, PrivacyPlan)
    return found


def integers(study: Study, data: ArrayDataset, secret: bytes) -> Integers:
    found = run(study, data, plan(study), seed=secret).integers
    assert found is not None
    return found


def noise(study: Study, secret: bytes) -> npt.NDArray[np.int64]:
    """The noise that follows from the round's secret, in steps of the grid."""
    parameters, total = width(study), torch.zeros(width(study), dtype=torch.float64)
    deviation = plan(study).noise_multiplier * CLIPPING_NORM / Grid.of(study, parameters).step
    Noise(secret).add_to(total, deviation)
    return total.numpy().astype(np.int64)


def signed(found: Integers, less: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Integers without their noise, taken off in the ring."""
    return (found - less.astype(np.uint32)).view(np.int32).astype(np.int64)


def clipped_sum(study: Study, data: ArrayDataset) -> npt.NDArray[np.float64]:
    """The sum of every record's gradient, each formed alone in float64 and clipped."""
    model, total = build(study).double(), np.zeros(width(study))
    for number in range(len(data)):
        inputs, targets = data.take(np.array([number]))
        loss = task.of(study).loss(study, CPU)(
            model(*(torch.from_numpy(each).double() for each in inputs)), *map(torch.from_numpy, targets)
        )
        found = torch.autograd.grad(loss.sum(), list(model.parameters()))
        flat = torch.cat([each.reshape(-1) for each in found]).numpy()
        total += flat * min(1.0, CLIPPING_NORM / float(np.linalg.norm(flat)))
    return total


def without(data: ArrayDataset, patient: int) -> ArrayDataset:
    kept = np.arange(len(data)) != patient
    return dataclasses.replace(
        data,
        inputs=tuple(each[kept] for each in data.inputs),
        labels=tuple(each[kept] for each in data.labels),
        patients=np.arange(kept.sum()),
        patient_count=int(kept.sum()),
        train=np.ones(kept.sum(), dtype=bool),
    )


@pytest.mark.parametrize("model", ["mlp", "small-cnn", "gru"])
def test_what_leaves_is_the_clipped_sum_on_the_grid_and_the_noise_of_the_secret(model: str) -> None:
    study, data = study_of(model), records(model, patients=12)
    grid, secret = Grid.of(study, width(study)), seed(model)
    exact = signed(integers(study, data, secret), noise(study, secret))
    off = np.linalg.norm(exact * grid.step - clipped_sum(study, data))
    # Rounding to the grid, float32 in the model, and the part of the bound that is given up to rounding.
    given_up = grid.step * math.sqrt(width(study)) / CLIPPING_NORM + 1e-5
    assert off <= grid.step * math.sqrt(width(study)) + len(data) * CLIPPING_NORM * given_up
    assert np.abs(exact).max() > 3  # it is not the noise that is compared


def test_the_noise_is_the_whole_of_the_contract_whoever_the_patients_are() -> None:
    study = study_of()
    grid, found = Grid.of(study, width(study)), []
    for number in range(40):
        secret = seed("noise", number)
        one, other = records(patients=5, seed=number), records(patients=30, seed=number + 1)
        found.append(noise(study, secret))
        # The same secret has the same noise under other patients: the difference is the difference of whole sums.
        both = [signed(integers(study, data, secret), found[-1]) * grid.step for data in (one, other)]
        assert all(np.linalg.norm(each) <= CLIPPING_NORM * 30 for each in both)
    drawn = np.concatenate(found) * grid.step / (4.0 * CLIPPING_NORM)
    assert abs(np.mean(drawn**2) - 1) < 6 * math.sqrt(2 / drawn.size)


@given(st.integers(0, 2**32 - 1), st.integers(0, 11), st.sampled_from([0.0, 1e-3, 1.0, 1e4, 1e20, math.inf, math.nan]))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_a_crafted_patient_moves_what_leaves_by_at_most_the_clipping_norm(draw: int, who: int, size: float) -> None:
    study, data = study_of(), records(patients=12, seed=draw)
    with np.errstate(all="ignore"):
        data.inputs[0][who] = np.random.default_rng(draw).standard_normal(data.inputs[0][who].shape) * size
    secret, grid = seed(draw), Grid.of(study, width(study))
    moved = (integers(study, data, secret) - integers(study, without(data, who), secret)).view(np.int32).astype(object)
    assert int((moved**2).sum()) <= int(CLIPPING_NORM / grid.step) ** 2


def test_a_cut_off_coordinate_is_cut_before_the_noise_and_brings_no_two_sums_further_apart() -> None:
    narrow, secret = study_of(aggregation={"coordinate_bound": 1e-4}), seed("narrow")
    data, limit = records(patients=12), Grid.of(narrow, width(narrow)).limit
    ours = signed(integers(narrow, data, secret), noise(narrow, secret))
    free = signed(integers(study_of(), data, secret), noise(study_of(), secret))
    assert limit < np.abs(free).max()
    assert np.array_equal(ours, np.clip(free, -limit, limit))


def test_the_same_secret_gives_the_same_integers_and_another_one_other_noise() -> None:
    study, data = study_of(rate=0.5), records(patients=30)
    first, again, other = (integers(study, data, seed(name)) for name in ("a", "a", "b"))
    assert np.array_equal(first, again)
    assert (first != other).mean() > 0.99


def test_without_a_patient_what_leaves_is_the_noise_alone() -> None:
    study, nobody = study_of(rate=1e-9), records(patients=3)
    assert np.array_equal(signed(integers(study, nobody, seed(1)), noise(study, seed(1))), np.zeros(width(study)))


# -- sums


@given(st.integers(3, 6), st.data())
@settings(derandomize=True, deadline=None, max_examples=12)
def test_whoever_drops_out_the_opened_sum_is_of_whole_summands_and_has_every_survivors_whole_noise(
    sites: int, data: st.DataObject
) -> None:
    study = study_of(rate=0.5)
    size = width(study)
    segments = (Segment(name="update", bits=32, length=size), Segment(name="weight", bits=64, length=1))
    federation = Federation(sites, handshake=False, about=str(sites))
    secrets = {site: seed(site, "round") for site in federation.names}
    given_ = {site: integers(study, records(patients=4 + n, seed=n), secrets[site]) for n, site in enumerate(secrets)}
    vectors: dict[str, dict[str, Any]] = {
        site: {"update": found, "weight": np.ones(1, np.uint64)} for site, found in given_.items()
    }
    first = Sum(federation, vectors=vectors, segments=segments)
    least = first.terms.threshold
    survivors = sorted(data.draw(st.sets(st.sampled_from(federation.names), min_size=least, max_size=sites)))
    totals = first.opened(*survivors)
    assert same(totals, first.plain(*survivors))
    noises = {site: noise(study, secrets[site]) for site in survivors}
    gradients = sum(signed(given_[site], noises[site]) for site in survivors)
    left = totals["update"].view(np.int32).astype(np.int64) - gradients
    assert np.array_equal(left, sum(noises.values()))
    deviation = plan(study).noise_multiplier * CLIPPING_NORM / Grid.of(study, size).step
    for mine in noises.values():  # with all the others at the coordinator's side one site's is whole
        others = sum(each for each in noises.values() if each is not mine)
        assert np.array_equal(left - others, mine)
        assert abs(np.mean((mine / deviation) ** 2) - 1) < 6 * math.sqrt(2 / size)
    opened = read(study, "training", sites, len(survivors), {name: each.copy() for name, each in totals.items()})
    assert opened.implausible is None and opened.weight == len(survivors)
    exact = -0.7 * Grid.of(study, size).step / 40 * totals["update"].view(np.int32)
    assert np.allclose(opened.mean, exact, rtol=1e-6, atol=0)


def test_a_sum_that_honest_sites_cannot_have_given_moves_no_model() -> None:
    study = study_of()
    for weight, number in ((3, 2**30), (2, 0), (4, 0)):
        totals: dict[str, Any] = {
            "update": np.full(width(study), number, np.uint32),
            "weight": np.full(1, weight, np.uint64),
        }
        assert read(study, "training", 3, 3, totals).implausible is not None


def test_the_step_of_a_site_alone_is_what_its_integers_say() -> None:
    study = study_of()
    result, moved = run(study, records(), plan(study), seed=seed(2)), np.zeros(width(study), np.float32)
    assert result.integers is not None
    Grid.of(study, width(study)).update(result.integers, moved)
    before = np.abs(trained(to_vector(build(study)), study)).max()
    assert np.allclose(result.update, moved, atol=4e-7 * (1 + before))


# -- the contract


@pytest.mark.parametrize(
    "wrong",
    [
        {"training": {"steps_per_round": 2}},
        {"training": {"optimizer": {"lr": 0.1, "momentum": 0.9}}},
        {"training": {"optimizer": {"lr": 0.1, "weight_decay": 0.1}}},
        {"training": {"optimizer": {"name": "adam", "lr": 0.1}}},
        {"training": {"optimizer": {"lr": 0.1, "l1": 0.1}}},
        {"training": {"optimizer": {"lr": 0.1, "schedule": {"warmup": 2}}}},
        {"training": {"proximal": 0.1}},
        {"training": {"adaptive_clipping": {}}},
        {"training": {"class_sampling": [1.0, 2.0]}},
        {"aggregation": {"weighting": "equal"}},
        {"aggregation": {"weighting": "equal", "ring_bits": 16}},
        {"privacy": {"sums": {"honest_sites": 2}}},
        {"privacy": {"sums": {"sampling_rate": 0.0}}},
    ],
)
def test_what_would_come_after_a_sites_noise_or_differ_between_sites_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"privacy\.sums|honest_sites|sampling_rate"):
        study_of(**wrong)


def test_every_site_has_the_contracts_plan_whatever_its_patients_and_none_is_released() -> None:
    study = study_of(rate=0.5)
    assert plan_of(study, 3) == plan_of(study, 60) == plan_of(study, 0)
    assert (plan(study).patients, plan(study).count_event()) == (None, None)
    assert (plan(study).sampling_rate, plan(study).noise_multiplier) == (0.5, 4.0)
    for patients, why in ((81, "more in a step"), (2000, "delta")):
        with pytest.raises(ConfigurationError, match=why):
            plan_of(study, patients)
    cheap = study_of(privacy={"noise_multiplier": 0.5})
    with pytest.raises(ConfigurationError, match="would cost"):
        plan_of(cheap, 0)


def test_too_many_patients_or_numbers_for_the_ring_are_refused() -> None:
    study = study_of(training={"expected_batch": 1_000_000})
    with pytest.raises(ConfigurationError, match="32 bits"):
        Grid.of(study, 10_000_000)
    with pytest.raises(ConfigurationError, match="32 bits"):
        Grid.of(study_of(), 10_000_000).check_noise(1e4)
    assert 1 / 250 > Grid.of(study_of(), 1000).step * math.sqrt(1000) / CLIPPING_NORM > 1 / 1000
    assert ERROR < 1e-7
