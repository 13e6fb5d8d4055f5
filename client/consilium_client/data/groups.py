"""Groups of a site's records by the columns that a study declares (``evaluation.by``)."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from consilium_client.data.asset import AssetSpec
from consilium_client.data.columns import as_text, plain, to_numbers
from consilium_client.data.declared import converted, settled
from consilium_client.data.report import SetAside
from consilium_shared.groups import NOT_GIVEN, Grouping
from consilium_shared.inputs import Numeric
from consilium_shared.study import Study


def columns_of(study: Study, asset: AssetSpec) -> tuple[list[str], list[str]]:
    """The site's columns to read as text and as numbers."""
    by = study.evaluation.by
    text = [asset.here(each.column) for each in by if each.groups is not None]
    return text, [asset.here(each.column) for each in by if each.borders is not None]


def groups_of(frame: pd.DataFrame, study: Study, asset: AssetSpec, notes: SetAside) -> NDArray[np.int64] | None:
    """Number of each row's group in each grouping, int64 ``[N, groupings]``; None where the study has none.

    A value that is missing, or none of the study's, is in the last group. So is every value of a column that a table
    made of files' paths lacks. How many those are is a note, for the site's own people.
    """
    by = study.evaluation.by
    if not by:
        return None
    found = np.column_stack([_group(frame, each, asset) for each in by])
    for column, each in enumerate(by):
        notes.add(
            f"{each.column}: {NOT_GIVEN}, or none of the study's groups",
            int((found[:, column] == len(each.names) - 1).sum()),
        )
    return found


def _group(frame: pd.DataFrame, grouping: Grouping, asset: AssetSpec) -> NDArray[np.int64]:
    last = len(grouping.names) - 1
    here = asset.here(grouping.column)
    if here not in frame:
        return np.full(len(frame), last, dtype=np.int64)
    column = settled(frame[here], grouping.column, asset)
    if grouping.groups is not None:
        number = {word: at for at, word in enumerate(plain(pd.Series(grouping.groups)))}
        return plain(as_text(column)).map(number).fillna(last).to_numpy(dtype=np.int64)
    values, _ = to_numbers(column)
    values = converted(values, Numeric(name=grouping.column, unit=grouping.unit), asset)
    bands = np.searchsorted(np.array(grouping.borders), values, side="right")
    return np.where(np.isnan(values), last, bands).astype(np.int64)


def merged(groups: NDArray[np.int64], patients: NDArray[np.int64], study: Study, least: int) -> NDArray[np.int64]:
    """Groups in which those of fewer patients than ``least`` are one with the group of those not given.

    Where that one is small too, the smallest others join it. Not for counts with noise: who is in which group would
    depend on other patients.

    Args:
        groups: int64 ``[N, groupings]``.
        patients: int64 ``[N]``, whose each record is.
        study: with the groupings.
        least: fewest patients.
    """
    found = groups.copy()
    for column, grouping in enumerate(study.evaluation.by):
        last = len(grouping.names) - 1

        def sizes(column: int = column, last: int = last) -> NDArray[np.int64]:
            pairs = np.unique(np.stack([found[:, column], patients]), axis=1)
            return np.bincount(pairs[0], minlength=last + 1)

        before = sizes()
        small = np.flatnonzero((before > 0) & (before < least))
        found[np.isin(found[:, column], small), column] = last
        while 0 < (now := sizes())[last] < least and now[:last].any():
            smallest = min(np.flatnonzero(now[:last]), key=lambda group: int(now[group]))
            found[found[:, column] == smallest, column] = last
    return found
