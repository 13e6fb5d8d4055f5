"""Counts of parts add up to the counts of the whole, so a federation's metrics are those of the pooled records."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_shared.metrics import metrics
from consilium_tasks.classification.counts import METRICS, ClassLayout, count


@settings(max_examples=50, deadline=None)
@given(
    st.integers(2, 5),
    st.integers(0, 60),
    st.integers(0, 60),
    st.sets(st.sampled_from(METRICS), min_size=1),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_counts_add_up(classes: int, first: int, second: int, asked: set[str], noised: bool, seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, first + second)
    probabilities = draw.dirichlet(np.full(classes, 0.3), first + second).reshape(-1, classes)
    layout = ClassLayout(classes, frozenset(asked), noised)
    whole = count(labels, probabilities, layout)
    parts = [count(labels[part], probabilities[part], layout) for part in (slice(0, first), slice(first, None))]
    assert np.array_equal(whole, sum(parts))
    assert whole.shape == (layout.width,)
    assert whole.dtype == np.int64
    assert metrics(whole, layout)["n"] == first + second


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(0, 2**32 - 1))
def test_the_order_of_records_does_not_matter(records: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    labels, probabilities = draw.integers(0, 3, records), draw.dirichlet(np.ones(3), records)
    order = draw.permutation(records)
    layout = ClassLayout.local(3)
    assert np.array_equal(count(labels, probabilities, layout), count(labels[order], probabilities[order], layout))
