"""Where a study's private steps are computed here, and in pieces of how many rows: tried before anything is charged."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from consilium_client.training import device, invented
from consilium_client.training.gradients import Way
from consilium_client.training.rehearsal import rehearse
from consilium_client.training.trainer import private_rows
from consilium_shared.errors import MachineError
from consilium_shared.models import shape
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.study import Study

log = logging.getLogger("consilium.agent")


class Fit(NamedTuple):
    """What a study is computed with; ``rows``: with privacy, of a piece in which several patients are."""

    device: torch.device
    rows: int | None


def sizes(study: Study) -> list[int]:
    """Rows of a piece, the best first; at 1 each patient has a piece alone."""
    return sorted({private_rows(study, invented.records(study, [1])), 1}, reverse=True)


def fitting(study: Study, plan: PrivacyPlan, device_name: str, way: Way) -> Fit:
    """The first size of pieces that this machine takes.

    Raises:
        MachineError: its memory takes none.
        ConfigurationError: there is no such device.
    """
    where, failed = device.choose(device_name), ""
    for rows in sizes(study):
        failed = _rehearsed(study, plan, where, way, rows)
        if not failed:
            return Fit(where, rows)
        log.warning("study %s: pieces of %d records are too much for this machine: %s", study.study, rows, failed)
    numbers = " and ".join("×".join(map(str, each)) for each in shape.inputs(study))
    raise MachineError(
        f"study {study.study}: this machine ({where}) cannot compute the largest piece of a step, "
        f"{plan.records_per_patient * study.training.augment_multiplicity} records of {numbers} numbers ({failed}). It "
        "needs more memory, or the study smaller inputs or fewer records_per_patient"
    )


def _rehearsed(study: Study, plan: PrivacyPlan, where: torch.device, way: Way, rows: int) -> str:
    """Why the largest pieces cannot be computed, or nothing. It may quote an error: nobody's data is there."""
    try:
        rehearse(study, plan, where, way, rows)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""
