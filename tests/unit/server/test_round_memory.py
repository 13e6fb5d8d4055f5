"""A round's end at the coordinator, its step and its checkpoint, makes no second copy of the model or of any state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PARAMETERS = 20_000_000
PROGRAM = f"""
import json, sys, threading
from pathlib import Path
import numpy as np
from consilium_server.state.checkpoint import Checkpoint, CheckpointFile
from consilium_server.study.optimizer import ServerOptimizer
from consilium_shared import study

def memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def watch():
    while True:
        peak[0] = max(peak[0], memory())
        done.wait(0.002)

def grown(work):
    before = peak[0] = memory()
    found = work()
    return found, (peak[0] - before) / (4 * {PARAMETERS})

peak, done = [0], threading.Event()
threading.Thread(target=watch, daemon=True).start()
optimizer = ServerOptimizer.from_study(study.ServerOptimizer(name="fedadam", lr=0.1))
model, mean = np.zeros({PARAMETERS}, np.float32), np.full({PARAMETERS}, 0.5, np.float32)
model = optimizer.step(model, mean)
after, step = grown(lambda: optimizer.step(model, mean))
file = CheckpointFile(Path(sys.argv[1]))
point = Checkpoint("s" * 64, 2, after, optimizer.state(), {{}})
_, write = grown(lambda: file.write(point))
found, read = grown(lambda: file.read("s" * 64))
same = all(np.array_equal(found.optimizer[name], part) for name, part in optimizer.state().items())
print(json.dumps([step, write, read, same and np.array_equal(found.model, after)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_step_makes_the_next_model_and_a_checkpoint_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True)
    step, write, read, same = json.loads(done.stdout)
    assert same
    assert step < 1.8, "the next model, and pieces"
    assert write < 0.3, "pieces"
    assert read < 5.3, "the model, and two moments in float64"
