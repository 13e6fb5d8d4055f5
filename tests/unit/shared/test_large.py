"""What a large message leaves in circles of references is freed at once; small ones are left to Python."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from consilium_shared.transport.large import LARGE_BYTES, Asked


class Circle:
    """Holds itself, and a body."""

    def __init__(self, body: bytes) -> None:
        self.body, self.content, self.itself = body, body, self


@pytest.fixture(autouse=True)
def by_itself() -> Iterator[None]:
    """Python looks for no circles meanwhile."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(("size", "freed"), [(LARGE_BYTES, True), (LARGE_BYTES - 1, False)])
def test_an_asked_one_before_the_next(size: int, freed: bool) -> None:
    asking, left = Asked(), list[weakref.ref[Circle]]()

    def call(body: bytes) -> Any:
        def answered(_: Any) -> Any:
            circle = Circle(body)
            left.append(weakref.ref(circle))
            return circle

        return answered

    context = SimpleNamespace(request=SimpleNamespace(content=b""))
    asking.intercept(context, call(bytes(size)))
    assert left[0]() is not None
    asking.intercept(context, call(b""))
    assert (left[0]() is None) == freed
