"""Suspicion that a variable stands in another unit than the study's constants are for."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from consilium_client.data.profile import Spread
from consilium_shared.inputs import Numeric


@dataclass(frozen=True)
class Conversion:
    """Numbers by which values in one unit are values in another: ``factor * value + offset``.

    Attributes:
        unit: unit of the values.
        other: unit of the result.
        factor: as above.
        offset: as above.
    """

    unit: str
    other: str
    factor: float
    offset: float = 0.0

    def __call__(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values in the other unit."""
        return self.factor * values + self.offset

    @property
    def back(self) -> Conversion:
        """Conversion of the other unit into this one."""
        return Conversion(self.other, self.unit, 1 / self.factor, -self.offset / self.factor)


_PRESSURE = r"pa?c?o2|p[ao]?co2|press|sys|dias|bp|\bmap\b|trestbps"
# Molar masses of the substances (g/mol) in the units that laboratories report: PubChem.
_NAMED: tuple[tuple[str, Conversion], ...] = (
    (r"glu|\bbg\b|sugar", Conversion("mmol/L", "mg/dL", 18.0156)),
    (r"chol|hdl|ldl", Conversion("mmol/L", "mg/dL", 38.665)),
    (r"trigl|\btg\b", Conversion("mmol/L", "mg/dL", 88.545)),
    (r"crea", Conversion("mg/dL", "umol/L", 88.402)),
    (r"urea|bun", Conversion("mmol/L", "mg/dL", 2.8014)),
    (r"urea", Conversion("mmol/L", "mg/dL", 6.0055)),
    (r"bili", Conversion("mg/dL", "umol/L", 17.104)),
    (r"h(a?e)?mo?glob|\bhg?b\b", Conversion("mmol/L", "g/dL", 1.6114)),
    (r"calcium|\bca\b", Conversion("mmol/L", "mg/dL", 4.0078)),
    (r"magnes|\bmg\b", Conversion("mmol/L", "mg/dL", 2.4305)),
    (r"phosph", Conversion("mmol/L", "mg/dL", 3.0974)),
    (r"lact", Conversion("mmol/L", "mg/dL", 9.0078)),
    (r"uric|urate", Conversion("umol/L", "mg/dL", 0.016811)),
    (r"temp", Conversion("degrees Celsius", "degrees Fahrenheit", 1.8, 32.0)),
    (_PRESSURE, Conversion("kPa", "mmHg", 7.50062)),
    (r"weight|\bwt\b|mass", Conversion("kg", "pounds", 2.204623)),
    (r"weight|\bwt\b|mass", Conversion("kg", "g", 1000.0)),
    (r"height|length|stature", Conversion("inches", "cm", 2.54)),
    (r"height|length|stature", Conversion("m", "cm", 100.0)),
    (r"\bage\b", Conversion("years", "months", 12.0)),
    (r"\bage\b", Conversion("years", "days", 365.25)),
)
_POWERS = tuple(Conversion("another unit", f"one {n} times as large", 1.0 / n) for n in (10, 100, 1000))

ODD, GOOD = 3.0, 1.5
"""Score of values that do not look as the study's constants have it, and of such that do. Without any noise a normal
spread about the center scores 0, one whose median lies three times ``scale`` away scores 3."""
_VERY_ODD = 5.0
_MOST = 0.8
"""Share of the values outside the study's range that a second unit explains."""
_NORMAL = 3.29
"""Times the deviation: from the 5 % quantile of a normal spread to the 95 % quantile."""


def suspected(feature: Numeric, spread: Spread) -> Conversion | None:
    """Conversion after which the values fit the study's constants; None where they fit as they are, or with none."""
    constants = _constants(feature)
    if constants is None or spread.distinct < 2:
        return None
    odd = score(spread.sample, *constants)
    if odd <= ODD:
        return None
    found = [(score(convert(spread.sample), *constants), convert) for convert in _candidates(feature.name)]
    if odd > _VERY_ODD:
        powers = [way for power in _POWERS for way in (power, power.back)]
        # A power of ten has to fit clearly better than a unit that is known of the variable.
        found += [(score(convert(spread.sample), *constants) + 0.5, convert) for convert in powers]
    best = min(found, key=lambda each: each[0], default=None)
    return best[1] if best is not None and best[0] < GOOD else None


def mixed(feature: Numeric, spread: Spread) -> tuple[Conversion, float] | None:
    """Conversion after which most values outside the study's range lie within it, and their share of all values."""
    if feature.low is None or feature.high is None or not spread.below + spread.above:
        return None
    low, high = feature.low, feature.high
    beyond = (spread.sample < low) | (spread.sample > high)
    outside, inside = spread.sample[beyond], spread.sample[~beyond]
    if len(outside) < 3 or len(inside) < 3:
        return None
    middle, width = np.median(inside), max(float(np.subtract(*np.quantile(inside, [0.95, 0.05]))), 1e-9)
    for convert in _candidates(feature.name):
        made = convert(outside)
        share = float(np.mean((made >= low) & (made <= high)))
        if share >= _MOST and abs(float(np.median(made)) - middle) < width:
            return convert, share * (spread.below + spread.above) / spread.values
    return None


def score(values: NDArray[np.float64], center: float, scale: float) -> float:
    """Distance of a sorted sample from a normal spread about ``center``: of its median, and of its width (log2)."""
    q05, median, q95 = np.quantile(values, [0.05, 0.5, 0.95])
    width = (q95 - q05) / (_NORMAL * scale)
    return float(abs(median - center) / scale + abs(math.log2(max(width, 1e-3))))


def _constants(feature: Numeric) -> tuple[float, float] | None:
    return None if (feature.center, feature.scale) == (0.0, 1.0) else (feature.center, feature.scale)


def _candidates(name: str) -> list[Conversion]:
    words = re.sub(r"[^a-z0-9]+", " ", name.lower())
    named = [convert for pattern, convert in _NAMED if re.search(pattern, words)]
    return [way for convert in named for way in (convert, convert.back)]
