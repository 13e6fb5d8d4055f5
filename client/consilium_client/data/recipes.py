"""Recipes by which readers have sources prepared: each is made again from JSON in the process that prepares."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from consilium_client.prepared.recipe import Field, Recipe, Source, code_digest
from consilium_shared import preparation
from consilium_shared.inputs import Image

FILE = "file"
"""Detail of a source that is a PNG, JPEG or TIFF file, or a NIfTI volume."""
DECODERS = (
    "numpy",
    "pillow",
    "pydicom",
    "pylibjpeg",
    "pylibjpeg-libjpeg",
    "pylibjpeg-openjpeg",
    "pylibjpeg-rle",
    "pyjpegls",
    "python-gdcm",
    "openjphpy",
    "imagecodecs",
    "pillow",
    "nibabel",
    "highdicom",
)
"""Libraries whose release decides on the bits of a decoded picture."""


@dataclass(frozen=True)
class ImageRecipe(Recipe):
    """A picture as float32 of the study's shape. A source's ``detail`` is the number of a frame, or ``FILE``.

    Attributes:
        size, channels, depth, intensity, window, gaps: as in ``consilium_shared.inputs.Image``.
    """

    size: int
    channels: Literal[1, 3] = 1
    depth: int | None = None
    intensity: Literal["file", "window", "percentiles"] = "file"
    window: tuple[float, float] | None = None
    gaps: Literal["refuse", "interpolate"] = "refuse"
    kind: ClassVar[str] = "image"

    @classmethod
    def of(cls, image: Image) -> ImageRecipe:
        """The recipe of a study's image."""
        return cls(image.size, image.channels, image.depth, image.intensity, image.window, image.gaps)

    @property
    def image(self) -> Image:
        """The image that it makes, whatever files are taken for it."""
        return Image(
            size=self.size,
            channels=self.channels,
            depth=self.depth,
            intensity=self.intensity,
            window=self.window,
            gaps=self.gaps,
        )

    @property
    def parameters(self) -> dict[str, Any]:
        """The attributes, as JSON carries them."""
        return {**asdict(self), "window": None if self.window is None else list(self.window)}

    @property
    def fields(self) -> tuple[Field, ...]:
        """The image."""
        return (Field(self.image.shape, "<f4"),)

    def code(self) -> str:
        """Digest of everything that decodes and prepares images."""
        return _decoding_code()

    def make(self, source: Source) -> tuple[NDArray[np.float32], ...]:
        """The image; raises Unusable."""
        if self.depth is not None and source.detail == FILE:
            from consilium_client.data.nifti_files import read_nifti

            (path,) = source.paths
            return (read_nifti(path, self.image),)
        if self.depth is not None:
            from consilium_shared.preparation.volume import read_volume

            return (read_volume(source.paths, self.image),)
        from consilium_shared.preparation.picture import read_picture

        (path,) = source.paths
        if source.detail == FILE:
            from consilium_client.data.image_files import read_image_file

            return (read_image_file(path, self.image),)
        return (read_picture(path, self.image, int(source.detail) if source.detail else None),)


_HERE = Path(__file__).parent
RECIPES: dict[str, type[ImageRecipe]] = {ImageRecipe.kind: ImageRecipe}
"""Kind to class."""


def made_of(kind: str, parameters: dict[str, Any]) -> Recipe:
    """The recipe of a kind with these parameters; raises KeyError or TypeError where there is none."""
    return RECIPES[kind](**parameters)


@cache
def _decoding_code() -> str:
    return code_digest(
        [
            *sorted(Path(str(preparation.__file__)).parent.glob("*.py")),
            _HERE / "image_files.py",
            _HERE / "nifti_files.py",
        ],
        DECODERS,
    )
