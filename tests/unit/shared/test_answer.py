"""Answers of questions: what is read off counts with noise holds under that noise."""

from __future__ import annotations

import json

import numpy as np

from consilium_shared.answer import Answer, Table


def noised(counts: list[list[float]], noise: float, seed: int, edges: tuple[float, ...] = ()) -> Table:
    exact = np.array(counts, dtype=np.float64)
    drawn = exact + np.random.default_rng(seed).normal(0, noise, exact.shape)
    return Table("age", tuple(f"row {n}" for n in range(len(exact))), ("no", "yes"), drawn, edges)


def test_an_association_that_is_not_there_is_found_no_more_often_than_p_says() -> None:
    """With noise as large as a cell's own deviation; the usual distribution of chi-squared finds far too many."""
    seen = []
    for seed in range(120):
        cells = np.random.default_rng(1000 + seed).poisson([[90.0, 40.0], [150.0, 66.7], [60.0, 26.7]])
        found = noised(cells.tolist(), 12.0, seed).association(12.0)
        assert found is not None
        seen.append(found)
    assert np.mean([p < 0.05 for _, p in seen]) < 0.12
    assert np.mean([statistic > 5.99 for statistic, _ in seen]) > 0.25


def test_an_association_that_is_there_is_found_and_small_cells_are_not_tested() -> None:
    found = noised([[300.0, 20.0], [100.0, 200.0]], 8.0, 1).association(8.0)
    assert found is not None
    assert found[1] < 0.001
    assert noised([[3.0, 2.0], [300.0, 200.0]], 0.0, 1).association(8.0) is None
    assert noised([[100.0, 200.0]], 8.0, 1).association(8.0) is None


def test_intervals_of_quartiles_hold_those_of_the_exact_counts() -> None:
    exact = [[40.0, 0.0], [120.0, 1.0], [200.0, 1.0], [90.0, 1.0], [50.0, 0.0]]
    edges = (20.0, 40.0, 60.0, 80.0)
    truth = noised(exact, 0.0, 0, edges).quantiles(0, 0.0)
    assert truth is not None
    assert [round(value, 1) for value, _, _ in truth] == [34.2, 49.0, 63.3]
    inside = []
    for seed in range(40):
        found = noised(exact, 10.0, seed, edges).quantiles(0, 10.0)
        assert found is not None
        inside += [low <= true[0] <= high for true, (_, low, high) in zip(truth, found, strict=True)]
    assert np.mean(inside) > 0.88


def test_an_answer_is_said_in_lines_of_a_terminal_and_in_json() -> None:
    tables = (
        Table("everybody", ("patients",), ("no", "yes"), np.array([[500.2, 3.4]])),
        noised([[40.0, 2.0], [120.0, -9.0], [200.0, 1.0]], 0.0, 0, (50.0, 70.0)),
    )
    answer = Answer("a-question", "died", tables, 10.0, 3, 1.0, 1e-5)
    lines = answer.lines()
    assert max(map(len, lines)) <= 80
    assert "each count ± 19.6 (95 of 100); ε 1, δ 1e-05" in lines
    assert any(line.startswith("row 1") and line.split()[-1] == "-9" for line in lines)
    carried = json.loads(json.dumps(answer.to_dict(), allow_nan=False))
    assert carried["tables"][0]["counts"] == [[500.2, 3.4]]
    assert carried["tables"][1]["quartiles"].keys() == {"no", "yes"}


def test_a_class_in_which_noise_leaves_nobody_has_no_quartiles() -> None:
    table = Table("age", ("a", "b"), ("no", "yes"), np.array([[5.0, -3.0], [5.0, -1.0]]), (50.0,))
    assert table.quantiles(1, 2.0) is None
