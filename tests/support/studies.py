"""The smallest study of each kind of data, for tests to change what they are about."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from consilium_shared.study import Study

TASKS = {
    "image": "image-classification",
    "series": "sequence-classification",
    "features": "tabular-classification",
}
"""Part of ``data`` that says how records become inputs, and the task that takes it."""
TABLE: dict[str, Any] = {"features": [{"name": "a"}, {"name": "b"}]}
LABEL: dict[str, Any] = {"column": "y", "classes": ["0", "1"]}
TRAINING: dict[str, Any] = {"rounds": 1, "steps_per_round": 1, "expected_batch": 4, "optimizer": {"lr": 0.1}}
OPEN: dict[str, Any] = {"mode": "none"}
"""Without privacy."""


def contract(
    model: str | Mapping[str, Any] = "logistic",
    data: Mapping[str, Any] = TABLE,
    *,
    name: str = "test",
    training: Mapping[str, Any] | None = None,
    privacy: Mapping[str, Any] = OPEN,
    **parts: Mapping[str, Any],
) -> dict[str, Any]:
    """A study's file, as a person would write it.

    Args:
        model: its name, or the whole part.
        data: features, image or series, from which the task follows; ``asset``, ``label`` and the rest where a test
            needs others than "a" and the column "y" with the classes "0" and "1".
        name: of the study.
        training: what differs from one round of one step with four patients.
        privacy: without privacy by default.
        parts: ``aggregation``, ``evaluation``.
    """
    (task,) = {TASKS[part] for part in data if part in TASKS}
    made = {
        "study": name,
        "task": task,
        "model": {"name": model} if isinstance(model, str) else dict(model),
        "data": {"asset": "a", "label": LABEL, **data},
        "training": {**TRAINING, **(training or {})},
        "privacy": privacy,
        **parts,
    }
    return deepcopy(made)


def study(*args: Any, **kept: Any) -> Study:
    """The study of such a file; arguments as ``contract`` has them."""
    return Study.model_validate(contract(*args, **kept))
