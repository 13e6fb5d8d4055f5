"""For all tests: their markers, and the order of the files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

import consilium_client  # noqa: F401  # asks MKL for reproducible products, before any test computes one

settings.register_profile("without-deadline", deadline=None)  # a busy machine is no failure
settings.load_profile("without-deadline")

ROOT = Path(__file__).parent

PATHS = (*(str(ROOT.parent / name) for name in ("shared", "serve")), os.environ.get("PYTHONPATH", ""))
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in PATHS if path)
"""For programs that tests start: as ``pythonpath`` in pyproject.toml, which holds for pytest's own process."""

FIRST = (
    "unit/deploy/test_published_results.py",
    "intake/test_pull.py",
    "intake/test_receive.py",
    "federation/test_crash.py",
    "federation/test_cuts.py",
    "federation/test_dropouts.py",
    "federation/test_what_leaves.py",
    "federation/test_masked.py",
)
"""The files that take longest, in this order and before all others: with several workers, each of which takes a file at
a time, one that began with such a file at the end would keep the others waiting."""

QUICK = ("architecture", "unit")
"""Folders whose tests are quick, but for the files in ``SLOW``."""

SLOW = {
    "unit/client/test_canary_run.py",
    "unit/client/test_masking.py",
    "unit/client/test_neighbouring_sites.py",
    "unit/client/test_no_waiting.py",
    "unit/client/test_requests.py",
    "unit/client/test_secure_sums.py",
    "unit/client/test_trainer.py",
    "unit/deploy/test_data_synthetic.py",
    "unit/deploy/test_published_results.py",
    "unit/dpsgd/test_blas.py",
    "unit/dpsgd/test_noise.py",
    "unit/server/test_secure_sum.py",
    "unit/server/test_start.py",
    "unit/server/test_sum_memory.py",
    "unit/shared/test_adaptation.py",
    "unit/shared/test_supervisor.py",
}
"""Four fifths of the time of all unit tests, or processes of their own."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder; put the longest files first."""
    for item in items:
        folder = item.path.relative_to(ROOT).parts[0]
        if folder == "federation":
            item.add_marker(pytest.mark.federation)
        elif folder in QUICK and _name(item) not in SLOW:
            item.add_marker(pytest.mark.quick)
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(_name(item), len(FIRST)))  # stable: all else stays in its order


def _name(item: pytest.Item) -> str:
    return item.path.relative_to(ROOT).as_posix()
