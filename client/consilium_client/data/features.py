"""Features of a study as numbers: scaled by the study's public constants, or one-hot over its listed categories."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from consilium_client.data.asset import AssetSpec
from consilium_client.data.columns import place, plain, to_numbers
from consilium_client.data.declared import converted, settled
from consilium_client.data.report import SetAside, Values
from consilium_shared.inputs import Categorical, Feature, Numeric


def columns_of(features: Sequence[Feature], asset: AssetSpec) -> tuple[list[str], list[str]]:
    """The site's columns to read as text and as numbers."""
    text = [asset.here(feature.name) for feature in features if isinstance(feature, Categorical)]
    numbers = [asset.here(feature.name) for feature in features if isinstance(feature, Numeric)]
    return text, numbers


def scale(
    feature: Numeric, values: NDArray[np.float64], aside: Values, path: Path, index: pd.Index
) -> NDArray[np.float64]:
    """``(value - center) / scale``, NaN where missing, outside ``low`` … ``high``, or too large for a float32.

    What becomes NaN is counted in ``aside``, with its place in the file by ``index`` (see ``columns.place``); all of
    them are in its profile.
    """
    aside.profile.numbers(feature, values)
    low = -np.inf if feature.low is None else feature.low
    high = np.inf if feature.high is None else feature.high
    outside = (values < low) | (values > high)
    _count(aside, f"{feature.name}: outside {low:g} … {high:g}", outside, path, index)
    with np.errstate(over="ignore"):
        scaled = np.where(outside, np.nan, (values - feature.center) / feature.scale)
    huge = np.abs(scaled) > np.finfo(np.float32).max
    _count(aside, f"{feature.name}: too large for a 32-bit number", huge, path, index)
    return np.where(huge, np.nan, scaled)


def number(
    feature: Numeric, column: pd.Series, asset: AssetSpec, aside: SetAside, path: Path, index: pd.Index
) -> NDArray[np.float64]:
    """float64 values of a column in the study's unit, NaN where missing or no number (counted in ``aside``)."""
    values, wrong = to_numbers(settled(column, feature.name, asset))
    _count(aside, f"{feature.name}: not a number", wrong, path, index)
    return converted(values, feature, asset)


def count_words(values: Values, name: str, words: pd.Series, study: Sequence[str]) -> None:
    """Adds a column's words to the profile; ``study``: those that the study knows."""
    found = words.value_counts()
    counts = zip(found.index.astype(str), found.to_numpy(), strict=True)
    values.profile.words(name, study, ((word, int(n)) for word, n in counts), int(words.isna().sum()))


def _count(aside: SetAside, reason: str, wrong: NDArray[np.bool_], path: Path, index: pd.Index) -> None:
    if wrong.any():
        aside.add(reason, int(wrong.sum()), place(path, index[wrong]))


def encode(
    frame: pd.DataFrame, features: Sequence[Feature], asset: AssetSpec, aside: Values, path: Path
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Features of each row.

    Args:
        frame: rows with the site's columns, as ``columns_of`` asked for them.
        features: in the order of the model's inputs.
        asset: names of the columns at this site.
        aside: counts single values that are taken as missing.
        path: the table, for the places of those.

    Returns:
        float32 ``[N, F]``, where a missing number stands at its center (0) and a missing category at no category; and
        bool ``[N, number of features]``, True where a value is missing.
    """
    parts: list[NDArray[np.float64]] = []
    missing = np.zeros((len(frame), len(features)), dtype=bool)
    for at, feature in enumerate(features):
        column = frame[asset.here(feature.name)]
        if isinstance(feature, Numeric):
            values = number(feature, column, asset, aside, path, frame.index)
            scaled = scale(feature, values, aside, path, frame.index)
            missing[:, at] = np.isnan(scaled)
            parts.append(np.nan_to_num(scaled, nan=0.0)[:, None])
        else:
            words, categories = plain(settled(column, feature.name, asset)), plain(pd.Series(feature.categories))
            codes = pd.Index(categories).get_indexer(pd.Index(words))
            strange = (codes < 0) & words.notna().to_numpy(dtype=bool)
            _count(aside, f"{feature.name}: none of the study's categories", strange, path, frame.index)
            missing[:, at] = codes < 0
            count_words(aside, feature.name, words, list(categories))
            parts.append((codes[:, None] == np.arange(len(categories))).astype(np.float64))
    matrix = np.concatenate(parts, axis=1) if parts else np.zeros((len(frame), 0))
    return matrix.astype(np.float32), missing
