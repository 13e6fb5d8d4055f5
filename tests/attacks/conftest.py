"""Federations for the attacks."""

from __future__ import annotations

import pytest
from tests.support.sums import Federation


@pytest.fixture(scope="session")
def four() -> Federation:
    """Four sites: three open a sum, one may lie."""
    return Federation(4)


@pytest.fixture(scope="session")
def seven() -> Federation:
    """Seven sites: five open a sum, two may lie."""
    return Federation(7)
