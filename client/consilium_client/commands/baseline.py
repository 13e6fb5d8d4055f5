"""Baseline of this site alone: the study's training on local data only, for comparison. Nothing of it leaves.

Because nothing leaves, nothing is charged; the model is thrown away and only the metrics are shown on this screen.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from consilium_client import data
from consilium_client.agent.estimates import make_plan
from consilium_client.data.dataset import Dataset
from consilium_client.prepared.key import StoreKey
from consilium_client.prepared.store import AssetFolder, PreparedStore
from consilium_client.site import Home
from consilium_client.site_config import SiteConfig
from consilium_shared import metrics, task
from consilium_shared.errors import ConfigurationError, DataError
from consilium_shared.privacy.accountant import check_delta
from consilium_shared.privacy.plan import Plan, PrivacyPlan
from consilium_shared.study import Study

if TYPE_CHECKING:
    from consilium_shared.models.vector import Vector
    from dpsgd.engines import Engine


def load_asset(
    config: SiteConfig,
    home: Home,
    asset: str,
    study: Study,
    on_progress: Callable[[int, int], None] | None = None,
) -> Dataset:
    """The records of one of the site's assets, prepared for the study; ``on_progress`` as in ``data.load``.

    They are found in the prepared store and kept there, as the agent's are, where this is the agent's account.

    Raises:
        ConfigurationError: site.yaml has no such asset.
        DataError: it cannot be used.
    """
    spec = config.assets.get(asset)
    if spec is None:
        known = ", ".join(sorted(config.assets)) or "none"
        raise ConfigurationError(f"site.yaml has no asset {asset!r} (assets: {known})")
    return data.load(spec.at(home.root), study, on_progress, _store(home, config, asset))


def _store(home: Home, config: SiteConfig, asset: str) -> AssetFolder | None:
    """The asset's folder of the prepared store; None for another account, whose files the agent could not read."""
    if not home.keys.is_dir() or home.root.stat().st_uid != os.geteuid():
        return None
    return PreparedStore(home.prepared, StoreKey.at(home.store_key), config.processes).asset(asset)


def start_from(study: Study, weights: Path | None) -> Vector | None:
    """The weights ``[d]`` that the study names, out of their file; None where it names none.

    Raises:
        ConfigurationError: it names some and no file is given, or the file has others.
    """
    if study.model.start is None and weights is None:
        return None
    if weights is None:
        raise ConfigurationError(
            f"study {study.study} starts from weights that its coordinator has; give their file: --weights FILE"
        )
    from consilium_shared.models import start

    found = start.read(weights, study).vector
    start.check(found, study, weights)
    return found


def _plan(study: Study, patients: int) -> Plan:
    """Plan of the study for so many patients, who may be those of all its sites in one place."""
    privacy = study.privacy
    if privacy.sums is None or privacy.delta is None:
        return make_plan(study, patients)
    check_delta(privacy.delta, patients)
    # It is the same for any number; a site with more patients than all sites should have is refused, these are not.
    return make_plan(study, min(patients, int(study.training.expected_batch / privacy.sums.sampling_rate)))


def train_alone(
    study: Study,
    records: Dataset,
    device_name: str,
    on_progress: Callable[[int, int], None] | None = None,
    start: Vector | None = None,
    engine: Engine = "book-keeping",
) -> bytes:
    """The study's rounds on these records alone, with the same privacy; returns the model (safetensors).

    It is the average over rounds where the study's last model is that (``aggregation.weight_average``), so that the two
    differ by whose records they saw. The rest of ``aggregation`` is about several sites' updates: each round goes on
    from what the one before gave, unbounded and without a server's optimizer.

    ``start``: float32 ``[d]``, the weights to begin with; those of the study's seed by default.
    ``engine``: to per-sample gradients.

    Raises as ``trainer.train`` and ``study_service.make_plan``, and DataError also where private training diverged.
    """
    from consilium_client.training.trainer import DIVERGED, train
    from consilium_shared.averaging import averaged
    from consilium_shared.models import build
    from consilium_shared.models.vector import pack, to_vector, trained, with_trained
    from dpsgd import device

    plan = _plan(study, int(records.train.sum()))
    if isinstance(plan, PrivacyPlan):
        plan = plan.whole()  # alone a site has nobody to share its noise with
    where = device.choose(device_name)
    vector = to_vector(build(study)) if start is None else start
    sums, share = study.privacy.sums, 1.0
    if sums is not None:  # the contract's step is of all sites' patients; alone it is of these
        share = study.training.expected_batch / (sums.sampling_rate * records.train.sum())
    average, decay, norm = None, study.aggregation.weight_average, None
    for number in range(1, study.training.rounds + 1):
        result = train(
            pack(vector, study),
            study,
            records,
            plan,
            round=number,
            site="alone",
            device=where,
            clipping_norm=norm,
            engine=engine,
        )
        if result.diverged:
            raise DataError(f"study {study.study}, round {number}: {DIVERGED}")
        norm = result.clipping_norm
        vector = with_trained(vector, trained(vector, study) + share * result.update, study)
        if decay:
            average = averaged(average, trained(vector, study), decay, number)
        if on_progress is not None:
            on_progress(number, study.training.rounds)
    return pack(vector if average is None else with_trained(vector, average.astype("float32"), study), study)


def test(study: Study, model: bytes, records: Dataset, device_name: str) -> dict[str, Any]:
    """Metrics of a model on the held-back patients of these records.

    Raises:
        PeerError: the model is not of this study.
    """
    from consilium_client.training.evaluation import evaluate
    from dpsgd import device

    layout = task.of(study).layout(study, local=True)
    return metrics.metrics(evaluate(model, study, records, device.choose(device_name), layout), layout)
