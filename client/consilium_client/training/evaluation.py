"""Evaluation of the global model on the patients held back: counts, noised where the study has privacy."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from consilium_client.data.dataset import Dataset, Part
from consilium_client.data.groups import merged
from consilium_shared import metrics, task
from consilium_shared.errors import DataError
from consilium_shared.grouped import count
from consilium_shared.models import build
from consilium_shared.split import Part as Split
from consilium_shared.study import Study
from dpsgd.keystream import KeyStream

if TYPE_CHECKING:
    import torch

log = logging.getLogger("consilium.agent")


def evaluate(
    model_bytes: bytes,
    study: Study,
    records: Dataset,
    device: torch.device,
    layout: metrics.Layout,
    *,
    least: int = 1,
    of: Split = "test",
) -> metrics.Counts:
    """Exact counts of the model on all records of the patients held back. Not to leave a site that has privacy.

    Args:
        model_bytes: the global model, as ``vector.pack`` wrote it.
        study: the study.
        records: the asset's records; patients for training are left out.
        device: where to compute.
        layout: layout of the counts.
        least: fewest patients of a group that are counted as one (``groups.merged``).
        of: part of the split that is counted.

    Raises:
        PeerError: the model's bytes are not of this study.
        DataError: the model gives no finite numbers for some record (its weights are too large).
    """
    part = records.part(of)
    chosen = part.records
    found = measured(model_bytes, study, records, device, chosen)
    if not np.isfinite(found).all():
        raise DataError(f"study {study.study}: the model gives no number for some of the records held back")
    groups = None if records.groups is None else merged(records.groups[chosen], part.patients, study, least)
    return count(task.of(study), layout, found, records.targets(chosen), groups)


def noised_counts(
    model_bytes: bytes,
    study: Study,
    records: Dataset,
    device: torch.device,
    *,
    noise_multiplier: float,
    seed: bytes,
    rows: int | None = None,
    of: Split = "test",
) -> metrics.Counts:
    """Counts with noise: the release that ``PrivacyPlan.evaluation_event`` describes.

    Each patient held back counts with one record, drawn anew. A record of which the model gives no finite numbers
    counts as one that it knows nothing about: no refusal tells of it. The noise is rounded to whole counts, which is
    the same as rounding true counts plus continuous noise.

    Args:
        noise_multiplier: σ of the plan's evaluations.
        seed: 32 secret bytes, of this evaluation alone (``state/draw_seeds.py``).
        rows: records that are computed at a time; None: ``rows.ROWS``.
        of: part of the split that is counted.

    Raises:
        PeerError: the model's bytes are not of this study.
    """
    import torch

    from dpsgd.noise import Noise

    own = task.of(study)
    layout, chosen = metrics.Layout.of(study), _one_each(records.part(of), seed)
    found = measured(model_bytes, study, records, device, chosen, rows, forgiving=True)
    known = np.isfinite(found).all(axis=1, keepdims=True)
    groups = None if records.groups is None else records.groups[chosen]
    counts = count(own, layout, np.where(known, found, own.unknown(study)), records.targets(chosen), groups)
    noise, start = Noise(seed), 0
    released = torch.from_numpy(counts.astype(np.float64))
    for part, deviation in layout.deviations(noise_multiplier).items():
        end = start + layout.sizes[part]
        noise.add_to(released[start:end], deviation)
        start = end
    return released.numpy().astype(np.int64)


def _one_each(part: Part, seed: bytes) -> NDArray[np.int64]:
    """One record of each patient: numbers among all."""
    order = np.lexsort((KeyStream(seed, "records").words(len(part.records)), part.patients))
    return part.records[order[np.unique(part.patients[order], return_index=True)[1]]]


def measured(
    model_bytes: bytes,
    study: Study,
    records: Dataset,
    device: torch.device,
    chosen: NDArray[np.int64] | None = None,
    rows: int | None = None,
    *,
    forgiving: bool = False,
) -> NDArray[np.float64]:
    """Measurements of the chosen records by the task, ``[N, m]``; not finite where the model overflows.

    A record's does not depend on the other records, to the last bit (``dpsgd/isolation.py``).

    Args:
        chosen: int64 ``[N]``, their numbers; None: all.
        rows: computed at a time; None: ``ROWS``.
        forgiving: where passes break off, each of their records is computed alone, and one with which they break off
            again has no number: nobody's record makes an evaluation fail that was charged for.
    """
    import torch

    from consilium_shared.models.vector import load
    from dpsgd.device import exact_arithmetic, onto
    from dpsgd.isolation import ROWS, filled, one_thread, without_denormals

    model = build(study)
    load(model_bytes, model, study)
    model.to(device).eval()
    chosen, rows = np.arange(len(records)) if chosen is None else chosen, ROWS if rows is None else rows

    own = task.of(study)
    measure, width = own.measure(study), len(own.outputs(study))

    def passed(some: NDArray[np.int64]) -> torch.Tensor:
        inputs = (onto(filled(torch.from_numpy(array), rows), device) for array in records.take(some).inputs)
        outputs: torch.Tensor = model(*inputs)
        return outputs.double()

    def of(some: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], torch.Tensor | None]]:
        try:
            return [(some, passed(some))]
        except Exception as error:
            if not forgiving:
                raise
            log.error("an evaluation's pass broke off: %s", type(error).__name__)  # the text may quote data
        if len(some) == 1:
            return [(some, None)]
        return [each for number in range(len(some)) for each in of(some[number : number + 1])]

    parts, found = [], [np.zeros((0, width))]
    with exact_arithmetic(), one_thread(), without_denormals(), torch.inference_mode():
        for start in range(0, len(chosen), rows):
            parts += of(chosen[start : start + rows])
        for some, outputs in parts:  # only now is a GPU waited for
            if outputs is None:
                found.append(np.full((len(some), width), np.nan))
            else:
                # Of filled rows too: like a model's kernels, what measures rounds by how many numbers there are.
                targets = (filled(torch.from_numpy(each), len(outputs)) for each in records.targets(some))
                found.append(measure(outputs.cpu(), *targets).numpy()[: len(some)])
    return np.concatenate(found)
