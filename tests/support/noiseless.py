"""Agent whose noise a test can hold up or leave out: real in all else, and started like any other.

``prefix`` goes before a site's ``up`` (``LocalFederation.prefixes``). Python then imports ``sitecustomize`` from the
site's own folder, which in the agent's process alone puts itself before ``dpsgd``'s noise. Two files beside it say what
it does: ``absent``, no noise is added; ``held``, whoever is about to add noise waits until the file is gone.
"""

from __future__ import annotations

import os
from pathlib import Path

_CODE = """
import sys

if "consilium_client.agent" in sys.orig_argv:
    import pathlib
    import time

    from dpsgd.noise import Noise

    here, add = pathlib.Path(__file__).parent, Noise.add_to

    def add_to(self, total, deviation):
        while (here / "held").exists():
            time.sleep(0.01)
        if not (here / "absent").exists():
            add(self, total, deviation)

    Noise.add_to = add_to
"""


def prefix(folder: Path) -> list[str]:
    """Words before the ``up`` of a site, whose noise then obeys the files in ``folder``, which is made."""
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(_CODE)
    return ["env", f"PYTHONPATH={os.pathsep.join((str(folder), os.environ['PYTHONPATH']))}"]
