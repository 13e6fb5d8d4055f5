"""Values that are nearly what a decoder takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from consilium_shared.canonical import canonical_bytes

FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**53) + 1, 2**53 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12).filter(lambda text: text.isascii() or "\ud800" not in text),
    st.sampled_from(["a" * 64, "b" * 128, "site-00", "training", "evaluation", "masked", "", "0", "-1", "1e9"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to everything in a JSON value."""
    found = [path]
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        found += places(inner, (*path, key))
    return found


@st.composite
def mutated(draw: st.DrawFn, originals: Callable[[], list[Any]]) -> Any:
    """One of the values with something in it replaced, deleted, added or taken from elsewhere; or any value at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    values = originals()
    value = copy.deepcopy(draw(st.sampled_from(values)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(value)))
        if not path:
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        action = draw(st.integers(0, 3))
        if action == 0:
            del holder[path[-1]]
        elif action == 1 and isinstance(holder, dict):
            holder[draw(st.text(max_size=8) | st.sampled_from(["kind", "round", "of", "site-00"]))] = draw(VALUES)
        elif action == 2:
            other = draw(st.sampled_from(values))
            there = draw(st.sampled_from(places(other)))
            for key in there:
                other = other[key]
            holder[path[-1]] = copy.deepcopy(other)
        else:
            holder[path[-1]] = draw(VALUES)
    return value


def canonical(value: Any) -> bytes | None:
    """The bytes of a value, if it has any."""
    try:
        return canonical_bytes(value)
    except (ValueError, RecursionError):
        return None
