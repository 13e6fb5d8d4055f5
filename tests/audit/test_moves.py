"""An auditor sees how far each round moved the model, and a jump."""

from __future__ import annotations

import json
import re

from tests.audit.conftest import Evidence

from consilium_audit.page import as_json, render
from consilium_audit.report import Report, make_report


def text_of(report: Report) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", render(report).decode()).split())


def test_the_page_shows_how_far_each_round_moved_the_model_and_marks_a_jump(evidence: Evidence) -> None:
    assert "records of older releases do not" in text_of(make_report(evidence.root))
    evidence.resign(
        r1={"update_norm": 0.51, "step_norm": 0.49},
        r2={
            "update_norm": 0.62,
            "step_norm": 0.6,
            "no_metrics_before": "a count is -9, below 0",
            "metrics_before": None,
        },
        r3={"update_norm": 9.87, "step_norm": 9.5},
    )
    made = make_report(evidence.root)
    assert made.state != "does not verify"
    assert [(each.round, each.update, each.jump) for each in made.moves] == [
        (1, 0.51, False),
        (2, 0.62, False),
        (3, 9.87, True),
    ]
    text = text_of(made)
    for words in (
        "1 0.51 0.49 –",
        "2 0.62 0.6 no metrics: a count is -9, below 0",
        "3 9.87 9.5 jump",
        "as reported by the sites",
    ):
        assert words in text
    assert json.loads(as_json(made))["moves"][2]["jump"] is True
