"""Values as site.yaml declares them: codes for missing, words for the study's words, units converted to the study's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from consilium_client.data.asset import AssetSpec, Unit
from consilium_client.data.columns import as_text, plain, to_numbers
from consilium_shared.errors import DataError
from consilium_shared.inputs import Numeric


def settled(column: pd.Series, name: str, asset: AssetSpec) -> pd.Series:
    """A column of the site's in which codes for missing are missing, and words are the study's.

    Each value by itself: what one row holds changes no other.

    Args:
        column: as it was read; of an unchanged one nothing is copied.
        name: the study's name of the column or variable.
        asset: with the site's declarations.
    """
    codes = (*asset.missing, *asset.missing_in.get(name, ()))
    words = asset.values.get(name, {})
    if asset.csv.decimal == "," and not pd.api.types.is_numeric_dtype(column):
        column = _points(column)
    if codes:
        column = _without(column, codes)
    if words:
        column = _mapped(column, words)
    return column


def converted(values: NDArray[np.float64], feature: Numeric, asset: AssetSpec) -> NDArray[np.float64]:
    """Numbers of a variable in the study's unit, float64 ``[n]``.

    Raises:
        DataError: the study has no unit for what site.yaml declares one of, or the one cannot become the other.
    """
    declared = asset.units.get(feature.name)
    if declared is None:
        return values
    unit = declared if isinstance(declared, Unit) else Unit(unit=declared)
    if feature.unit is None:
        raise DataError(
            f"site.yaml declares the unit of {feature.name} ({unit.unit}), and the study says none that it could be "
            "converted to; ask the coordinator for data with unit, or leave it out of units"
        )
    if unit.unit == feature.unit:
        return values
    from consilium_client.data import units  # a second to load; few sites need it

    try:
        factor, offset = units.factor(unit.unit, feature.unit, unit.molar_mass)
    except DataError as error:
        raise DataError(f"units of the asset in site.yaml: {feature.name}: {error}") from None
    return factor * values + offset


def _points(column: pd.Series) -> pd.Series:
    """Words with a point in place of a decimal comma; one that has a point already is no number."""
    return column.astype("string").str.translate({ord("."): "·", ord(","): "."})


def _without(column: pd.Series, codes: Sequence[str]) -> pd.Series:
    numbers, _ = to_numbers(pd.Series(list(codes), dtype="string"))
    if pd.api.types.is_numeric_dtype(column):
        return column.mask(column.isin(numbers[np.isfinite(numbers)]))
    words = plain(as_text(column))
    hit = words.isin([str(code) for code in plain(pd.Series(list(codes)))])
    of_words, wrong = to_numbers(words)
    hit |= pd.Series(np.isin(of_words, numbers[np.isfinite(numbers)]) & ~wrong, index=column.index)
    return column.mask(hit.fillna(False))


def _mapped(column: pd.Series, words: Mapping[str, str]) -> pd.Series:
    known = {str(here): there for here, there in zip(plain(pd.Series(list(words))), words.values(), strict=True)}
    found = plain(as_text(column))
    return found.map(known).astype("string").fillna(found)
