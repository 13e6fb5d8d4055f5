"""Counts of parts add up to the counts of the whole, so a federation's metrics are those of the pooled records."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_shared.metrics import count, counts_width, metrics


@settings(max_examples=50)
@given(st.integers(2, 5), st.integers(0, 60), st.integers(0, 60), st.integers(0, 2**32 - 1))
def test_counts_add_up(classes: int, first: int, second: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, first + second)
    probabilities = draw.dirichlet(np.full(classes, 0.3), first + second).reshape(-1, classes)
    whole = count(labels, probabilities)
    parts = count(labels[:first], probabilities[:first]) + count(labels[first:], probabilities[first:])
    assert np.array_equal(whole, parts)
    assert whole.shape == (counts_width(classes),)
    assert whole.dtype == np.int64
    assert metrics(whole, classes)["n"] == first + second


@settings(max_examples=50)
@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_the_order_of_records_does_not_matter(records: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels, probabilities = draw.integers(0, 3, records), draw.dirichlet(np.ones(3), records)
    order = draw.permutation(records)
    assert np.array_equal(count(labels, probabilities), count(labels[order], probabilities[order]))
