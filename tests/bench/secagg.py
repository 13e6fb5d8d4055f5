"""What secure aggregation costs, side by side with Flower's SecAgg+ and with a plain sum of float32.

    python tests/bench/secagg.py [--repeats 3] [--sites 3 10 20] [--sizes 1000000 10000000] [--long]

One process and one thread, without a network. Seconds are the processor's, and all are run in turns, so that the ratios
hold on a busy machine too; each figure is the median. Ours has no row where fewer sites stay than its threshold.
``--long`` adds 100 sites, where Flower alone takes minutes. Writes tests/bench/out/secagg.json: a list of objects with

    who             ours, flower or plain
    n, d, drops     sites; coordinates of the model; sites that leave before their upload
    client_s        seconds of one site (median of those that stayed), without training and transport
    path_s          of these, what is left when masks are made while the site trains; else null
    server_s        seconds of the server, from the advertised keys to the mean
    bytes_up        what one site uploads besides its public keys, in bytes
    floor_ratio     speed of adding n masks, as part of what the machine can do: keystream and one addition; else null
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import secagg_flower
import secagg_ours
from consilium_shared.secagg import prg
from consilium_shared.secagg.ring import DTYPES, FixedPoint

OUT = Path(__file__).parent / "out" / "secagg.json"


@dataclass(frozen=True)
class Costs:
    """Of one round, in seconds and bytes; ``path_s`` and ``floor_ratio`` where masks were added."""

    client_s: float
    server_s: float
    bytes_up: int
    path_s: float | None = None
    floor_ratio: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table, as it is written."""

    who: str
    n: int
    d: int
    drops: int
    client_s: float
    path_s: float | None
    server_s: float
    bytes_up: int
    floor_ratio: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sites", type=int, nargs="+", default=[3, 10, 20])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10**6, 10**7])
    parser.add_argument("--long", action="store_true", help="100 sites and a million coordinates besides")
    options = parser.parse_args()
    cases = [(n, d) for n in options.sites for d in options.sizes] + ([(100, 10**6)] if options.long else [])
    console = Console(width=120)
    console.print(encodings())
    rows = []
    for n, d in cases:
        for drops in sorted({0, 1, round(0.2 * n)}):
            rows += compare(n, d, drops, options.repeats)
            OUT.parent.mkdir(exist_ok=True)
            OUT.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
            console.print(f"measured: {n} sites, {d:.0e} coordinates, {drops} dropped", style="dim")
    console.print(table(rows))


def compare(n: int, d: int, drops: int, repeats: int) -> list[Row]:
    """All in turns; medians."""
    draw = np.random.default_rng(n * d)
    update = (draw.normal(size=d) * 0.01).astype(np.float32)
    weights = [int(weight) for weight in draw.integers(100, 900, n)]
    found: dict[str, list[Costs]] = {who: [] for who in WHO}
    for _ in range(repeats):
        for who, run in WHO.items():
            if who != "ours" or secagg_ours.possible(n, drops):
                found[who].append(run(update, weights, drops))
    return [
        Row(
            who,
            n,
            d,
            drops,
            client_s=statistics.median(costs.client_s for costs in several),
            path_s=median([costs.path_s for costs in several]),
            server_s=statistics.median(costs.server_s for costs in several),
            bytes_up=several[0].bytes_up,
            floor_ratio=median([costs.floor_ratio for costs in several]),
        )
        for who, several in found.items()
        if several
    ]


def median(values: list[float | None]) -> float | None:
    """Of those that there are."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def plain(update: np.ndarray, weights: list[int], drops: int) -> Costs:
    """The sum that hides nothing: float32, weight last."""
    spent, uploads = [], []
    for weight in weights[: len(weights) - drops]:
        start = time.process_time()
        vector = np.empty(update.size + 1, np.float32)
        np.multiply(update, weight, out=vector[:-1])
        vector[-1] = weight
        spent.append(time.process_time() - start)
        uploads.append(vector)
    start = time.process_time()
    total = np.zeros(update.size + 1, np.float32)
    for vector in uploads:
        total += vector
    mean = total[:-1]
    mean /= total[-1]
    server_s = time.process_time() - start
    assert np.abs(mean - update).max() < 1e-6
    return Costs(statistics.median(spent), server_s, total.nbytes)


def flower(update: np.ndarray, weights: list[int], drops: int) -> Costs:
    """Flower's SecAgg+ with its defaults: 22 bits over ± 8."""
    done = secagg_flower.Round(update, weights, drops)
    assert np.abs(done.mean - update).max() < 1e-3
    return Costs(statistics.median(done.client_s), done.server_s, done.bytes_up)


