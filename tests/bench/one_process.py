"""A sample study's rounds in one process: what sites and server compute, without their programs, keys and network.

All randomness follows from a seed, so that a figure can be had again; these sets are public, and no site works so.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import TypeAdapter

from consilium_client.agent.estimates import make_plan
from consilium_client.commands.baseline import test as metrics_of
from consilium_client.data import AssetSpec, Dataset, load
from consilium_client.training.trainer import train
from consilium_deploy import demo, synthetic
from consilium_deploy.real_data import POOLED, main
from consilium_server.study.optimizer import ServerOptimizer
from consilium_shared import task
from consilium_shared.averaging import averaged
from consilium_shared.models import build
from consilium_shared.models.vector import Vector, pack, to_vector, trained, width, with_trained
from consilium_shared.privacy.measured_noise import empty_coordinates
from consilium_shared.privacy.plan import Plan
from consilium_shared.protocol.summand import bound, fixed_point, largest_weight, read
from consilium_shared.secagg.ring import DTYPES
from consilium_shared.study import Study
from dpsgd.engines import Engine

SUMMARY = "-summary"
"""End of the name of a study of a set's summary."""
STUDIES = task.studies()
CPU = torch.device("cpu")


def contract(name: str, file: str, seed: int = 0, **privacy: Any) -> Study:
    """The study with another seed, and with these fields of ``privacy`` changed; ``mode="none"`` takes the rest out."""
    content = yaml.safe_load((STUDIES[name] / file).read_text())
    content["model"]["seed"] = seed
    content["privacy"] = privacy if privacy.get("mode") == "none" else {**content["privacy"], **privacy}
    if content["privacy"].get("mode") == "none":
        content["training"]["seed"] = seed
    return Study.model_validate(content)


def is_demonstration(name: str) -> bool:
    """Whether the study is one of the demonstration's, whose data are generated."""
    return name.startswith("demo-")


def site_settings(name: str) -> dict[str, Any]:
    """The sample study's ``site.yaml``; of the demonstration, what it writes for each hospital."""
    if is_demonstration(name):
        text = demo.SITE_YAML.format(site=demo.HOSPITALS[0], assets=demo.ASSETS.format(prefix="", data="."))
    else:
        text = (STUDIES[name] / "site.yaml").read_text()
    settings: dict[str, Any] = yaml.safe_load(text)
    return settings


def records(name: str, study: Study, source: Path, folder: Path) -> dict[str, Dataset]:
    """Each site's records, and ``pooled``: those of all. ``folder`` keeps the prepared files."""
    if not any(folder.iterdir()):
        if is_demonstration(name):
            synthetic.generate(folder)
        elif main([name.removesuffix(SUMMARY), "--source", str(source), "--out", str(folder)]) != 0:
            raise SystemExit(f"the set {name} cannot be prepared from {source}")
    template = site_settings(name)["assets"][study.data.asset]
    asset: AssetSpec = TypeAdapter(AssetSpec).validate_python(template)
    return {path.name: load(asset.at(path), study) for path in sorted(folder.iterdir()) if path.is_dir()}


def hospitals(data: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """The sites alone, without ``pooled``."""
    return {site: part for site, part in data.items() if site != POOLED}


def plans(name: str, study: Study, sites: Mapping[str, Dataset], seed: int = 0) -> dict[str, Plan]:
    """Each site's frozen plan: with privacy for its noised number of patients, as ``patient_count`` draws it.

    Raises as ``estimates.make_plan``.
    """
    least, draw = site_settings(name)["policy"]["minimum_patients"], random.Random(seed)
    found = {}
    for site, part in sites.items():
        patients = int(part.train.sum())
        if study.privacy.mode == "dp" and study.privacy.sums is None:
            patients = max(patients + round(draw.gauss(0.0, study.privacy.count_noise)), least, 1)
        found[site] = make_plan(study, patients)
    return found


def federated(
    study: Study,
    sites: Mapping[str, Dataset],
    plans: Mapping[str, Plan],
    seed: int = 0,
    start: Vector | None = None,
    engine: Engine = "book-keeping",
) -> bytes:
    """The model (safetensors) after the study's rounds, as sites and server compute them.

    ``start``: float32 ``[d]``, the weights that it begins with, where they are not the seed's. ``engine``: as of
    ``train``.
    """
    *_, last = rounds(study, sites, plans, seed, start, engine)
    return last


def rounds(
    study: Study,
    sites: Mapping[str, Dataset],
    plans: Mapping[str, Plan],
    seed: int = 0,
    start: Vector | None = None,
    engine: Engine = "book-keeping",
) -> Iterator[bytes]:
    """The model (safetensors) after each of the study's rounds. Contracts of one name that differ in a setting draw the
    same from the same seed, so that runs of both differ by the setting and less by chance."""
    vector, average, decay = to_vector(build(study)) if start is None else start, None, study.aggregation.weight_average
    server = ServerOptimizer.from_study(study.aggregation.optimizer)
    norms: dict[str, float | None] = dict.fromkeys(sites)
    for number in range(1, study.training.rounds + 1):
        model, weights = pack(vector, study), 0
        total = np.zeros(width(study) + empty_coordinates(study), dtype=DTYPES[study.aggregation.ring_bits])
        encoding, encoded = fixed_point(study, len(sites)), np.empty_like(total)
        for site, data in sites.items():
            drawn = hashlib.sha256(f"{study.study} {seed} {number} {site}".encode()).digest()
            result = train(
                model,
                study,
                data,
                plans[site],
                round=number,
                site=site,
                device=CPU,
                seed=drawn,
                engine=engine,
                clipping_norm=norms[site],
            )
            norms[site] = result.clipping_norm
            weight = min(result.patients, largest_weight(study))
            if result.integers is not None:
                encoded[:] = result.integers
            else:
                bound(result.update, study)
                encoding.encode(result.update, encoded, weight / largest_weight(study))
            total, weights = total + encoded, weights + weight
        totals = {"update": total, "weight": np.asarray([weights], dtype=np.uint64)}
        mean = read(study, "training", len(sites), len(sites), totals).mean
        vector = with_trained(vector, server.step(trained(vector, study), mean), study)
        if decay:
            average = averaged(average, trained(vector, study), decay, number)
        published = vector
        if average is not None and number == study.training.rounds:
            published = with_trained(vector, average.astype(np.float32), study)
        yield pack(published, study)


def values(study: Study, model: bytes, data: Mapping[str, Dataset], metric: str) -> dict[str, float]:
    """The metric on each site's held-back patients."""
    return {site: metrics_of(study, model, part, "cpu")[metric] for site, part in data.items()}
