"""What private training costs, side by side: plain SGD, Opacus's hooks, Opacus's ghost clipping, and ours.

    python tests/bench/dp_training.py [--device cpu] [--models lstm gru] [--batches 64] [--engines plain ours]
                                      [--rounds 7] [--quick] [--json PATH]

One process and one thread. All engines train the same model on one batch in turns, and what is compared is compared
within a turn: ``ratio`` is the median over rounds of an engine's seconds of a step by the plain step's. Beside it
stands the same of the processor's time, which other work on the machine moves less. Peak memory is that of a few
steps in a process of its own, above what it held when the model and the batch were there (on Linux). On a GPU, all
engines compute under bfloat16 autocast. Denormal numbers are flushed to zero: the gradients of an untrained LSTM vanish
into them over 200 steps, and a processor that is slow on them would hide all else. Writes
tests/bench/out/dp_training.json: a list of objects with

    model, batch, engine
    step_ms         median of a step, wall time
    ratio           by the plain step, median of rounds
    peak_mib        peak memory
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import multiprocessing
import re
import statistics
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import noise
from dp_training_engines import ENGINES, Training
from dp_training_models import Case, cases
from dpsgd import device

OUT = Path(__file__).parent / "out" / "dp_training.json"
PARAMETERS = 11_180_000
"""Of a ResNet-18, for the noise alone."""
TURN_S, QUICK_TURN_S = 0.4, 0.0
"""Steps of one engine follow each other for about so long."""
MIB = 2**20


@dataclass(frozen=True)
class Row:
    """One line of the table, as it is written."""

    model: str
    batch: int
    engine: str
    step_ms: float
    ratio: float
    peak_mib: float


@dataclass(frozen=True)
class Times:
    """Of one engine's steps, in seconds: wall and processor time, one of each for each round."""

    wall: list[float]
    processor: list[float]

    def ratios(self, plain: Times) -> tuple[float, float]:
        """Wall and processor time by the plain step's, medians over rounds."""
        return _ratio(self.wall, plain.wall), _ratio(self.processor, plain.processor)


def _ratio(mine: list[float], plain: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, plain, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", nargs="+", choices=list(cases("cpu")), default=list(cases("cpu")))
    parser.add_argument("--batches", type=int, nargs="+", help="instead of each model's own sizes")
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES), help="plain runs always")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two rounds of one step each, to see that it runs")
    parser.add_argument("--json", type=Path, default=OUT)
    options = parser.parse_args()
    _settle()
    where = device.choose(options.device)
    rounds, turn_s = (2, QUICK_TURN_S) if options.quick else (options.rounds, TURN_S)
    engines = ["plain", *(engine for engine in options.engines if engine != "plain")]
    console = Console(width=200)
    rows: list[Row] = []
    found = Table(box=box.MARKDOWN, title=f"{device_name(where)}, torch {torch.__version__}, {rounds} rounds")
    for name in ("model", "batch", "engine", "step, ms", "× plain", "× (processor)", "peak, MiB", "× plain", "marks"):
        found.add_column(name, justify="left" if name in ("model", "engine", "marks") else "right")
    for model in options.models:
        case = cases(where.type)[model]
        for batch in options.batches or case.marks:
            times = in_turns(case, batch, engines, where, rounds, turn_s, console)
            peaks = {engine: alone(model, batch, engine, where) for engine in times}
            several = [
                Row(model, batch, engine, 1e3 * statistics.median(spent.wall), spent.ratios(times["plain"])[0],
                    peaks[engine])
                for engine, spent in times.items()
            ]  # fmt: skip
            add_to(found, several, times, case)
            rows += several
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps([rounded(row) for row in rows], indent=1) + "\n")
            console.print(f"measured: {model}, batch {batch}", style="dim")
    console.print(found)
    console.print(noise_alone(where, rounds))


def in_turns(
    case: Case, batch: int, engines: list[str], where: torch.device, rounds: int, turn_s: float, console: Console
) -> dict[str, Times]:
    """Times of each engine; without those of Opacus that cannot train this, whose reason is printed."""
    trainings, counts = {}, {}
    for engine in engines:
        try:
            training = Training(engine, case, batch, where)
            _seconds(training.step, where)  # kernels are chosen and memory is taken
            spent = _seconds(training.step, where)[0]
            training.rest()
        except RuntimeError as error:
            if not engine.startswith("opacus"):
                raise
            console.print(f"{engine} cannot: {str(error).splitlines()[0]}")
            continue
        trainings[engine], counts[engine] = training, max(1, min(30, int(turn_s / spent)))
    times = {engine: Times([], []) for engine in trainings}
    for _ in range(rounds):
        for engine, training in trainings.items():
            wall, processor = _seconds(lambda step=training.step, n=counts[engine]: [step() for _ in range(n)], where)
            times[engine].wall.append(wall / counts[engine])
            times[engine].processor.append(processor / counts[engine])
            training.rest()
    return times


