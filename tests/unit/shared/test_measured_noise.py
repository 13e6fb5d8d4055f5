"""Empty coordinates of an opened sum are the sites' noise alone: they show whether a site's is missing."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
from tests.properties.test_private_sums import CLIPPING_NORM, clipped_sum, integers, plan, signed, study_of
from tests.support.sums import seed
from tests.support.training import records

from consilium_shared.models.vector import width
from consilium_shared.privacy.measured_noise import LIMIT, MeasuredNoise, deviations, doubt
from consilium_shared.private_sums import Grid, Integers
from consilium_shared.protocol.summand import read, segments
from consilium_shared.study import Study

EMPTY = 1024
SITES = 10


def with_empty(rate: float = 1.0) -> Study:
    return study_of(privacy={"sums": {"sampling_rate": rate, "empty_coordinates": EMPTY}})


@cache
def given(number: int) -> list[Integers]:
    """What ten sites add in a round."""
    return [integers(with_empty(), records(patients=2, seed=site), seed(site, number)) for site in range(SITES)]


def opened(study: Study, number: int, silent: int = 0) -> MeasuredNoise:
    """What the sum of a round over ten sites measures, of which the first so many add nothing, noise neither."""
    size = width(study)
    total = np.zeros(size + EMPTY, dtype=np.uint32)
    for found in given(number)[silent:]:
        total += found
    read_off = read(study, "training", SITES, SITES, {"update": total, "weight": np.full(1, SITES, np.uint64)})
    assert read_off.mean.size == size and read_off.noise is not None
    return read_off.noise


def test_no_patient_touches_an_empty_coordinate_and_the_others_are_what_they_were() -> None:
    study, data, secret = with_empty(), records(patients=12), seed("empty")
    size, grid = width(study), Grid.of(study, width(study))
    assert [each.length for each in segments(study, "training", 1, size)] == [size + EMPTY, 1]
    found, nobody = integers(study, data, secret), integers(with_empty(rate=1e-9), data, secret)
    assert np.array_equal(found[size:], nobody[size:])
    moved = signed(found[:size], nobody[:size].view(np.int32).astype(np.int64)) * grid.step
    assert np.linalg.norm(moved - clipped_sum(study, data)) < 0.05
    drawn = found[size:].view(np.int32) * grid.step / (plan(study).noise_multiplier * CLIPPING_NORM)
    assert abs(np.mean(drawn**2) - 1) < 6 * math.sqrt(2 / EMPTY)


def test_honest_sums_measure_what_they_should_and_one_site_of_ten_without_noise_stops_a_study() -> None:
    study = with_empty()
    honest = [opened(study, number) for number in range(9)]
    faulty = [opened(study, number, silent=1) for number in range(9)]
    assert all(each.coordinates == EMPTY for each in honest)
    assert abs(deviations(honest)) < 4 and doubt(honest) is None
    assert deviations(faulty) < -LIMIT
    assert "less noise" in str(doubt(faulty))
    assert doubt([*honest, *honest, *faulty[:3]]) is None
    assert "less noise" in str(doubt([*honest, *honest, *faulty])), "also where it goes missing late"


def test_noise_that_is_too_large_is_another_program_and_stops_it_too() -> None:
    large = MeasuredNoise(found=130.0, expected=100.0, coordinates=EMPTY)
    assert "more noise" in str(doubt([large]))
    assert doubt([]) is None and deviations([]) == 0.0


def test_a_study_without_empty_coordinates_measures_nothing_and_sends_nothing_more() -> None:
    study = study_of()
    assert segments(study, "training", 1, 7)[0].length == 7
    totals: dict[str, Any] = {"update": np.zeros(width(study), np.uint32), "weight": np.full(1, 3, np.uint64)}
    assert read(study, "training", 3, 3, totals).noise is None


@pytest.mark.parametrize("number", [-1, 2**16 + 1])
def test_a_number_of_empty_coordinates_out_of_range_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="empty_coordinates"):
        study_of(privacy={"sums": {"empty_coordinates": number}})
