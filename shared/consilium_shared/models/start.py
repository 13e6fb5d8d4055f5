"""Start from weights in a person's safetensors file, in place of those that follow from the seed."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors

from consilium_shared.errors import ConfigurationError, IntegrityError, PeerError
from consilium_shared.models import build
from consilium_shared.models.adaptation import HEAD, added, plain_name
from consilium_shared.models.vector import Vector, fingerprint, to_vector, unpack
from consilium_shared.study import Study

_SHOWN = 5
"""Names of parameters in one message."""


class Start(NamedTuple):
    """A model before round 1.

    Attributes:
        vector: float32 ``[d]``, the whole of it.
        taken: names of the parameters that the file gave.
        seeded: names of those that begin as the study's seed has them.
    """

    vector: Vector
    taken: tuple[str, ...]
    seeded: tuple[str, ...]

    def lines(self) -> list[str]:
        """Lines on what a person should know of it."""
        found = [f"{len(self.taken)} parameters start from the file"]
        if self.seeded:
            found.append(f"from the study's seed, because the file lacks them: {_listed(self.seeded)}")
        return found


def read(file: Path, study: Study, *, new_head: bool = False) -> Start:
    """The model that a file's weights give.

    Its names are those of the study's model, or of the same model without additions of low rank. Names that it lacks
    start from the seed. What else is in the file, as metadata, is not looked at. Decoding runs no code.

    Args:
        file: safetensors.
        study: the study.
        new_head: leave the file's last linear layer out, because it tells other classes apart.

    Raises:
        ConfigurationError: the file cannot be read, is of another model, or has a number that is not finite.
    """
    try:
        found = dict(safetensors.deserialize(file.read_bytes()))  # type: ignore[no-untyped-call]
    except OSError as error:
        raise ConfigurationError(f"cannot read {file}: {error.strerror}") from error
    except safetensors.SafetensorError as error:
        raise ConfigurationError(f"{file} is not in safetensors format: {error}") from error
    if new_head:
        found = {name: entry for name, entry in found.items() if not name.startswith(f"{HEAD}.")}
    model, taken, parts = build(study), [], []
    for name, parameter in model.named_parameters():
        key = name if name in found else plain_name(name)
        entry = found.pop(key, None)
        part = parameter.detach().numpy().ravel()
        if entry is not None:
            if entry["dtype"] != "F32" or tuple(entry["shape"]) != tuple(parameter.shape):
                there, here = f"{entry['dtype']} {list(entry['shape'])}", f"F32 {list(parameter.shape)}"
                hint = "; --new-head leaves the file's last layer out" if name.startswith(f"{HEAD}.") else ""
                raise ConfigurationError(f"{file}: {key} is {there} there and {here} in the study's model{hint}")
            part = np.frombuffer(entry["data"], dtype="<f4")
            if not np.isfinite(part).all():
                raise ConfigurationError(f"{file}: {key} has a number that is not finite")
            taken.append(name)
        parts.append(part)
    if found or not taken:
        own = _listed([name for name, _ in model.named_parameters()])
        why = f"the study's model has no {_listed(sorted(found))}" if found else "nothing of it is in the study's model"
        raise ConfigurationError(f"{file}: {why} (it has {own})")
    seeded = [n for n, _ in model.named_parameters() if n not in taken and not added(n)]
    return Start(np.concatenate(parts).astype(np.float32, copy=False), tuple(taken), tuple(seeded))


def check(vector: Vector, study: Study, file: Path) -> None:
    """Raises ConfigurationError unless the contract names these weights, read from ``file``, as its start."""
    given, named = fingerprint(vector, study), study.model.start
    if named is None:
        raise ConfigurationError(
            f"study {study.study} does not say that it starts from these weights; write under its model: "
            f"start: {{sha256: {given}}}"
        )
    if given != named.sha256:
        raise ConfigurationError(
            f"{file} gives weights {given}, and study {study.study} starts from {named.sha256} (model.start)"
        )


def of(study: Study, packed: bytes | None) -> Vector:
    """The whole model ``[d]`` before round 1.

    Args:
        study: the study.
        packed: what was kept of the weights that its contract names (``vector.pack``), None where it names none.

    Raises:
        IntegrityError: they are not those.
    """
    model, named = build(study), study.model.start
    if packed is None and named is None:
        return to_vector(model)
    try:
        vector = unpack(packed or b"", model, study)
    except PeerError as error:
        raise IntegrityError(f"the weights that study {study.study} starts from: {error}") from error
    if named is None or fingerprint(vector, study) != named.sha256:
        raise IntegrityError(f"the weights that study {study.study} starts from are not those that its contract names")
    return vector


def _listed(names: list[str] | tuple[str, ...]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
