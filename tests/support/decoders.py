"""The program that prepares records, with a decoder that one file ends: patient p7's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from consilium_client.data import preparing, recipes
from consilium_client.prepared.recipe import Source


@dataclass(frozen=True)
class Fragile(recipes.ImageRecipe):
    """As ``ImageRecipe``, but for that file."""

    def make(self, source: Source) -> Any:
        if source.paths[0].name == "p7.dcm":
            os.abort()
        return super().make(source)


recipes.RECIPES["image"] = Fragile
if __name__ == "__main__":
    preparing.main()
