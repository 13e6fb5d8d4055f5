"""One round of local training, private or not: from the global model to this site's update."""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from consilium_client.data.dataset import Dataset, Part
from consilium_client.data.patients import Draw, PatientSampler
from consilium_client.training.microbatches import Batches, Chunking
from consilium_client.training.steps import PrivateSteps, Probe, Stepper, lattice_of, plain_steps
from consilium_shared import task
from consilium_shared.errors import ConfigurationError, DataError
from consilium_shared.limits import UPDATE_COORDINATE
from consilium_shared.models import build
from consilium_shared.models.vector import load, moved, width
from consilium_shared.privacy.plan import Plan, PrivacyPlan
from consilium_shared.private_sums import Integers
from consilium_shared.study import Study
from dpsgd import engines
from dpsgd.device import exact_arithmetic
from dpsgd.engines import Engine
from dpsgd.independence import check_once
from dpsgd.isolation import ROWS
from dpsgd.keystream import SEED_BYTES, KeyStream
from dpsgd.noise import Noise

INPUT_NUMBERS = 2**21
"""Most input numbers of one physical batch: 32 images of 256 × 256; activations are some ten to fifty times that."""

PHYSICAL_BATCH = 512
"""Most samples of one physical batch; beyond, nothing gets faster."""

LEAST_SHARE = 2.0**-64
"""Smallest share of the sampling rate. The sampler's rates are multiples of it: with a smaller one nobody is drawn."""

log = logging.getLogger("consilium.agent")

DIVERGED = "training diverged; the study needs a lower learning rate"

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TrainResult:
    """Result of a round.

    Attributes:
        update: float32 ``[t]``, local minus global weights, of those that the study trains (``models.vector``).
        steps: private steps that really ran.
        patients: patients that could have been drawn; the weight of the update.
        clipping_norm: bound with which the next round begins; None without privacy.
        diverged: with privacy, that a weight moved farther than ``limits.UPDATE_COORDINATE``; the update is 0 then.
        integers: uint32 ``[t + r]``, the sum of clipped gradients with its noise, on the grid of a study with
            ``privacy.sums``: what leaves in place of ``update``, which is what it would move the model by alone; the
            last r are of the study's empty coordinates.
    """

    update: npt.NDArray[np.float32]
    steps: int
    patients: int
    clipping_norm: float | None
    diverged: bool = False
    integers: Integers | None = None


def train(
    model_bytes: bytes,
    study: Study,
    records: Dataset,
    plan: Plan,
    *,
    round: int,
    site: str,
    device: torch.device,
    seed: bytes | None = None,
    attempt: int = 1,
    clipping_norm: float | None = None,
    on_progress: Progress | None = None,
    probe: Probe | None = None,
    engine: Engine = "book-keeping",
    rows: int | None = None,
    workers: int = 1,
) -> TrainResult:
    """Train from the global model for exactly the round's steps.

    Each step draws patients by Poisson sampling, and of each at most so many records as the plan says. With privacy,
    the mean gradient of a patient's records is clipped and Gaussian noise is added to the sum: the event that the
    accountant charges. Without, the same steps run plainly. What is not finite adds nothing to its step: with privacy a
    patient with one such record, without privacy a record with such a loss. With privacy nothing that a record holds
    makes a round fail (``steps.py``), and one without a patient is noise alone.

    Args:
        model_bytes: the global model, as ``vector.pack`` wrote it.
        study: the study; ``training`` says how, ``privacy`` only through ``plan``.
        records: the asset's records; patients held back are left out.
        plan: sampling rate, records, clipping norm, noise and steps. One without privacy is taken only for a study that
            says ``mode: none``; there the study says the rest.
        round: number of the round; with ``training.seed`` and ``site`` it fixes all randomness, without privacy.
        site: this site's name.
        device: where to compute.
        seed: 32 secret bytes of the site's own from which sampling, augmentation and noise follow, kept until the round
            is answered so that a round which a crash interrupted is the same round again; None for fresh ones. A study
            can give a seed (``training.seed``) without privacy alone; that then takes this one's place.
        attempt: which charge for this round it is; where the study gives the seed, it tells them apart.
        clipping_norm: to begin with, where the study lets it follow the gradients and the round before ended with it;
            None for the plan's.
        on_progress: called with (steps done, steps of the round).
        probe: an audit's, on records that no patient has; only with privacy.
        engine: how per-sample gradients are found; the event is the same.
        rows: with privacy, of a microbatch of several patients (``private_rows``, or what the machine passed).
        workers: threads that compute private microbatches side by side; the result does not depend on it.

    Raises:
        PeerError: the model's bytes are not of this study.
        ConfigurationError: the study asks for privacy and the plan gives none, or it gives a seed with privacy, or its
            model cannot be trained with privacy (``independence``, ``lattice``).
        DataError: without privacy, where no patient is for training, or a weight moved farther than
            ``limits.UPDATE_COORDINATE``.
    """
    private = plan if isinstance(plan, PrivacyPlan) else None
    if (study.privacy.mode == "dp") != (private is not None):
        raise ConfigurationError(f"study {study.study}: its privacy mode is {study.privacy.mode}, its plan is another")
    part = records.part("train")
    if private is None and not part.patient_count:
        raise DataError(f"study {study.study}: no patient is left for training on {study.data.asset}")
    model = build(study)
    load(model_bytes, model, study)
    model.to(device).train()
    loss = task.of(study).loss(study, device)
    if private is not None:
        check_independence(study)
    secret = _seed(study, round, attempt, site, seed)
    sampler = _sampler(study, records, part, plan, secret)
    generator, words = np.random.default_rng(KeyStream(secret, "augmentation").words(4)), KeyStream(secret, "rows")
    if private is None:
        rows = physical_batch(records)
    elif rows is None:
        rows = private_rows(study, records)
    chunking = Chunking(rows, fixed=private is not None)
    done = 0
    if private is not None and clipping_norm is not None and study.training.adaptive_clipping is not None:
        private = replace(private, clipping_norm=clipping_norm)
    steps: PrivateSteps | None = None
    before = (round - 1) * plan.steps_per_round
    with exact_arithmetic(), Batches(study, records, _within(part, sampler), device, generator, chunking) as batches:
        if private is not None:
            steps = PrivateSteps(
                model, study, private, loss, Noise(secret), rows, engine, probe, words, workers, before
            )
        stepper: Stepper = plain_steps(model, study, loss, rows, words, before) if steps is None else steps
        for batch in batches:
            stepper(batch)
            done += 1
            if on_progress is not None:
                on_progress(done, plan.steps_per_round)
    model.zero_grad()  # of a large model what is needed no more is memory
    update = moved(model, model_bytes, study)
    diverged = not -UPDATE_COORDINATE <= update.min() <= update.max() <= UPDATE_COORDINATE  # NaN is too
    if diverged and private is None:
        raise DataError(f"study {study.study}, round {round}: {DIVERGED}")
    if diverged:  # it was made of noisy sums that are paid for; a refusal would tell of them, and cost a charge
        log.error("study %s, round %d: %s. This site's update is 0", study.study, round, DIVERGED)
        update = np.zeros_like(update)
    norm = None if steps is None else steps.optimizer.clipping_norm
    integers = None if steps is None or study.privacy.sums is None else steps.integers()
    return TrainResult(update, done, part.patient_count, norm, diverged, integers)