def ours(update: np.ndarray, weights: list[int], drops: int) -> Costs:
    """Our protocol against a malicious server, 32 bits."""
    done = secagg_ours.Round(update, weights, drops)
    assert np.abs(done.mean - update).max() < 1e-5
    client_s, path_s = statistics.median(done.client_s), statistics.median(done.path_s)
    return Costs(client_s, done.server_s, done.bytes_up, path_s, masking_of_floor(len(weights), update.size))


WHO: dict[str, Callable[[np.ndarray, list[int], int], Costs]] = {"plain": plain, "flower": flower, "ours": ours}
"""Each runs one round: (update float32 ``[d]``, weight of each site, how many of the last sites drop)."""


def masking_of_floor(n: int, d: int) -> float:
    """Speed of adding ``n`` masks to ``d`` ring elements of 32 bits, as part of the machine's floor.

    The floor is what no implementation can be faster than: the keystream of one tile after the other, each added to a
    vector of one tile, which never leaves the cache.
    """
    vector, keys = np.zeros(d, np.uint32), [os.urandom(prg.KEY_BYTES) for _ in range(n)]
    stream = prg.fastest()(keys[0])
    buffer = bytearray(prg.BUFFER)
    mask, total = np.frombuffer(buffer, np.uint32, prg.TILE // 4), np.zeros(prg.TILE // 4, np.uint32)
    tiles = max(100, min(1000, n * vector.nbytes // prg.TILE))
    floor, masking = 0.0, 0.0  # bytes a second; the best of several, since a busy machine only makes both slower
    for _ in range(15):
        start = time.process_time()
        for tile in range(tiles):
            stream(tile, prg.TILE, memoryview(buffer))
            np.add(total, mask, out=total)
        floor = max(floor, tiles * prg.TILE / (time.process_time() - start))
        start = time.process_time()
        prg.apply(vector, keys[: n // 2], keys[n // 2 :])
        masking = max(masking, n * vector.nbytes / (time.process_time() - start))
    return masking / floor


def table(rows: list[Row]) -> Table:
    """Seconds and bytes, and how they compare with Flower's and with the plain sum's."""
    found = Table(title="One round. In brackets: times the plain sum's. × Flower: how much faster, site and server")
    for name in ("n", "d", "dropped", "who", "site, ms", "on path", "server, ms", "up, MB", "of floor", "× Flower"):
        found.add_column(name, justify="left" if name == "who" else "right")
    by = {(row.n, row.d, row.drops, row.who): row for row in rows}
    for row in rows:
        if row.who == "plain":
            found.add_section()
        base, peer = by[row.n, row.d, row.drops, "plain"], by[row.n, row.d, row.drops, "flower"]
        found.add_row(
            f"{row.n}",
            f"{row.d:.0e}",
            f"{row.drops}",
            row.who,
            f"{1e3 * row.client_s:.1f}",
            "" if row.path_s is None else f"{1e3 * row.path_s:.1f}",
            f"{1e3 * row.server_s:.1f} ({row.server_s / base.server_s:.1f})",
            f"{row.bytes_up / 1e6:.2f} ({row.bytes_up / base.bytes_up:.3f})",
            "" if row.floor_ratio is None else f"{row.floor_ratio:.2f}",
            f"{peer.client_s / row.client_s:.1f}, {peer.server_s / row.server_s:.1f}" if row.who == "ours" else "",
        )
    return found


def encodings() -> Table:
    """What narrower ring elements cost in exactness: the error of a mean of equal weights, in parts of the bound."""
    found = Table(title="Encodings: error of the mean, in parts of the bound of a coordinate")
    for name in ("bits", "n", "levels", "bytes a number", "stated at most", "measured at most", "root mean square"):
        found.add_column(name, justify="right")
    draw = np.random.default_rng(0)
    for bits, dtype in DTYPES.items():
        for n in (3, 10, 20, 100):
            ring = FixedPoint(bits, n, 1.0)
            total, exact = np.zeros(10_000, dtype), np.zeros(10_000)
            one, mean = np.empty(10_000, dtype), np.empty(10_000)
            for _ in range(n):
                values = draw.uniform(-1, 1, 10_000)
                ring.encode(values, one)
                total += one
                exact += values / n
            ring.decode(total, mean, n)
            error = np.abs(mean - exact)
            found.add_row(
                f"{bits}",
                f"{n}",
                f"2^{ring.levels.bit_length() - 1}",
                f"{dtype.itemsize}",
                f"{ring.error:.1e}",
                f"{error.max():.1e}",
                f"{np.sqrt(np.mean(error**2)):.1e}",
                end_section=n == 100,
            )
    return found


if __name__ == "__main__":
    main()
