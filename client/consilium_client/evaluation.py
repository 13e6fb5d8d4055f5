"""The global model on the patients that this site has held back: counts, and nothing else, leave."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from consilium_client.data.records import Records
from consilium_shared import metrics
from consilium_shared.errors import DataError
from consilium_shared.models import build, shape
from consilium_shared.study import Study

if TYPE_CHECKING:
    import torch

BATCH = 256


def evaluate(model_bytes: bytes, study: Study, records: Records, device: torch.device) -> metrics.Counts:
    """Counts (``consilium_shared.metrics``) of the model on the records of patients held back.

    Args:
        model_bytes: the global model, as ``vector.pack`` wrote it.
        study: the study.
        records: the asset's records; patients for training are left out.
        device: where to compute.

    Raises:
        PeerError: the model's bytes are not of this study.
        DataError: the model gives no probabilities for some record (its weights are too large).
    """
    import torch

    from consilium_client.training.device import exact_arithmetic
    from consilium_shared.models.vector import load_vector, unpack

    records = records.select(held_back=True) if records.train.any() else records
    model = build(study)
    load_vector(model, unpack(model_bytes, model, study))
    model.to(device).eval()
    found = [np.zeros((0, shape.classes(study)))]
    with exact_arithmetic(), torch.inference_mode():
        for start in range(0, len(records), BATCH):
            part = slice(start, start + BATCH)
            inputs = [records.inputs[part], *([] if records.statics is None else [records.statics[part]])]
            logits = model(*(torch.from_numpy(array).to(device) for array in inputs))
            found.append(torch.softmax(logits.double().cpu(), dim=1).numpy())
    probabilities = np.concatenate(found)
    if not np.isfinite(probabilities).all():
        raise DataError(f"study {study.study}: the model gives no probability for some of the records held back")
    return metrics.count(records.labels, probabilities)
