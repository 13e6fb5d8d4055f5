"""The demonstration's picture: AUROC of the models beside each other, and the ε spent by round.

Models are compared by exact tests, which a demonstration can make and the table has too. What the coordinator sees on
the way are noised counts: points with the intervals that the noise leaves open.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

if TYPE_CHECKING:
    from consilium_deploy.demo import Outcome

BLUE, GREY, RED = "#1f5fa8", "#777777", "#b0413e"


def draw(outcomes: list[Outcome], file: Path) -> None:
    """Write a PNG with a row for each study."""
    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(outcomes), 2, figsize=(11, 4.2 * len(outcomes)), squeeze=False, layout="constrained"
    )
    for (left, right), outcome in zip(axes, outcomes, strict=True):
        rounds = [event["round"] for event in outcome.rounds]
        left.axhline(outcome.federated, color=BLUE, label="federated: the last model")
        left.axhline(outcome.pooled, color=GREY, linestyle="--", label="all data in one place")
        for index, (name, value) in enumerate(outcome.alone.items()):
            left.axhline(
                value, color=RED, linewidth=0.9, linestyle=":", label="a hospital alone" if not index else None
            )
            left.annotate(f" {name[-1]}", (1.0, value), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        seen = noised(outcome)
        if seen:
            values = [value for _, value, _, _ in seen]
            below, above = zip(*((value - low, high - value) for _, value, low, high in seen), strict=True)
            left.errorbar(
                [number for number, *_ in seen],
                values,
                yerr=(below, above),
                fmt="o",
                color=BLUE,
                alpha=0.6,
                capsize=4,
                label="federated on the way: noised counts,\nwith the 95 % interval of the noise",
            )
        left.set(title=f"{outcome.study} (synthetic): AUROC on patients held back", xlabel="round", ylabel="AUROC")
        shown = [
            outcome.federated,
            outcome.pooled,
            *outcome.alone.values(),
            *(end for each in seen for end in each[2:]),
        ]
        top = max(1.0, *shown) + 0.02
        left.axhspan(1.0, top, color="#eeeeee", label="above 1: noise alone, no model is there")
        left.set_ylim(min(shown) - 0.05, top)
        left.set_xticks(rounds)
        left.set_xlim(rounds[0] - 0.5, rounds[-1] + 0.5)
        left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)  # no curve lies under it
        for site, marker in zip(sorted(outcome.epsilon), "osv^Dxp*", strict=False):
            spent = [(event["round"], event["epsilon"].get(site)) for event in outcome.rounds]
            points = [(number, value) for number, value in spent if value is not None]
            right.plot(*zip(*points, strict=True), marker=marker, linewidth=1, label=site)
        right.set(title=f"ε spent at each hospital (δ = {outcome.delta:g})", xlabel="round", ylabel="ε")
        right.set_xticks(rounds)
        right.set_ylim(bottom=0)
        right.legend(fontsize=8, loc="lower right")
    figure.savefig(file, dpi=130)
    plt.close(figure)


def noised(outcome: Outcome) -> list[tuple[int, float, float, float]]:
    """Metrics the coordinator saw: (round, AUROC of noised counts, low, high), where the noise left it open at all."""
    return [
        (number, each["auroc"], *each["interval"]["auroc"])
        for number, each in sorted(outcome.evaluated.items())
        if each["auroc"] is not None
    ]
