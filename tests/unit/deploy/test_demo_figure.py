"""The demonstration's picture claims nothing that its table contradicts: exact tests are lines, noised ones points."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib import pyplot as plt

from consilium_deploy import demo_figure
from consilium_deploy.demo import Outcome

ROUNDS: list[dict[str, Any]] = [
    {"round": number, "epsilon": {"hospital-a": 0.5 * number, "hospital-b": 0.4 * number}} for number in range(1, 7)
]
OUTCOME = Outcome(
    study="demo",
    federated=0.95,
    pooled=0.97,
    alone={"hospital-a": 0.9, "hospital-b": 0.85},
    epsilon={"hospital-a": 3.0, "hospital-b": 2.4},
    delta=1e-3,
    rounds=ROUNDS,
    evaluated={
        6: {"auroc": 1.05, "interval": {"auroc": [0.93, 1.25]}},
        3: {"auroc": 1.09, "interval": {"auroc": [0.86, 1.51]}},
        5: {"auroc": None, "interval": {"auroc": None}},
    },
    model="model",
)


@pytest.fixture
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The axes of AUROC, as they were drawn."""
    mpl.use("agg")
    kept: list[Any] = []
    monkeypatch.setattr(plt, "close", kept.append)
    demo_figure.draw([OUTCOME], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0
    monkeypatch.undo()
    axes = kept[0].axes[0]
    yield axes
    plt.close(kept[0])


def test_lines_are_the_exact_tests_alone(left: Any) -> None:
    level = {
        line.get_ydata()[0] for line in left.lines if len(set(line.get_ydata())) == 1 and line.get_linestyle() != "None"
    }
    assert level == {0.95, 0.97, 0.9, 0.85}


def test_noised_figures_are_points_with_their_intervals_and_nothing_is_cut_off(left: Any) -> None:
    assert demo_figure.noised(OUTCOME) == [(3, 1.09, 0.86, 1.51), (6, 1.05, 0.93, 1.25)]
    (container,) = left.containers
    points, _, (bars,) = container.lines
    assert list(points.get_ydata()) == [1.09, 1.05] and points.get_linestyle() == "None"
    ends = [sorted(end for _, end in segment) for segment in bars.get_segments()]
    assert ends == [pytest.approx([0.86, 1.51]), pytest.approx([0.93, 1.25])]
    low, high = left.get_ylim()
    assert low < 0.85 and high > 1.51


def test_the_legend_covers_no_point(left: Any) -> None:
    left.figure.canvas.draw()
    assert not left.get_legend().get_window_extent().overlaps(left.get_window_extent())
