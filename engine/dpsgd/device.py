"""Device selection, and deterministic arithmetic in full precision."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.utils.deterministic

from consilium_shared.errors import ConfigurationError

Precision = Literal["float32", "bfloat16"]


def choose(name: str = "auto") -> torch.device:
    """The device for ``auto`` (a GPU when there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ConfigurationError: another name, or a GPU that this machine or this build of torch does not have.
    """
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::([0-9]{1,2}))?", name)
    if match is None:
        raise ConfigurationError(f"device {name!r}: write auto, cpu or cuda:0")
    index, present = int(match[1] or 0), torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= present:
        raise ConfigurationError(f"device {name!r}: torch {torch.__version__} sees {present} GPUs; write auto or cpu")
    return torch.device("cuda", index)


def onto(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy of a host's tensor on ``device``; on the CPU the tensor itself.

    Nothing is waited for: a GPU copies it, in the order of the caller's stream, from page-locked memory that is its own
    until then. ``tensor`` may be changed at once.
    """
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, what is queued inside is computed beside what the caller's stream is queued meanwhile: after all that
    was queued there before, and before all that is queued there after."""
    if device.type != "cuda":
        yield
        return
    callers, own = torch.cuda.current_stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    own.wait_stream(callers)
    with torch.cuda.stream(own):
        yield
    callers.wait_stream(own)


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Deterministic kernels and full float32 products while inside; the caller's settings come back after.

    Reduced-precision products (TF32) would let a gradient's true norm exceed the measured one by about 1e-3.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed workspace
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic  # whose settings torch does not type
    filled = memory.fill_uninitialized_memory
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # nothing here reads what it has not written
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = False, False, False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        memory.fill_uninitialized_memory = filled
        cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def in_precision(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], precision: Precision) -> torch.Tensor:
    """The model's logits; in bfloat16 where that loses little (``torch.autocast``), the logits in float32 again."""
    if precision == "float32":
        logits: torch.Tensor = model(*inputs)
        return logits
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        logits = model(*inputs)
    return logits.float()