def check_independence(study: Study) -> None:
    """``independence.check`` of the study's model and loss, once for each study in this process.

    Raises:
        ConfigurationError: clipping would not bound what one patient changes.
    """
    own = task.of(study)
    # What couples samples does not depend on the size; float64 on 224 × 224 is slow.
    examples = own.invented(study, 3, np.random.default_rng(0), small=True)
    inputs, targets = (tuple(map(torch.from_numpy, part)) for part in examples)
    check_once(study.digest, build(study), own.loss(study, torch.device("cpu")), inputs, targets)


def check_mechanism(study: Study, plan: PrivacyPlan, engine: Engine) -> None:
    """Raises ConfigurationError where the site's engine cannot compute what the study asks, or the plan's noise and
    bound are beyond what the lattice takes."""
    engines.check_precision(engine, study.training.precision)
    numbers = width(study) + (study.training.adaptive_clipping is not None)
    lattice_of(study, plan, numbers)


def physical_batch(records: Dataset) -> int:
    """Records that are computed at a time; a step of more is made of several, with the same result.

    A patient with more records than that is computed at once all the same, and takes so much more memory.
    """
    return max(1, min(PHYSICAL_BATCH, INPUT_NUMBERS // max(map(math.prod, records.shapes))))


def private_rows(study: Study, records: Dataset) -> int:
    """Rows of a private microbatch: ``ROWS``, or 1, each patient alone, where so many would be too large.

    Anything between would let kernels tell one row from another (``isolation``). Recurrent layers spend most of a
    small microbatch on waiting from step to step, so of a large batch they take twice as many.
    """
    if task.kind(study).stepwise and study.training.expected_batch >= 4 * ROWS:
        return 2 * ROWS if physical_batch(records) >= 2 * ROWS else 1
    return ROWS if physical_batch(records) >= ROWS else 1


def _seed(study: Study, round: int, attempt: int, site: str, secret: bytes | None) -> bytes:
    """Seed of all randomness of the round: the site's secret, or without privacy what the study says."""
    public = study.training.seed
    if public is None:
        return secrets.token_bytes(SEED_BYTES) if secret is None else secret
    if study.privacy.mode != "none":
        raise ConfigurationError(f"study {study.study}: training.seed is for studies without privacy")
    text = f"consilium training\0{public}\0{round}\0{attempt}\0{site}"
    return hashlib.sha256(text.encode()).digest()


def _within(part: Part, draws: PatientSampler) -> Iterator[Draw]:
    """Draws from one part, as record numbers of the whole data set."""
    return (Draw(part.records[draw.records], draw.owners) for draw in draws)


def _sampler(study: Study, data: Dataset, records: Part, plan: Plan, seed: bytes) -> PatientSampler:
    """Draws of the round; with privacy exactly as the plan has them."""
    if isinstance(plan, PrivacyPlan):
        rate, most = plan.sampling_rate, plan.records_per_patient
    else:
        rate = min(1.0, study.training.expected_batch / records.patient_count)
        most = study.training.records_per_patient
    shares = _shares(study, data, records)
    return PatientSampler(records.patients, records.patient_count, rate, plan.steps_per_round, seed, most, shares)


def _shares(study: Study, data: Dataset, records: Part) -> npt.NDArray[np.float64] | None:
    """Share of the sampling rate that each patient's classes ask for: 1 for those of the class with the largest.

    Rates so far apart that float64 has no number for their ratio give the least share: the sampler takes no 0, and
    after the charge nobody's class may decide whether a round fails.
    """
    rates = study.training.class_sampling
    if rates is None:
        return None
    found = np.zeros(records.patient_count)
    own = np.maximum(np.asarray(rates, dtype=np.float64) / max(rates), LEAST_SHARE)
    np.maximum.at(found, records.patients, own[data.targets(records.records)[0]])
    return found
