"""The program that prepares records, with a decoder that one file ends, patient p7's; or with a remark on dark ones."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from consilium_client.data import preparing, recipes
from consilium_client.prepared.recipe import Source


@dataclass(frozen=True)
class Fragile(recipes.ImageRecipe):
    """As ``ImageRecipe``, but for that file."""

    def make(self, source: Source) -> Any:
        if source.paths[0].name == "p7.dcm":
            os.abort()
        return super().make(source)


def dark(self: recipes.ImageRecipe, arrays: tuple[np.ndarray, ...]) -> str:
    """In the place of ``ImageRecipe.remark``."""
    return "dark" if arrays[0].mean() < 0.4 else ""


if __name__ == "__main__":
    if os.environ.get("DARK"):
        recipes.ImageRecipe.remark = dark  # type: ignore[method-assign, assignment]
    else:
        recipes.RECIPES["image"] = Fragile
    preparing.main()
