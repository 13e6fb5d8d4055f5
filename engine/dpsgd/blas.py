"""MKL's strict reproducible mode, asked for in the environment. No torch here: it must come first.

MKL, the matrix library in torch for x86 processors, chooses how it adds up a product by the address and the size of its
matrices. So a row's last bits depend on which rows lie beside it, and on some processors they do (seen on AMD EPYC with
AVX-512, torch 2.13.0, MKL 2024.2); a crafted model turns last bits into whole gradients (``dpsgd/isolation.py``). In
its mode ``STRICT`` a row's product is the same whatever lies beside it (Intel, oneMKL developer guide, "Conditional
Numerical Reproducibility"). It costs nothing that was measurable: a private step of ResNet-18 600 ms without, 606 with.

Other libraries (OpenBLAS, Arm's, CUDA's) have no such switch and are not told. What stands in for it there, and checks
it here, is the test that each site makes of its own machine before a private round (``training/neighbours.py``).
"""

from __future__ import annotations

import os

MODE = "AUTO,STRICT"
"""The fastest path of the processor that is there, in strict mode."""


def set_blas_environment() -> None:
    """Ask MKL for strict mode. It reads the variable at its first product in a process, so call before torch computes.

    A mode that was set by hand stays if it is as good: any with ``STRICT``, or ``COMPATIBLE`` (one path for all, which
    takes half as long again).
    """
    mode = os.environ.get("MKL_CBWR", "").upper()
    if not (mode.endswith(",STRICT") or mode == "COMPATIBLE"):
        os.environ["MKL_CBWR"] = MODE
