"""Node of a graph: one layer by name, what it takes, and the arithmetic of its sizes. Nothing here computes a model.

A shape is of one record: the batch is no axis of it, so that no layer can be told to mix records.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BeforeValidator, Field

from consilium_shared.config import Strict

Shape = tuple[int, ...]
"""Shape of one record, without the batch."""

AXES = 5
"""Most axes of a shape: channels and three dimensions, and one for heads or the like."""
LONGEST = 2**24
"""Longest side of a shape."""
MOST_INPUTS = 64
"""Most inputs of a node."""

RESERVED = frozenset(
    (
        *("add_module", "apply", "bfloat16", "buffers", "call_super_init", "children", "compile", "cpu", "cuda"),
        *("double", "dump_patches", "eval", "extra_repr", "float", "forward", "get_buffer", "get_extra_state"),
        *("get_parameter", "get_submodule", "half", "ipu", "load_state_dict", "modules", "mtia", "named_buffers"),
        *("named_children", "named_modules", "named_parameters", "parameters", "register_backward_hook"),
        *("register_buffer", "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"),
        *("register_full_backward_pre_hook", "register_load_state_dict_post_hook", "register_module"),
        *("register_load_state_dict_pre_hook", "register_parameter", "register_state_dict_post_hook"),
        *("register_state_dict_pre_hook", "requires_grad_", "set_extra_state", "set_submodule", "share_memory"),
        *("state_dict", "to", "to_empty", "train", "training", "type", "xpu", "zero_grad"),
    )
)
"""Names that a torch module has for itself."""


def _named(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,62}", text):
        raise ValueError("a node's name has 1 to 63 lower-case letters, digits and _, and begins with a letter")
    if text in RESERVED:
        raise ValueError(f"{text} is a name that a model has for itself; take another")
    return text


def listed(value: Any) -> Any:
    """One value as a list of it."""
    return [value] if isinstance(value, str | int) and not isinstance(value, bool) else value


NodeName = Annotated[str, AfterValidator(_named)]
Size = Annotated[int, Field(ge=1, le=LONGEST)]
Width = Annotated[int, Field(ge=1, le=65_536)]
Sizes = Annotated[tuple[Size, ...], BeforeValidator(listed), Field(min_length=1, max_length=AXES)]
Axis = Annotated[int, Field(ge=0, lt=AXES)]
Axes = Annotated[tuple[Axis, ...], BeforeValidator(listed), Field(min_length=1, max_length=AXES)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Constant = Annotated[float, Field(ge=-1e6, le=1e6)]
Epsilon = Annotated[float, Field(ge=1e-8, le=1.0)]


class Node(Strict):
    """One layer.

    Attributes:
        name: by which others take it, and under which its weights are found.
        of: the inputs and nodes that it takes, in order; all stand before it.
        takes: least and largest number of these.
    """

    name: NodeName
    of: Annotated[
        tuple[Annotated[str, Field(max_length=63)], ...],
        BeforeValidator(listed),
        Field(min_length=1, max_length=MOST_INPUTS),
    ]
    takes: ClassVar[tuple[int, int]] = (1, 1)

    def shape(self, given: Sequence[Shape]) -> Shape:
        """Shape that comes out; raises ValueError for shapes that it cannot take, in words about those."""
        raise NotImplementedError

    def parameters(self, given: Sequence[Shape]) -> int:
        """Number of weights."""
        return 0

    def numbers(self, given: Sequence[Shape]) -> int:
        """Numbers of one record that are kept: what comes out, and large ones on the way."""
        return math.prod(self.shape(given))

    def work(self, given: Sequence[Shape]) -> int:
        """Multiplications for one record, forward; about one for each number where there are no weights."""
        return math.prod(self.shape(given))


def ranked(shape: Shape, least: int, most: int, what: str) -> Shape:
    """The shape, where it has so many axes; raises ValueError with ``what`` the layer takes."""
    if not least <= len(shape) <= most:
        raise ValueError(f"takes {what}, and is given {said(shape)}")
    return shape


def within(axes: Sequence[int], shape: Shape) -> None:
    """Raises ValueError unless these are different axes of a shape."""
    if len(set(axes)) != len(axes) or any(axis >= len(shape) for axis in axes):
        raise ValueError(f"axes {list(axes)} are not different axes of {said(shape)}; the first is 0")


def said(shape: Shape) -> str:
    """Shape in words for people.

    >>> said((3, 28, 28))
    '3×28×28'
    """
    return "×".join(map(str, shape)) or "one number"
