"""Noise of the opened sums, as their empty coordinates show it, held against the contract.

Only the coordinator saw the opened numbers, so what a record says of them is its word; what they should be is computed
from the contract and from who was in the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from consilium_audit.evidence import checking
from consilium_audit.records import Records
from consilium_shared.errors import ConfigurationError, PeerError
from consilium_shared.privacy.alone import cost_alone
from consilium_shared.privacy.budget import in_words
from consilium_shared.privacy.measured_noise import MeasuredNoise, deviations, doubt, empty_coordinates, expected_noise
from consilium_shared.study import Study

_DIGITS = 1e-4
"""Relative error of a number that a record has to six digits, and of another accountant's noise multiplier."""


def of_shares(study: Study, sites: int, unchecked: Sequence[str]) -> Iterator[str]:
    """Notes on a study whose sites share the noise: what its ε rests on, and what is left without."""
    alone, sums, liars = cost_alone(study), study.privacy.sums, study.aggregation.corrupt_sites
    if alone is None or sums is None:
        return
    yield (
        f"the noise is shared: ε holds for whoever sees the sums together with at most {liars} of the {sites} sites, "
        f"if every other site added its share of {sums.honest_sites} and the encryption holds. By its own share a "
        f"site is protected to ε {in_words(alone)}"
    )
    if unchecked:
        yield (
            f"that {', '.join(unchecked)} approved and charged the same plan is their word: their ledgers are not here"
        )


def check_noise(records: Records, study: Study) -> float | None:
    """Check that every sum says how much noise it has, and that at no round it was other noise than the contract's.

    Returns:
        Deviations from the expected noise of all sums together; None where the study measures none.

    Raises:
        VerificationFailed: step 4.
    """
    empty, found = empty_coordinates(study), list[MeasuredNoise]()
    for file, record in records:
        with checking(4, file):
            if record.noise is None:
                if empty and record.implausible is None:
                    raise PeerError("it does not say how much noise the empty coordinates of its sum show")
                continue
            if record.opened is None or record.noise.coordinates != empty:
                raise PeerError(f"its noise is of {record.noise.coordinates} coordinates, and {empty} are empty")
            try:
                expected = expected_noise(study, len(record.participants), record.opened.parameters)
            except ConfigurationError as error:
                raise PeerError(f"the contract gives its sums no noise: {error}") from error
            if not math.isclose(record.noise.expected, expected, rel_tol=_DIGITS):
                raise PeerError(
                    f"it expects a mean square of {record.noise.expected:g} in the empty coordinates; the contract's "
                    f"noise at {len(record.participants)} sites gives {expected:g}"
                )
            before = doubt(found)
            if before is not None:
                raise PeerError(f"the study went on although {before}")
            found.append(record.noise)
    return deviations(found) if found else None
