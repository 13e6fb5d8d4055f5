"""A study's own private step beside a plain one, on one core and on all of them.

    python tests/bench/study_step.py [--models small-cnn resnet18] [--batches 64 256] [--rounds 9]

Both train the same model of the study on the same records, step by step in turns: the private one as a round runs it
(pieces, clipping, lattice, secure noise), the plain one on the whole batch, as anybody would. ``by plain`` is the
median over turns of private seconds by plain seconds, both with so many cores; ``times faster`` compares a step on all
cores with one on a single core. Patients have one record each. On a busy machine nothing of it means anything.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from consilium_client.data.patients import Draw
from consilium_client.training import invented, trainer
from consilium_client.training.microbatches import Batch, Chunking
from consilium_client.training.steps import PrivateSteps
from consilium_shared import task
from consilium_shared.models import build
from consilium_shared.privacy.plan import PrivacyPlan
from consilium_shared.study import Study
from dpsgd.device import exact_arithmetic
from dpsgd.noise import Noise
from noise import a_study

CPU = torch.device("cpu")
EDGE = 64


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["small-cnn", "resnet18"])
    parser.add_argument("--batches", nargs="+", type=int, default=[64, 256])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    found = [row(name, batch, cores, given.rounds) for name in given.models for batch in given.batches]
    if given.json:
        print(json.dumps(found, indent=2))
        return
    table = Table(*found[0])
    for each in found:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in each.values()))
    Console().print(table)


def row(name: str, batch: int, cores: int, rounds: int) -> dict[str, object]:
    """One line of the table."""
    study = a_study(name, EDGE, batch)
    data = invented.records(study, [1] * batch)
    rows = trainer.private_rows(study, data)
    with exact_arithmetic():
        work = {
            "private, 1 core": (1, private_step(study, rows, batch, 1)),
            "plain, 1 core": (1, plain_step(study, batch)),
            f"private, {cores} cores": (cores, private_step(study, rows, batch, cores)),
            f"plain, {cores} cores": (cores, plain_step(study, batch)),
        }
        seconds: dict[str, list[float]] = {each: [] for each in work}
        for turn in range(rounds + 1):
            for each, (threads, step) in work.items():
                torch.set_num_threads(threads)
                began = time.perf_counter()
                step()
                if turn:
                    seconds[each].append(time.perf_counter() - began)
    one, plain, many, plain_many = seconds.values()

    def ratio(above: list[float], below: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(above, below, strict=True))

    return {
        "model": name,
        "batch": batch,
        "private, 1 core, ms": 1e3 * statistics.median(one),
        "by plain, 1 core": ratio(one, plain),
        f"by plain, {cores} cores": ratio(many, plain_many),
        "times faster": ratio(one, many),
    }


def private_step(study: Study, rows: int, batch: int, workers: int) -> Callable[[], None]:
    """A step as a round runs it, on the batch's records."""
    model, data = build(study).train(), invented.records(study, [1] * batch)
    plan = PrivacyPlan(
        sampling_rate=0.1,
        clipping_norm=1.0,
        noise_multiplier=1.0,
        steps_per_round=1,
        rounds=1,
        delta=1e-5,
        epsilon=3.0,
    )
    loss, everybody = task.of(study).loss(study, CPU), Draw(np.arange(batch), np.arange(batch))
    steps = PrivateSteps(model, study, plan, loss, Noise(bytes(32)), rows, workers=workers)
    chunking = Chunking(rows, fixed=True)
    return lambda: steps(Batch(study, data, everybody, CPU, np.random.default_rng(0), chunking))


def plain_step(study: Study, batch: int) -> Callable[[], None]:
    """A step of torch's own on the whole batch."""
    model, data = build(study).train(), invented.records(study, [1] * batch)
    optimizer, loss = torch.optim.SGD(model.parameters(), 0.1), task.of(study).loss(study, CPU)
    inputs, targets = (tuple(map(torch.from_numpy, part)) for part in data.take(np.arange(batch)))

    def step() -> None:
        optimizer.zero_grad()
        loss(model(*inputs), *targets).mean().backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
