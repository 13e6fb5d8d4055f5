"""The device on which this machine computes, for its doctor: a GPU's driver held against torch."""

from __future__ import annotations

from pathlib import Path

import torch

from consilium_shared.errors import ConfigurationError
from consilium_shared.findings import Finding
from dpsgd import device


def look(wanted: str, driver: Path) -> Finding:
    """The device on which studies are computed, held against a GPU's driver that torch may not get on with."""
    built = f"torch {torch.__version__}"
    try:
        chosen = device.choose(wanted)
    except ConfigurationError as error:
        return Finding("device", "error", f"{error}{_driver(driver, built)}")
    if chosen.type == "cuda":
        free, total = torch.cuda.mem_get_info(chosen)
        said = f"{chosen}, {torch.cuda.get_device_name(chosen)}, {free / 1024**3:.1f} of {total / 1024**3:.1f} GiB free"
        if free < total / 2:
            return Finding("device", "warning", f"{said}: another program holds the rest; nvidia-smi shows which")
        return Finding("device", "ok", f"{said}, {built}")
    if wanted == "auto" and driver.exists():
        return Finding("device", "warning", f"{chosen}, although a GPU may be there{_driver(driver, built)}")
    return Finding("device", "ok", f"{chosen}, {built}")


def _driver(file: Path, built: str) -> str:
    """The reason for which torch sees no GPU, where the kernel has NVIDIA's driver."""
    try:
        version = file.read_text().splitlines()[0].split("Module")[-1].split()[0]
    except (OSError, IndexError):
        return "; no NVIDIA driver runs on this machine"
    if torch.version.cuda is None:
        return f": driver {version} is there, and {built} is its build for CPUs; install the one for CUDA"
    return (
        f": driver {version} is there, and {built} is built for CUDA {torch.version.cuda}, of which that driver is too "
        "old, or this account may not open /dev/nvidia*: a newer driver, or the groups video and render"
    )
