"""Layout of a folder of picture files: what the parts of their paths say."""

from __future__ import annotations

import re

from consilium_client.data.asset import PLACEHOLDERS, PicturesAsset
from consilium_client.data.folder import walk
from consilium_client.data.identity import canonical, unusable
from consilium_client.data.report import SetAside

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
"""Ends of picture files' names, in any case; other files are no pictures."""
VOLUMES = (".nii", ".nii.gz")
"""Ends of volume files' names, in any case."""


def layout_pattern(layout: str) -> re.Pattern[str]:
    """The regular expression of a layout.

    >>> layout_pattern("{label}/{patient}_*.png").fullmatch("ill/p1_02.png").groupdict()
    {'label': 'ill', 'patient': 'p1'}
    """
    parts = re.split(r"(\{[a-z]+\}|\*)", layout)
    made = {f"{{{name}}}": f"(?P<{name}>[^/]+?)" for name in PLACEHOLDERS}
    return re.compile("".join("[^/]*" if part == "*" else made.get(part, re.escape(part)) for part in parts))


def patients_of(asset: PicturesAsset) -> set[str]:
    """Patients that the paths below an asset's folder name, each in one spelling."""
    pattern, found = layout_pattern(asset.layout or ""), set()
    for path in walk(asset.path, SetAside()):
        hit = (
            pattern.fullmatch(path.relative_to(asset.path).as_posix())
            if path.name.lower().endswith((*ENDINGS, *VOLUMES))
            else None
        )
        name = "" if hit is None else canonical(hit["patient"])
        if unusable(name) is None:
            found.add(name)
    return found
