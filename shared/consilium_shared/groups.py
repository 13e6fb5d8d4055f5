"""Groups of patients by which a study evaluates: columns and what they are divided into, listed in the contract.

Nobody's data decides which groups there are. A record whose value is missing, or in none of the groups, is in a group
of its own, ``NOT_GIVEN``.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

from pydantic import Field, model_validator

from consilium_shared.config import Strict
from consilium_shared.fields import Column
from consilium_shared.inputs import UnitName

NOT_GIVEN = "not given"
MOST_GROUPS = 60
"""Groups of a study, those not given among them."""

Word = Annotated[str, Field(min_length=1, max_length=60)]


class Grouping(Strict):
    """Division of records by one column: into words, or into bands of a number.

    >>> Grouping(column="age", borders=(40.0, 65.0)).names
    ('below 40', '40 to below 65', '65 and above', 'not given')
    >>> Grouping(column="sex", groups=("f", "m")).names
    ('f', 'm', 'not given')
    """

    column: Column
    groups: Annotated[tuple[Word, ...], Field(min_length=1, max_length=20)] | None = None
    """Values of a column of words."""
    borders: Annotated[tuple[float, ...], Field(min_length=1, max_length=19)] | None = None
    """Or borders of the bands of a number, ascending; a value on a border is in the band above it."""
    unit: UnitName | None = None
    """Unit of the borders, into which a site's own values are converted."""

    @model_validator(mode="after")
    def _one_kind(self) -> Grouping:
        if (self.groups is None) == (self.borders is None):
            raise ValueError("give groups (words) or borders (of bands of a number)")
        if self.groups is not None and (len(set(self.groups)) < len(self.groups) or NOT_GIVEN in self.groups):
            raise ValueError(f"groups are different words, and none is {NOT_GIVEN!r}: that one is always there")
        if self.groups is not None and not all(word.isprintable() and word == word.strip() for word in self.groups):
            raise ValueError("groups are printable words")
        if self.borders is not None and any(a >= b for a, b in pairwise(self.borders)):
            raise ValueError("borders ascend")
        if self.unit is not None and self.borders is None:
            raise ValueError("unit goes with borders")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its groups, the last one ``NOT_GIVEN``."""
        if self.groups is not None:
            return (*self.groups, NOT_GIVEN)
        borders = [f"{border:g}" for border in self.borders or ()]
        bands = [f"{low} to below {high}" for low, high in pairwise(borders)]
        return (f"below {borders[0]}", *bands, f"{borders[-1]} and above", NOT_GIVEN)
