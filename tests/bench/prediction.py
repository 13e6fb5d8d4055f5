"""What the prediction service takes beside plain onnxruntime, in ratios of one run: python tests/bench/prediction.py

Each model is asked in four ways: the graph alone, prepared inputs in memory; the service's own work (prepare, predict,
sign, write, fsync) without the network; one record a request over HTTP on loopback; and a batch of 32 over HTTP. The
HTTP client is one Python thread on the same machine, so its own time is in what is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.support import published  # noqa: E402

from consilium_serve.home import Home  # noqa: E402
from consilium_serve.model import Model  # noqa: E402
from consilium_serve.record import Record  # noqa: E402
from consilium_serve.service import Case, Service  # noqa: E402
from consilium_serve.versions import add  # noqa: E402
from consilium_shared.preparation.declared import invented  # noqa: E402
from consilium_shared.preparation.record import prepare  # noqa: E402
from consilium_shared.protocol.bundle import open_bundle, zipped  # noqa: E402

HOURS = {**published.SERIES["series"], "bins": 48}
SHAPES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("logistic", published.TABLE, {}),
    ("gru", {"series": HOURS}, {"hidden": 64}),
    ("small-cnn", {"image": {"size": 28}}, {"hidden": 64}),
    ("small-cnn", {"image": {"size": 224}}, {"hidden": 64}),
    ("resnet18-gn", {"image": {"size": 64}}, {}),
]
BATCH = 32


def timed(work: Callable[[], object], seconds: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Milliseconds of each call, for so many seconds after a warm-up; at least five calls."""
    work()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken) < 5:
        start = time.perf_counter()
        work()
        taken.append(1000 * (time.perf_counter() - start))
    return np.asarray(taken)


@contextlib.contextmanager
def serving(home: Home) -> Iterator[httpx.Client]:
    """The service as a process, and a client of it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file, token = home.root / "predict.yaml", home.new_token("bench")
    text = file.read_text().replace("requests_per_minute: 600", "requests_per_minute: 1000000")
    file.write_text(re.sub(r"  port: 8470\n", f"  port: {port}\n", text))
    command = [sys.executable, "-m", "consilium_serve.cli", "serve", "--home", str(home.root)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ))
    headers = {"authorization": f"Bearer {token}", "content-type": "application/json"}
    with httpx.Client(trust_env=False, base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=120) as client:
        for _ in range(300):
            with contextlib.suppress(httpx.TransportError):
                if client.get("/health/ready").status_code == 200:
                    break
            time.sleep(0.1)
        yield client
    process.terminate()
    process.wait()


def measure(name: str, data: dict[str, Any], options: dict[str, Any], seconds: float, folder: Path) -> str:
    """One row of the table."""
    given = published.study(name, data, **options)
    coordinator = published.coordinator(folder / "coordinator")
    path = folder / "bundle.zip"
    path.write_bytes(zipped(published.files(coordinator, given)))
    fingerprint = coordinator.coordinator().public.fingerprint
    model, (raw, prepared) = Model(open_bundle(path, fingerprint)), invented(given)
    one = {key: values[None] for key, values in prepared.inputs.items()}
    many = {key: np.repeat(values, BATCH, axis=0) for key, values in one.items()}
    plain, plain_many = timed(lambda: model.run(one), seconds), timed(lambda: model.run(many), seconds)
    home = Home(folder / "home")
    home.begin(fingerprint)
    add(home, path)
    service = Service(home, Record(home.records, home.identity(), 365))
    inside = timed(lambda: service.predict(model, [Case(prepare(given, raw), "1")], "bench"), seconds)
    inside_many = timed(
        lambda: service.predict(model, [Case(prepare(given, raw), "1") for _ in range(BATCH)], "bench"), seconds
    )
    service.close()
    body = json.dumps({"record": raw, "patient": "1"}).encode()
    bodies = json.dumps({"records": [{"record": raw, "patient": "1"}] * BATCH}).encode()
    with serving(home) as client:

        def ask(path: str, content: bytes) -> None:
            client.post(f"/v1/models/{given.study}/{path}", content=content).raise_for_status()

        single = timed(lambda: ask("predict", body), seconds)
        whole = len(bodies) < 2**25
        batch = timed(lambda: ask("batch", bodies), seconds) if whole else None
    taken = {
        "plain": plain,
        "many": plain_many,
        "inside": inside,
        "inside_many": inside_many,
        "single": single,
    }
    median = {key: float(np.median(value)) for key, value in taken.items()}
    half, most, nearly_all = np.percentile(single, [50, 95, 99])
    shown = "–" if batch is None else f"{1000 * BATCH / float(np.median(batch)):.0f}"
    ratio = "–" if batch is None else f"{float(np.median(batch)) / median['many']:.2f}"
    size = next(iter(data.values()))
    what = name + (f" {size['size']} px" if "image" in data else "")
    return (
        f"| {what} | {median['plain']:.3f} | {median['inside']:.2f} | {half:.2f} / {most:.2f} / {nearly_all:.2f} | "
        f"{median['single'] / median['plain']:.2f} | "
        f"{1000 * BATCH / median['many']:.0f} | {median['inside_many'] / median['many']:.2f} | {shown} | {ratio} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    seconds = parser.parse_args().seconds
    out = io.StringIO()
    print(
        "| model | plain, ms | service, ms | HTTP p50 / p95 / p99, ms | HTTP to plain | plain, records/s | "
        "service to plain, batch | HTTP batch, records/s | HTTP batch to plain |\n|---|" + "---:|" * 8
    )
    for name, data, options in SHAPES:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out):
            row = measure(name, data, options, seconds, Path(folder))
        print(row, flush=True)


if __name__ == "__main__":
    main()
