"""Shares of a sum's noise: how much each site adds where m honest sites' noise together is the whole.

Each site adds noise of σ·C/√m, as whole numbers. Where a sum over at least m honest sites is all that anybody sees, its
noise has the variance σ²·C² or more: the Gaussian mechanism of σ, to a distance that ``rounding_gap`` bounds. A site's
own share alone is the Gaussian mechanism of σ/√m: what is left where others add nothing or the sum's encryption fails.

Here are the numbers, and the words for whoever decides on such a study. The contract's part is in ``private_sums.py``,
what a site checks of each cohort in ``Terms.check_shares``.
"""

from __future__ import annotations

import math

LEAST_DEVIATION = 8.0
"""Smallest deviation of a share, in steps of the grid; there the gap is below 10^-130 for a hundred sites."""

_ABOVE = 1 + 2.0**-40
"""Rounding of float64 makes no share smaller than it should be."""


def share(noise_multiplier: float, honest_sites: int) -> float:
    """Noise multiplier of each site's own noise: σ/√m, and never less.

    >>> share(4.0, 1), round(share(4.0, 4), 9), 4 * share(4.0, 4) ** 2 >= 4.0**2
    (4.0, 2.0, True)
    """
    return noise_multiplier if honest_sites == 1 else noise_multiplier / math.sqrt(honest_sites) * _ABOVE


def rounding_gap(deviation: float, sites: int) -> float:
    """Bound on the total variation between a sum of so many rounded Gaussians and a rounding of their Gaussian sum.

    With N_u = round(X_u), X_u ~ N(0, s²), the sum of m of them has the law of round(G + U_2 + … + U_m), G ~ N(0, m·s²)
    and each U uniform on (-½, ½), but for (R + ½)(m + 1)η(1 + η)^(m - 1) + 4·exp(-π²s²/2), where
    η = 2.1·exp(-π²s²/2) and R = π·s²·√m + m. By Poisson summation the transform of N is Σ_j f̂(θ + 2πj), f̂ that of the
    Gaussian convolved with the uniform; what is not j = 0 is at most η, so the m-th powers differ by at most
    mη(1 + η)^(m - 1) + η at every frequency, hence so does each probability; 2R + 1 of them lie within R, and outside
    R each law has at most 2·exp(-π²s²/2). Noise of the second law is post-processing of the Gaussian mechanism, since
    K + round(y) = round(K + y) for whole K. So the gap, times the numbers of a study and 1 + e^ε, is all that a sum
    of rounded shares adds to δ.

    Args:
        deviation: s, of each share before rounding, in steps of the grid.
        sites: m, at least 1.

    >>> rounding_gap(1.5, 2) < 1.3e-3, rounding_gap(8.0, 100) < 1e-130, rounding_gap(0.1, 1)
    (True, True, 0.0)
    """
    if sites == 1:
        return 0.0
    small = math.exp(-((math.pi * deviation) ** 2) / 2)
    eta, reach = 2.1 * small, math.pi * deviation**2 * math.sqrt(sites) + sites
    return min(1.0, (reach + 0.5) * (sites + 1) * eta * (1 + eta) ** (sites - 1) + 4 * small)


def _up(epsilon: float) -> str:
    return f"{math.ceil(epsilon * 100 - 1e-9) / 100:g}"


def words(*, sites: int, least: int, colluding: int, epsilon: float, alone: float | None) -> tuple[str, ...]:
    """Sentences for an ethics committee on a study with shared noise; ``alone`` None: no number bounds it.

    Args:
        sites: number of hospitals in the study's roster.
        least: fewest hospitals in a sum.
        colluding: number of hospitals that may work against the others.
        epsilon: ε of the study at a hospital, by what is opened.
        alone: ε of the study by a hospital's own share of the noise.
    """
    others = f"{colluding} hospital{'' if colluding == 1 else 's'}"
    rest = "nothing" if alone is None else f"this hospital's own part, which limits it to ε = {_up(alone)},"
    return (
        f"Each hospital adds a part of the protecting noise; only totals of at least {least} of the {sites} hospitals "
        "are ever readable.",
        f"Whoever sees them, the coordinating centre, up to {others} that work with it, every user of the model, "
        f"learns at most what ε = {_up(epsilon)} allows about any one patient.",
        f"This rests on two assumptions: not more than {others} of the {sites} work against the others, and the "
        "encryption holds.",
        f"If either failed completely, {rest} would be what is left.",
        "The alternative, the whole noise at every hospital, needs neither assumption and costs accuracy.",
    )
