"""Preparing an image archive: in memory at each start, into the prepared store, and out of it.

    python tests/bench/preparation.py [--quick] [--archive 100000] [--samples 30000000] [--folder FOLDER]

Prints lines of JSON. Each is one fresh process that loads an asset of generated files and trains a private round: wall
and processor seconds (its own, and those of the processes that it started), and the most memory that it held, above
what its imports take. ``--archive N``: one archive of so many images at 224 × 224, which take 19.6 GiB a 100,000 on the
disk, with a bound on the agent's memory of 2 GiB; ``--samples N``: Parquet tables of a tenth of N rows and of N, of the
same 2,000 patients; the others are the table of docs/results/preparation.md.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from tests.support import studies

from consilium_deploy.dicom_files import Scanner, write_radiograph

CASES = {
    "20,000 files of 8 KiB, 64 x 64": (20_000, 64, 64),
    "5,000 files of 1 MiB, 724 x 724, to 224 x 224": (5_000, 724, 224),
    "one file of 9000 x 9000, to 224 x 224": (1, 9000, 224),
}
PATIENTS_OF = 4
"""Images of a patient, where there are several."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the files")
    parser.add_argument("--archive", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one by default")
    parser.add_argument("--samples", type=int, default=0)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        measure(**json.loads(given.measure))
        return
    with tempfile.TemporaryDirectory(prefix="prep", dir=given.folder) as name:
        root = Path(name)
        if given.samples:
            for rows in (given.samples // 10, given.samples):
                write_samples(root / f"{rows}", rows)
                run(f"{rows} samples of 2,000 patients", root / f"{rows}", 0, None, 0, "every")
            return
        if given.archive:
            archive(root, given.archive)
            return
        for title, (count, side, size) in CASES.items():
            count = max(1, count // 20) if given.quick else count
            here = root / f"{side}"
            write(here, count, side)
            cores = len(os.sched_getaffinity(0))
            run(f"{title}: {count}", here, size, None, 0, "every")
            for processes in {1, cores}:
                store = str(here / f"store-{processes}")
                for start in ("first", "next"):
                    run(f"{title}: {count}", here, size, store, processes, start)
        slope(root, given.quick)


def archive(root: Path, count: int) -> None:
    """An archive larger than the memory that the agent may have."""
    began = time.monotonic()
    write(root / "archive", count, 64)
    print(json.dumps({"written": count, "wall": round(time.monotonic() - began, 1)}), flush=True)
    cores = len(os.sched_getaffinity(0))
    for start in ("first", "next"):
        found = run("archive", root / "archive", 224, str(root / "store"), cores, start)
        assert found["whole_mib"] < 2048, "more than 2 GiB"


def slope(root: Path, quick: bool) -> None:
    """Memory by the number of images, at two sizes of image: what one more image costs."""
    few, many = (250, 1000) if quick else (2000, 8000)
    write(root / "slope", many, 64)
    for size in (64, 224):
        held = {}
        for count in (few, many):
            labels(root / "slope", count)
            store = str(root / f"slope-{size}")
            found = run(f"{count} images of {size} x {size}", root / "slope", size, store, 1, "first")
            again = run(f"{count} images of {size} x {size}", root / "slope", size, store, 1, "next")
            held[count] = (found["mib"], again["mib"])
        for place, start in enumerate(("first", "next")):
            each = (held[many][place] - held[few][place]) * 1024 / (many - few)
            print(json.dumps({"size": size, "start": start, "kib_an_image": round(each, 2)}), flush=True)


def write(folder: Path, count: int, side: int) -> None:
    """So many radiographs, no two alike."""
    images, draw = folder / "images", np.random.default_rng(side)
    images.mkdir(parents=True)
    for number in range(count):
        base = draw.random((side // 4 + 1, side // 4 + 1))
        grey = np.kron(base, np.ones((4, 4)))[:side, :side]
        place = images / f"{number // 1000:04}"
        place.mkdir(exist_ok=True)
        name = f"i{number:06}"
        write_radiograph(place / f"{name}.dcm", grey, f"p{number // PATIENTS_OF:06}", name, Scanner(16))
    labels(folder, count)


def write_samples(folder: Path, rows: int) -> None:
    """A long table of samples, of 20 variables of which the study knows 5, a quarter of them of other patients."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir()
    draw, size = np.random.default_rng(rows), 10**6
    people = pa.array([f"p{number:06}" for number in range(2667)])
    names = pa.array([f"v{number}" for number in range(20)])
    columns = {"patient": pa.string(), "time": pa.float64(), "variable": pa.string(), "value": pa.float64()}
    with pq.ParquetWriter(folder / "samples.parquet", pa.schema(columns)) as file:
        for start in range(0, rows, size):
            count = min(size, rows - start)
            batch = {
                "patient": people.take(pa.array(draw.integers(0, len(people), count))),
                "time": draw.uniform(0, 2880, count),
                "variable": names.take(pa.array(draw.integers(0, len(names), count))),
                "value": draw.normal(size=count),
            }
            file.write_table(pa.table(batch))
    labels(folder, 2000 * PATIENTS_OF)


def labels(folder: Path, count: int) -> None:
    """The label table of the first so many images; others are set aside."""
    lines = ["patient,finding"]
    for number in range(-(-count // PATIENTS_OF)):
        lines.append(f"p{number:06},{('normal', 'pneumonia')[number % 2]}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


def run(title: str, folder: Path, size: int, store: str | None, processes: int, start: str) -> dict[str, Any]:
    """One process's figures, printed as they come."""
    about = json.dumps({"folder": str(folder), "size": size, "store": store, "processes": processes})
    done = subprocess.run([sys.executable, __file__, "--measure", about], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found = {"case": title, "store": store is not None, "processes": processes, "start": start}
    found |= json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found), flush=True)
    return found


def measure(folder: str, size: int, store: str | None, processes: int) -> None:
    """Load the asset, and train a private round of four steps on it."""
    import torch

    from consilium_client import data
    from consilium_client.data import made, recipes  # noqa: F401
    from consilium_client.data.asset import DicomAsset
    from consilium_client.data.dicom import load_dicom  # noqa: F401
    from consilium_client.prepared import records  # noqa: F401
    from consilium_client.prepared.key import StoreKey
    from consilium_client.prepared.store import AssetFolder
    from consilium_client.training.trainer import train
    from consilium_shared.models import build
    from consilium_shared.models.vector import pack, to_vector
    from consilium_shared.privacy.plan import plan_of

    if not size:
        measure_samples(Path(folder))
        return
    contract = studies.study(
        "small-cnn",
        {
            "asset": "xray",
            "label": {"column": "finding", "classes": ["normal", "pneumonia"]},
            "image": {"size": size},
        },
        name="bench",
        training={"steps_per_round": 4, "expected_batch": 16, "optimizer": {"lr": 0.1}},
        privacy={"mode": "dp", "epsilon": 8.0, "delta": 1e-7, "clipping_norm": 1.0},
    )
    asset = DicomAsset(kind="dicom", path=Path(folder) / "images", table=Path(folder) / "labels.csv")
    folder_of = None if store is None else AssetFolder(Path(store), StoreKey(bytes(32)), processes)
    before = status("VmRSS")
    began, cpu = time.monotonic(), time.process_time()
    found = data.load(asset, contract, None, folder_of)
    loaded, own = time.monotonic() - began, time.process_time() - cpu
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = status("VmHWM")
    taken = time.monotonic()
    draw = np.random.default_rng(0)
    batches = 20
    for _ in range(batches):
        found.take(draw.integers(0, len(found), min(64, len(found))))
    taken = (time.monotonic() - taken) / batches
    private = None
    if found.patient_count > 1000:
        plan = plan_of(contract, found.patient_count)
        weights = pack(to_vector(build(contract)), contract)
        private = time.monotonic()
        train(weights, contract, found, plan, round=1, site="bench", device=torch.device("cpu"), seed=bytes(32))
        private = time.monotonic() - private
    result = {
        "records": len(found),
        "wall": round(loaded, 2),
        "cpu": round(own, 2),
        "cpu_children": round(children.ru_utime + children.ru_stime, 2),
        "mib": round(peak - before, 1),
        "child_mib": round(children.ru_maxrss / 1024, 1),
        "batch_of_64_ms": round(1000 * taken, 2),
        "train_s": private and round(private, 2),
        "whole_mib": round(status("VmHWM"), 1),
    }
    print(json.dumps(result))


def measure_samples(folder: Path) -> None:
    """Load a table of samples."""
    from consilium_client import data
    from consilium_client.data import timeseries  # noqa: F401
    from consilium_client.data.asset import TimeseriesAsset

    series = {"variables": [{"name": f"v{number}"} for number in range(5)], "bins": 48, "step_minutes": 60}
    label = {"column": "finding", "classes": ["normal", "pneumonia"]}
    contract = studies.study("gru", {"asset": "icu", "label": label, "series": series}, name="bench")
    asset = TimeseriesAsset(kind="timeseries", series=folder / "samples.parquet", table=folder / "labels.csv")
    before, began, cpu = status("VmRSS"), time.monotonic(), time.process_time()
    found = data.load(asset, contract)
    result = {
        "records": len(found),
        "wall": round(time.monotonic() - began, 2),
        "cpu": round(time.process_time() - cpu, 2),
        "mib": round(status("VmHWM") - before, 1),
        "prepared_mib": round(len(found) * 48 * 15 * 4 / 2**20, 1),
    }
    print(json.dumps(result))


def status(field: str) -> float:
    """A figure of this process's memory, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


if __name__ == "__main__":
    main()
