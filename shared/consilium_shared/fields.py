"""Plain types of fields: names, durations, digests and signatures in hex digits, numbers within bounds."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from consilium_shared import limits


def _name(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?", text):
        raise ValueError("a name has 1 to 64 lower-case letters, digits and inner hyphens")
    return text


def _duration(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]{0,5}(s|m|h)", text):
        raise ValueError("a duration is a number and a unit, as 90s, 30m or 2h")
    return text


Name = Annotated[str, AfterValidator(_name)]
Column = Annotated[str, Field(min_length=1, max_length=limits.NAME_CHARACTERS)]
Duration = Annotated[str, AfterValidator(_duration)]
Hex32 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""32 bytes: a SHA-256 or a key."""
Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]
"""64 bytes: an Ed25519 signature."""
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def seconds(duration: str) -> float:
    """Seconds of a duration such as ``30m``."""
    return float(duration[:-1]) * {"s": 1, "m": 60, "h": 3600}[duration[-1]]
