"""Checkpoint of a study after each round: the model, the server optimizer's state, who took part.

The arrays are written first, then the small JSON file that names them by digest: a crash leaves the old checkpoint or
the new one, never a mixture.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from consilium_shared.canonical import canonical_bytes, parse_canonical
from consilium_shared.errors import IntegrityError, PeerError
from consilium_shared.files import write_atomically, write_pieces_atomically
from consilium_shared.models import tensors

MODEL = "model"
OPTIMIZER = "optimizer."
AVERAGE = "average"
KEPT = "kept"


@dataclass(frozen=True)
class Checkpoint:
    """The study after ``round`` finished rounds (0: before the first)."""

    study: str
    """Digest of the study's contract."""
    round: int
    model: npt.NDArray[np.float32]
    """Global weights, [d]."""
    optimizer: dict[str, npt.NDArray[Any]]
    """State of the server optimizer."""
    record: dict[str, Any]
    """The round's record as far as it is known: participants, problems, metrics (``study/rounds.py``)."""
    average: npt.NDArray[np.float64] | None = None
    """Average of the models so far, [d] (``averaging.py``); None before round 1, or where the study has none."""
    kept: npt.NDArray[np.float32] | None = None
    """Best model so far, [d], that ``record`` names (``keeping.py``); None before one was evaluated."""


class CheckpointFile:
    """The checkpoint of one study's folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = folder / "checkpoint.json"

    def write(self, checkpoint: Checkpoint) -> None:
        """Replace the checkpoint durably; earlier arrays are deleted afterwards."""
        arrays: dict[str, npt.NDArray[Any]] = {MODEL: checkpoint.model}
        arrays.update({OPTIMIZER + name: value for name, value in checkpoint.optimizer.items()})
        if checkpoint.average is not None:
            arrays[AVERAGE] = checkpoint.average
        if checkpoint.kept is not None:
            arrays[KEPT] = checkpoint.kept
        sha256 = tensors.digest(arrays)
        file = f"checkpoint-{checkpoint.round:05d}-{sha256[:16]}.safetensors"
        if not (self.folder / file).exists():
            write_pieces_atomically(self.folder / file, tensors.encode(arrays))
        index = {
            "study": checkpoint.study,
            "round": checkpoint.round,
            "file": file,
            "sha256": sha256,
            "record": checkpoint.record,
        }
        write_atomically(self.index, canonical_bytes(index))
        for old in self.folder.glob("checkpoint-*.safetensors"):
            if old.name != file:
                old.unlink(missing_ok=True)

    def read(self, study: str) -> Checkpoint | None:
        """The checkpoint, or None when the study never finished a round.

        Raises:
            IntegrityError: the files are damaged, were edited, or belong to another study.
        """
        try:
            index = parse_canonical(self.index.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, PeerError) as error:
            raise IntegrityError(f"{self.index}: {error}; restore the folder from a backup") from error
        if index["study"] != study:
            raise IntegrityError(f"{self.index} belongs to another study ({index['study'][:12]})")
        path = self.folder / index["file"]
        try:
            arrays, sha256 = tensors.read(path)
        except (OSError, IntegrityError) as error:
            raise IntegrityError(f"{path}: {error}; restore the folder from a backup") from error
        if sha256 != index["sha256"]:
            raise IntegrityError(f"{path} is not what was written; restore the folder from a backup")
        model, average, kept = arrays.pop(MODEL), arrays.pop(AVERAGE, None), arrays.pop(KEPT, None)
        optimizer = {name.removeprefix(OPTIMIZER): value for name, value in arrays.items()}
        return Checkpoint(study, index["round"], model, optimizer, index["record"], average, kept)