def _seconds(work: Callable[[], object], where: torch.device) -> tuple[float, float]:
    """Wall and processor time, until the device has finished."""
    _finish(where)
    wall, processor = time.perf_counter(), time.process_time()
    work()
    _finish(where)
    return time.perf_counter() - wall, time.process_time() - processor


def _finish(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def alone(model: str, batch: int, engine: str, where: torch.device) -> float:
    """``peak`` in a fresh process."""
    gc.collect()
    if where.type == "cuda":
        torch.cuda.empty_cache()  # the other process needs the room
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(peak, model, batch, engine, where).result()


def peak(model: str, batch: int, engine: str, where: torch.device) -> float:
    """MiB that three steps take at most, above what model, optimizer and batch take."""
    _settle()
    case = cases(where.type)[model]
    Training(engine, case, 2, where).step()  # libraries load now what they load once
    gc.collect()
    if where.type == "cuda":
        training = Training(engine, case, batch, where)
        torch.cuda.reset_peak_memory_stats(where)
        before = torch.cuda.memory_allocated(where)
        _three(training)
        return (torch.cuda.max_memory_allocated(where) - before) / MIB
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again unseen
    training = Training(engine, case, batch, where)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (proc(5))
    before = _resident("VmRSS")
    _three(training)
    return _resident("VmHWM") - before


def _three(training: Training) -> None:
    for _ in range(3):
        training.step()


def _resident(field: str) -> float:
    """A line of /proc/self/status, in MiB."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def _settle() -> None:
    warnings.filterwarnings("ignore")  # Opacus's, of hooks and of the sampling that is off
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


def device_name(where: torch.device) -> str:
    if where.type == "cuda":
        return torch.cuda.get_device_name(where)
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return f"{found[1] if found else 'a processor'}, one thread"


def rounded(row: Row) -> dict[str, str | int | float]:
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in asdict(row).items()}


def add_to(table: Table, rows: list[Row], times: dict[str, Times], case: Case) -> None:
    """The lines of one model and batch."""
    by = {row.engine: row for row in rows}
    for row in rows:
        table.add_row(
            row.model,
            f"{row.batch}",
            row.engine,
            f"{row.step_ms:.1f}",
            f"{row.ratio:.2f}",
            f"{times[row.engine].ratios(times['plain'])[1]:.2f}",
            f"{row.peak_mib:.0f}",
            f"{row.peak_mib / by['plain'].peak_mib:.2f}",
            held(by, times, case) if row.engine == "ours" else "",
        )


def held(by: dict[str, Row], times: dict[str, Times], case: Case) -> str:
    """Ours beside its marks."""
    ours, plain = by["ours"], by["plain"]
    marks = case.marks.get(ours.batch)
    if marks is None:
        return ""
    said = [f"≤ {marks.ratio}: {_verdict(ours.ratio <= marks.ratio)}"]
    if marks.speedup is not None and "opacus-hooks" in times:
        speedup = times["opacus-hooks"].ratios(times["ours"])[0]
        said.append(f"hooks / ours ≥ {marks.speedup}: {speedup:.1f} {_verdict(speedup >= marks.speedup)}")
    if marks.memory is not None:
        memory = ours.peak_mib / plain.peak_mib
        said.append(f"memory ≤ {marks.memory}: {_verdict(memory <= marks.memory)}")
    return "; ".join(said)


def _verdict(met: bool) -> str:
    return "met" if met else "missed"


def noise_alone(where: torch.device, repeat: int) -> str:
    """Secure noise for a ResNet-18 beside torch's own."""
    spent = noise.medians(noise.generators(PARAMETERS, where), where, repeat)
    ratio = spent["noise"] / spent["torch float32"]
    return (
        f"Noise for {PARAMETERS / 1e6:.1f} million parameters: secure {spent['noise']:.0f} ms, torch's float32"
        f" {spent['torch float32']:.0f} ms, float64 {spent['torch float64']:.0f} ms; {ratio:.2f} × float32"
        f" (≤ 1: {_verdict(ratio <= 1)})"
    )


if __name__ == "__main__":
    main()
