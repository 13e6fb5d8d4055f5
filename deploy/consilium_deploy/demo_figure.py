"""The demonstration's picture: AUROC by round beside what each hospital reaches alone, and the ε spent by round."""

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
        len(outcomes), 2, figsize=(11, 3.6 * len(outcomes)), squeeze=False, layout="constrained"
    )
    for (left, right), outcome in zip(axes, outcomes, strict=True):
        known = {number: each["auroc"] for number, each in outcome.evaluated.items() if each["auroc"] is not None}
        rounds, values = list(known), list(known.values())
        left.plot(rounds, values, "o-", color=BLUE, label="federated, after each round")
        left.axhline(outcome.pooled, color=GREY, linestyle="--", label="all data in one place")
        for index, (name, value) in enumerate(outcome.alone.items()):
            left.axhline(
                value, color=RED, linewidth=0.9, linestyle=":", label="a hospital alone" if not index else None
            )
            left.annotate(f" {name[-1]}", (1.0, value), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        left.set(title=f"{outcome.study} (synthetic): AUROC on held-back patients", xlabel="round", ylabel="AUROC")
        left.set_xticks(rounds)
        left.legend(fontsize=8, loc="lower right")
        for site, marker in zip(sorted(outcome.epsilon), "osv^Dxp*", strict=False):
            spent = [(event["round"], event["epsilon"].get(site)) for event in outcome.rounds]
            points = [(number, value) for number, value in spent if value is not None]
            right.plot(*zip(*points, strict=True), marker=marker, linewidth=1, label=site)
        right.set(title=f"ε spent at each hospital (δ = {outcome.delta:g})", xlabel="round", ylabel="ε")
        right.set_xticks([event["round"] for event in outcome.rounds])
        right.set_ylim(bottom=0)
        right.legend(fontsize=8, loc="lower right")
    figure.savefig(file, dpi=130)
    plt.close(figure)
