"""Recipes by which readers have sources prepared: each is made again from JSON in the process that prepares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from consilium_client.prepared.recipe import Field, Recipe, Source, code_digest
from consilium_shared import preparation

DECODERS = (
    "numpy",
    "pydicom",
    "pylibjpeg",
    "pylibjpeg-libjpeg",
    "pylibjpeg-openjpeg",
    "pylibjpeg-rle",
)
"""Libraries whose release decides on the bits of a decoded picture."""


@dataclass(frozen=True)
class ImageRecipe(Recipe):
    """One DICOM file as a grey image, float32 ``[1, size, size]``.

    Attributes:
        size: of the image, in pixels.
    """

    size: int
    kind: ClassVar[str] = "image"

    @property
    def parameters(self) -> dict[str, Any]:
        """The image's size."""
        return {"size": self.size}

    @property
    def fields(self) -> tuple[Field, ...]:
        """The image."""
        return (Field((1, self.size, self.size), "<f4"),)

    def code(self) -> str:
        """Digest of everything that decodes and prepares images."""
        return _decoding_code()

    def make(self, source: Source) -> tuple[NDArray[np.float32], ...]:
        """The image; raises Unusable."""
        from consilium_shared.preparation.radiograph import read_image

        (path,) = source.paths
        return (read_image(path, self.size)[None],)


RECIPES: dict[str, type[ImageRecipe]] = {ImageRecipe.kind: ImageRecipe}
"""Kind to class."""


def made_of(kind: str, parameters: dict[str, Any]) -> Recipe:
    """The recipe of a kind with these parameters; raises KeyError or TypeError where there is none."""
    return RECIPES[kind](**parameters)


@cache
def _decoding_code() -> str:
    return code_digest(sorted(Path(str(preparation.__file__)).parent.glob("*.py")), DECODERS)
