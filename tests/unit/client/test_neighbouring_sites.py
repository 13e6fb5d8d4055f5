"""Whole rounds of two sites that differ in one patient: what leaves has the same kinds, sizes and work behind it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from consilium_shared.study import Study
from dpsgd.private_optimizer import PrivateOptimizer

MOST = 4
"""Records of a drawn patient that a step takes."""


def rows(patients: int) -> list[str]:
    return [f"P{i},{'ab'[i % 2]},{i % 7 - 3},{(i % 5) / 2}" for i in range(patients)]


FEWER, MORE = rows(80), rows(81)
NEIGHBOURS = {
    "without the patient": FEWER,
    "with the patient": MORE,
    "with the most records": [*FEWER, *["P80,a,0.5,1.5"] * MOST],
    "with more than the most": [*FEWER, *["P80,a,0.5,1.5"] * (5 * MOST)],
    "with values at float32's end": [*FEWER, "P80,a,3e38,-3e38"],
    "with values that float32 cannot hold": [*FEWER, "P80,a,1e300,-1e300"],
    "with no number at all": [*FEWER, "P80,a,,"],
    "with a class of its own": [*FEWER, "P80,c,1,1"],
}


def rounds(site: Any, study: Study, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """All rounds of the study: the answers' kinds and sizes, the ledger's entries, and the steps that were computed.

    With privacy a step's time goes with the pieces of the plan's batch; that no step is left out is what can be held.
    """
    steps: list[int] = []
    finish = PrivateOptimizer.finish

    def counted(optimizer: PrivateOptimizer) -> None:
        steps.append(1)
        finish(optimizer)

    monkeypatch.setattr(PrivateOptimizer, "finish", counted)
    coordinator, answers = site.coordinator, []
    site.approve(study)
    for number in (1, 2):
        header = coordinator.train(number, coordinator.pack(study), study)
        answer = site.requests.handle(header, coordinator.pack(study))
        answers.append((coordinator.read(answer).kind, len(answer[1])))
        coordinator.opened(header, answer, study)
    header = coordinator.evaluate(2, coordinator.pack(study), study)
    answer = site.requests.handle(header, coordinator.pack(study))
    answers.append((coordinator.read(answer).kind, len(answer[1])))
    with site.service.ledger.exclusive():
        settled = [entry.body for entry in site.service.ledger.entries if entry.kind == "settle"]
    return {
        "answers": answers,
        "entries": [(entry.kind, getattr(entry.body, "purpose", None)) for entry in site.service.ledger.entries],
        "settled": [getattr(body, "steps", None) for body in settled],
        "steps": len(steps),
    }


@pytest.mark.parametrize("neighbour", [name for name in NEIGHBOURS if name != "without the patient"])
def test_one_patient_changes_neither_kind_nor_size_nor_work(
    neighbour: str,
    tmp_path: Path,
    contract: dict[str, Any],
    coordinator: Any,
    new_site: Callable[[Any], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = {**contract["training"], "rounds": 2, "steps_per_round": 3, "records_per_patient": MOST}
    study, found = Study.model_validate({**contract, "training": training}), {}
    for name in ("without the patient", neighbour):
        federation = type(coordinator)(tmp_path / ("one" if name == neighbour else "other"))
        table = "\n".join(["patient,label,x,y", *NEIGHBOURS[name]]) + "\n"
        (federation.site.root / "synthetic.csv").write_text(table)
        with monkeypatch.context() as patch:
            found[name] = rounds(new_site(federation), study, patch)
    reference = found["without the patient"]
    assert [kind for kind, _ in reference["answers"]] == ["update", "update", "counts"]
    assert reference["steps"] >= 6 and reference["settled"].count(3) == 2, reference
    assert found[neighbour] == reference
