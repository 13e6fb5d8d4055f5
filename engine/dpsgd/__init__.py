"""Per-sample gradients and DP-SGD for torch: stock models, one backward pass, guarantees that hold to the last bit.

Importing this package asks MKL for reproducible products, and does not import torch; the names below do when they are
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dpsgd.blas import set_blas_environment

if TYPE_CHECKING:
    from dpsgd.adaptive import AdaptiveClipping
    from dpsgd.frozen import freeze_batch_norm
    from dpsgd.layers.constant import AddedConstant, ClassToken
    from dpsgd.training import PrivateTraining

set_blas_environment()

_PLACES = {
    "AdaptiveClipping": "adaptive",
    "AddedConstant": "layers.constant",
    "ClassToken": "layers.constant",
    "PrivateTraining": "training",
    "freeze_batch_norm": "frozen",
}
__all__ = ["AdaptiveClipping", "AddedConstant", "ClassToken", "PrivateTraining", "freeze_batch_norm"]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
