"""A question through real programs: asked, approved, charged, answered over three unlike hospitals, and audited."""

from __future__ import annotations

import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from consilium_audit.verify import Verification
from consilium_server.commands.evidence import collect
from consilium_server.federation import Home

if TYPE_CHECKING:
    from tests.federation.conftest import Hospitals

SITES = ("north", "south", "west")
EDGES = [50.0, 70.0]
QUESTION: dict[str, Any] = {
    "study": "question",
    "task": "cross-table",
    "model": {"name": "table"},
    "data": {
        "asset": "guarded",
        "label": {"column": "outcome", "classes": ["stable", "worse"]},
        "features": [{"name": "age"}, {"name": "unit", "categories": ["ward", "intensive"]}],
        "edges": {"age": EDGES},
    },
    "training": {"rounds": 1, "steps_per_round": 1, "expected_batch": 200, "optimizer": {"lr": 1.0}},
    "privacy": {"epsilon": 2.0, "delta": 1e-5, "clipping_norm": 1.75, "sums": {"sampling_rate": 1.0}},
    "aggregation": {"min_sites": 3, "round_timeout": "10m"},
    "evaluation": {"split": None, "split_column": "part"},
}


def exact(hospitals: Hospitals) -> NDArray[np.float64]:
    """Counts ``[2, 6]`` of all hospitals' patients who are not held back, read from their tables."""
    found = np.zeros((2, 6))
    for site in SITES:
        for line in (hospitals.root / "data" / f"synthetic-{site}-guarded.csv").read_text().splitlines()[1:]:
            _, part, outcome, age, _, _, unit, _ = line.split(",")
            if part == "train":
                rows = [0, 1 + int(np.searchsorted(EDGES, float(age), side="right")), 4 + (unit == "intensive")]
                found[int(outcome == "worse"), rows] += 1
    return found


def test_a_question_is_approved_charged_answered_and_asked_again_for_nothing(
    hospitals: Hospitals, tmp_path: Path
) -> None:
    file, page = tmp_path / "question.yaml", tmp_path / "answer.html"
    file.write_text(json.dumps(QUESTION))
    with ThreadPoolExecutor(1) as background:
        asked = background.submit(hospitals.at_server, "ask", file, "--json", "--page", page)
        try:
            hospitals.approve("question", SITES, by="Dr Synthetic")
        except Exception:
            hospitals.at_server("stop", "question")  # else ``ask`` is waited for without end, and nobody sees why
            raise
        answer = json.loads(asked.result().stdout)
    truth, counts = exact(hospitals), np.concatenate([table["counts"] for table in answer["tables"]]).T
    assert answer["sites"] == 3
    assert truth.sum(axis=0)[0] == 192
    study = hospitals.folder("question").study()
    (charge,) = hospitals.charges("north", study)
    sigma = charge.body.event.noise_multiplier
    assert abs(answer["noise"] - math.sqrt(3) * sigma * 1.75) < 1e-9
    assert np.abs(counts - truth).max() < 5 * answer["noise"]
    assert np.abs(counts - truth).max() > 0.01
    assert "intensive" in page.read_text(encoding="utf-8")
    before = {site: len(hospitals.charges(site, study)) for site in SITES}
    assert json.loads(hospitals.at_server("ask", file, "--json").stdout) == answer
    assert {site: len(hospitals.charges(site, study)) for site in SITES} == before == dict.fromkeys(SITES, 1)
    evidence = tmp_path / "evidence"
    collect(Home(hospitals.server), "question", evidence)
    for site in SITES:
        shutil.copy(hospitals.site(site) / "ledger.jsonl", evidence / f"{site}.jsonl")
    Verification(evidence).run()
