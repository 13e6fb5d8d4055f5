"""What the noise of a private step costs: beside torch's own generator, and beside private and plain steps.

    python tests/bench/noise.py [--threads 1] [--repeat 5] [--device cpu]

One run interleaves everything, so that the ratios hold on a busy machine too. Prints JSON: medians in milliseconds of
processor time (of wall time on an accelerator), and the noise's part of each step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from tests.support.records import dataset

from consilium_client.data.dataset import ArrayDataset
from consilium_client.data.patients import Draw
from consilium_client.training import steps, trainer
from consilium_client.training.microbatches import Batch
from consilium_shared import task
from consilium_shared.models import build
from consilium_shared.study import Study
from dpsgd import device, engines
from dpsgd.noise import Noise
from dpsgd.private_optimizer import PrivateOptimizer

STEPS = {"resnet18-gn": [(64, 64), (64, 16)], "small-cnn": [(64, 64)]}
"""Model to (edge of an image, patients in a step)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    where = device.choose(options.device)
    found = {}
    with device.exact_arithmetic():
        for name, sizes in STEPS.items():
            for edge, batch in sizes:
                found[f"{name} {edge}x{edge}, {batch} patients"] = compare(name, edge, batch, where, options.repeat)
    print(json.dumps(found, indent=2))


def compare(name: str, edge: int, batch: int, where: torch.device, repeat: int) -> dict[str, float]:
    """Medians, and ratios of medians."""
    study = a_study(name, edge, batch)
    private, plain = build(study).to(where), build(study).to(where)
    count = sum(p.numel() for p in private.parameters())
    loss = task.of(study).loss(study, where)
    wrapped, ordinary = engines.wrap(private, "book-keeping"), torch.optim.SGD(plain.parameters(), 0.1)
    optimizer = PrivateOptimizer(
        torch.optim.SGD(private.parameters(), 0.1),
        wrapped.tape,
        clipping_norm=1.0,
        noise_multiplier=1.0,
        expected_batch=batch,
        noise=Noise(bytes(32)),
    )
    data = some_records(edge, batch)
    everyone = Draw(np.arange(batch), np.arange(batch))
    drawn = Batch(study, data, everyone, where, np.random.default_rng(0))
    pieces = list(drawn.padded_microbatches(trainer.private_rows(study, data)))
    whole = torch.from_numpy(data.inputs[0]).to(where), torch.from_numpy(data.labels[0]).to(where)

    def private_step() -> None:
        optimizer.begin()
        steps.accumulate(wrapped, optimizer, loss, pieces)
        optimizer.finish()

    def plain_step() -> None:
        ordinary.zero_grad()
        loss(plain(whole[0]), whole[1]).mean().backward()
        ordinary.step()

    median = medians(
        {
            **generators(count, where),
            "private step": private_step,
            "plain step": plain_step,
        },
        where,
        repeat,
    )
    shares = {f"noise / {each}": median["noise"] / median[each] for each in median if each != "noise"}
    shares["private step / plain step"] = median["private step"] / median["plain step"]
    return {"deviates": count, **{f"{k} ms": round(v, 2) for k, v in median.items()}} | {
        k: round(v, 4) for k, v in shares.items()
    }


def generators(count: int, where: torch.device) -> dict[str, Callable[[], object]]:
    """Our noise and torch's own, ``count`` deviates of each."""
    noise, total = Noise(bytes(32)), torch.zeros(count, dtype=torch.float64, device=where)
    return {
        "noise": lambda: noise.add_to(total, 2.0**32),
        "torch float32": lambda: torch.randn(count, device=where),
        "torch float64": lambda: torch.randn(count, dtype=torch.float64, device=where),
    }


def medians(pieces_of_work: dict[str, Callable[[], object]], where: torch.device, repeat: int) -> dict[str, float]:
    """Milliseconds of each, all in turns."""
    times: dict[str, list[float]] = {each: [] for each in pieces_of_work}
    for turn in range(repeat + 1):
        for each, work in pieces_of_work.items():
            spent = timed(work, where)
            if turn:  # the first finds cold caches
                times[each].append(spent)
    return {each: statistics.median(spent) for each, spent in times.items()}


def timed(work: Callable[[], object], where: torch.device) -> float:
    clock = time.process_time if where.type == "cpu" else time.perf_counter
    if where.type == "cuda":
        torch.cuda.synchronize()
    begin = clock()
    work()
    if where.type == "cuda":
        torch.cuda.synchronize()
    return (clock() - begin) * 1000


def a_study(name: str, edge: int, batch: int) -> Study:
    return Study.model_validate(
        {
            "study": "bench",
            "task": "image-classification",
            "model": {"name": name},
            "data": {
                "asset": "a",
                "label": {"column": "y", "classes": ["0", "1"]},
                "image": {"size": edge},
            },
            "training": {"rounds": 1, "steps_per_round": 1, "expected_batch": batch, "optimizer": {"lr": 0.1}},
            "privacy": {"mode": "none"},
        }
    )


def some_records(edge: int, count: int) -> ArrayDataset:
    draw = np.random.default_rng(0)
    return dataset(
        inputs=draw.random((count, 1, edge, edge), dtype=np.float32),
        statics=None,
        labels=np.arange(count) % 2,
        patients=np.arange(count),
        patient_count=count,
        train=np.ones(count, dtype=bool),
    )


if __name__ == "__main__":
    main()
