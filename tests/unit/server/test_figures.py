"""The coordinator publishes metrics as the sites reported them: with intervals where noised, none that cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.support.site import CONTRACT

from consilium_server.export.page import parts
from consilium_server.state.progress import Progress, format_metrics
from consilium_server.study.figures import Figures, noised_weight
from consilium_shared.metrics import Counts, metrics
from consilium_shared.protocol.summand import Opened
from consilium_shared.study import Study
from consilium_tasks.classification.counts import ClassLayout, count

SITES = 4
NONE: dict[str, Any] = {"privacy": {"mode": "none"}, "evaluation": {}}


def figures(**changes: Any) -> Figures:
    return Figures(Study.model_validate({**CONTRACT, **changes}))


def layout_of(figures: Figures) -> ClassLayout:
    """The layout of a classification's counts."""
    assert isinstance(figures.layout, ClassLayout)
    return figures.layout


def honest(of: Figures, records: int, seed: int = 0) -> Counts:
    """The sum over the sites, with each one's noise."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, records)
    scores = 1 / (1 + np.exp(-draw.normal(2.0 * labels - 1.0, 1.0)))
    counts = count(labels, np.stack([1 - scores, scores], 1), layout_of(of))
    if of.noise is None:
        return counts
    each = np.concatenate([np.full(of.layout.sizes[p], d) for p, d in of.layout.deviations(of.noise).items()])
    return counts + sum(np.rint(draw.normal(0, each)).astype(np.int64) for _ in range(SITES))


def opened(counts: Counts | None, counted: int = SITES, weight: int = 0) -> Opened:
    return Opened(np.zeros(0, np.float32), weight, counted, counts, None)


def test_noised_metrics_have_intervals_that_hold_what_they_are_of() -> None:
    of = figures()
    found, why = of.of(opened(honest(of, 4000)))
    assert why is None
    assert found is not None
    assert set(found) == {"auroc", "accuracy", "sites", "interval", "sampling"}
    exact = metrics(count(*exactly(4000), layout_of(of)), of.layout)
    for name, (low, high) in found["interval"].items():
        assert low < found[name] < high
        assert low < exact[name] < high


def exactly(records: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the same draw as ``honest``."""
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, records)
    scores = 1 / (1 + np.exp(-draw.normal(2.0 * labels - 1.0, 1.0)))
    return labels, np.stack([1 - scores, scores], 1)


def test_thresholds_stand_beside_the_metrics_and_on_the_page() -> None:
    asked = {**CONTRACT["evaluation"], "metrics": ["auroc", "auprc", "calibration-slope"]}
    found, _ = (of := figures(evaluation=asked)).of(opened(honest(of, 6000)))
    assert found is not None
    exact = metrics(count(*exactly(6000), layout_of(of)), of.layout)
    for name, (low, high) in found["interval"].items():
        assert low < (exact[name] or 0.0) < high
    kind, columns, rows = parts(found)[0]
    assert (kind, columns) == ("thresholds", ["thresholds", "sensitivity", "specificity", "ppv", "npv"])
    middle = next(values for name, values in found["parts"]["thresholds"].items() if name == "0.500")
    assert middle["interval"]["sensitivity"][0] < middle["sensitivity"] < middle["interval"]["sensitivity"][1]
    assert ["0.500", f"{middle['sensitivity']:.3f}"] == [
        next(r for r in rows if r[0] == "0.500")[i][:5] for i in (0, 1)
    ]


def test_exact_metrics_have_none() -> None:
    of = figures(**NONE)
    found, _ = of.of(opened(honest(of, 400)))
    assert found is not None
    assert set(found) == {"auroc", "accuracy", "sites", "sampling"}


@pytest.mark.parametrize("changes", [{}, NONE])
def test_one_liar_of_ten_sets_no_figure_by_counts_that_honest_sites_cannot_have(changes: dict[str, Any]) -> None:
    """He takes the errors of the others out of the sum and adds as many right answers: all would be published."""
    of = figures(**changes)
    counts = honest(of, 600)
    assert of.of(opened(counts))[1] is None
    parts = of.layout.parts(counts)
    wrong = 3 * SITES * (0 if of.noise is None else max(of.layout.deviations(of.noise).values())) + 200
    parts["confusion"] += np.array([wrong, -wrong, -wrong, wrong]).astype(np.int64)
    found, why = of.of(opened(counts))
    assert found is None
    assert why is not None


def test_a_liar_who_counts_more_patients_than_the_sites_weights_allow_sets_no_figure() -> None:
    of = figures()
    counts, training = honest(of, 600), {"weight": 2400, "participants": ["a", "b", "c", "d"]}
    assert of.of(opened(counts), training)[1] is None
    parts = of.layout.parts(counts)
    parts["scores"][[0, -1]] += 40_000
    parts["confusion"][[0, -1]] += 40_000
    assert of.of(opened(counts))[1] is None
    assert "weights allow" in (of.of(opened(counts), training)[1] or "")


def test_fewer_counting_sites_than_the_contract_asks_for_give_nothing() -> None:
    of = figures()
    assert of.of(opened(honest(of, 400), counted=1)) == (None, None)
    assert of.of(opened(None)) == (None, None)


def test_a_record_says_the_weight_only_where_it_is_noised() -> None:
    sum_of = opened(None, weight=17)
    assert noised_weight(figures().study, sum_of) == 17
    assert noised_weight(figures(**NONE).study, sum_of) is None
    assert noised_weight(figures(aggregation={"min_sites": 2, "weighting": "equal"}).study, sum_of) is None


def test_what_people_see_says_whose_figures_they_are_and_how_sure() -> None:
    kept = {"auroc": 1.02, "accuracy": None, "sites": 4, "interval": {"auroc": [0.951, 1.094]}}
    assert format_metrics(kept) == (
        "auroc 1.020 [0.951, 1.094], accuracy unknown (too much noise) (95 % intervals of the noise)"
    )
    assert format_metrics({"auroc": 0.9, "sites": 4}) == "auroc 0.900"
    assert format_metrics(None) == "none"
    seen = Progress("one", 3)
    line = seen.apply({"event": "evaluated", "round": 1, "metrics": kept})
    assert line is not None
    assert "as reported by the sites" in line
    line = seen.apply({"event": "no_metrics", "round": 2, "why": "a count is -9, below 0"})
    assert line is not None
    assert "no metrics" in line
    assert "a count is -9" in seen.no_metrics
    closed = {"event": "closed", "round": 1, "seconds": 2.0, "away": {}, "epsilon": {}}
    assert "norm" not in (seen.apply(closed) or "")  # an event of an older version
    assert "the mean update has norm 0.314" in (seen.apply({**closed, "round": 2, "update_norm": 0.31415}) or "")
