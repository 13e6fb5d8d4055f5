"""However many sites a sum has, the coordinator holds one vector of it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PARAMETERS = 40_000_000
PROGRAM = f"""
import json, sys, threading
from pathlib import Path
import numpy as np
from tests.support.sums import Federation
from tests.support.site import CONTRACT
from consilium_shared.transport.upload import Upload
from consilium_shared.secagg import prg
from consilium_shared.secagg.terms import Segment
from consilium_shared.study import Study
from consilium_shared.protocol.summand import read

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], memory())

update, weight = Segment(name="update", bits=32, length={PARAMETERS}), Segment(name="weight", bits=64, length=1)
federation = Federation(5)
attempt = federation.sum(segments=(update, weight), vectors={{}})
ends = {{}}
for site in attempt.cohort:
    attempt.states[site], contribution = federation.parts[site].mask(attempt.states[site], attempt.terms)
    one = np.ones(1, np.uint64)
    prg.apply(one, *contribution.mask_keys(weight))
    ends[site] = one.tobytes() + contribution.trailer
study, before, peak, done = Study.model_validate(CONTRACT), memory(), [0], threading.Event()
threading.Thread(target=watch, daemon=True).start()
for site, end in ends.items():
    with Upload(Path(sys.argv[1])) as upload:
        for _ in range({4 * PARAMETERS} // 1_000_000):
            upload.write(bytes(1_000_000))
        upload.write(end)
        attempt.total.fold(site, upload)
attempt.total.close(2)
attempt.sign()
attempt.release()
opened = read(study, "training", 5, 5, attempt.total.open())
done.set()
print(json.dumps([opened.weight, opened.mean.size, peak[0] - before]))
"""
"""Vectors of zeros in place of masked ones: the sum is then no honest one, but it is opened and read all the same."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_sum_needs_one_model_at_the_coordinator_whatever_the_number_of_sites(tmp_path: object) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True)
    weight, size, most = json.loads(done.stdout)
    assert (weight, size) == (5, PARAMETERS)
    assert 0.9 < most / (4 * PARAMETERS) < 1.1
