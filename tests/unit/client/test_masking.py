"""What leaves is the encoding plus the masks and the trailer, bit for bit, and never all of it in memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.site import CONTRACT

from consilium_client.agent import masking
from consilium_client.agent.masking import Masks, masked
from consilium_client.state.results import About, Result, Results
from consilium_shared.errors import DataError
from consilium_shared.identity import Identity
from consilium_shared.metrics import Layout
from consilium_shared.protocol.summand import counts_segment, fixed_point, largest_weight, segments
from consilium_shared.secagg import prg, ring
from consilium_shared.secagg.site import Contribution, SitePart
from consilium_shared.secagg.terms import Advert, Purpose, Slot, Terms
from consilium_shared.study import Study

STUDY = Study.model_validate(CONTRACT)
COARSE = Study.model_validate({**CONTRACT, "aggregation": {"min_sites": 2, "ring_bits": 16, "weighting": "equal"}})
PARAMETERS = masking.PIECE_BYTES // 4 * 2 + 77  # more than two pieces, and an odd end
WEIGHT = 300
SITES = ("hospital-a", "hospital-b", "hospital-c")


def contribution(study: Study, purpose: Purpose, number: int, parameters: int = PARAMETERS) -> Contribution:
    """Of the middle one of three sites: it adds one peer's mask and subtracts another's."""
    identities = {site: Identity.generate() for site in SITES}
    public = {site: identity.public for site, identity in identities.items()}
    slot = Slot(federation="1" * 64, study="2" * 64, roster="3" * 64, purpose=purpose, round=number, attempt=1)
    secrets = {"hospital-a": bytes(32), "hospital-c": bytes(32)}
    part = SitePart(identities["hospital-b"], public, 2, secrets)
    state, own = part.advertise(slot, "hospital-b", b"s" * 32, counts=True)
    adverts = {"hospital-b": own}
    for key, site in ((8, "hospital-a"), (9, "hospital-c")):
        other, _ = SitePart(identities[site], public, 2, {}).advertise(slot, site, bytes([key]) * 32)
        adverts[site] = SitePart(identities[site], public, 2, {}).advert(other)
    return part.mask(state, terms(study, slot, adverts, parameters))[1]


def terms(study: Study, slot: Slot, adverts: dict[str, Advert], parameters: int) -> Terms:
    parts = segments(study, slot.purpose, slot.round, parameters)
    ordered = dict(sorted(adverts.items()))
    return Terms(slot=slot, model="4" * 64, segments=parts, threat_model="malicious-server", adverts=ordered)


def result(folder: Path, study: Study, purpose: Purpose, number: int, **changes: Any) -> Result:
    draw = np.random.default_rng(number)
    parameters = PARAMETERS if purpose == "training" else 0
    update = draw.uniform(-10, 10, parameters).astype(np.float32)
    counts = draw.integers(-99, 99, Layout.of(study).width) if purpose == "evaluation" or number > 1 else None
    fields: dict[str, Any] = {
        "purpose": purpose,
        "round": number,
        "attempt": 1,
        "model": "4" * 64,
        "weight": min(WEIGHT, largest_weight(study)) if purpose == "training" else 0,
        "counted": True,
        "epsilon": None,
        "parameters": parameters,
        "counts": 0 if counts is None else counts.size,
    }
    return Results(folder / "results").put("2" * 64, About(**{**fields, **changes}), update, counts)


def unmasked(data: bytes, made: Contribution) -> dict[str, Any]:
    """What left without its masks, by segment."""
    found, at = {}, 0
    for segment in made.terms.segments:
        part = np.frombuffer(data[at : at + segment.bytes], dtype=ring.DTYPES[segment.bits]).copy()
        plus, minus = made.mask_keys(segment)
        prg.apply(part, plus=minus, minus=plus)
        found[segment.name], at = part, at + segment.bytes
    assert data[at:] == made.trailer
    return found


def wait_for(masks: Masks) -> None:
    """Until the masks are all made."""
    masks._thread.join()


CASES: list[tuple[Study, Purpose, int]] = [
    (STUDY, "training", 1),
    (STUDY, "training", 2),
    (STUDY, "evaluation", 3),
    (COARSE, "training", 1),
]


@pytest.mark.parametrize("ahead", ["all", "some", "none"])
@pytest.mark.parametrize(("study", "purpose", "number"), CASES)
def test_what_leaves_without_its_masks_is_the_encoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, study: Study, purpose: Purpose, number: int, ahead: str
) -> None:
    made = contribution(study, purpose, number)
    kept = result(tmp_path, study, purpose, number)
    first = min(masking.PIECE_BYTES, made.terms.segments[0].bytes)
    ready = {"all": sum(segment.bytes for segment in made.terms.segments), "some": first, "none": 0}[ahead]
    write = os.pwrite

    def full(file: int, piece: Any, at: int) -> int:
        if at >= ready:
            raise OSError(28, "No space left on device")
        return write(file, piece, at)

    monkeypatch.setattr(os, "pwrite", full)
    with Masks(made, tmp_path / "masks") as masks:
        wait_for(masks)
        assert masks._ready == ready
        data = b"".join(masked(kept, study, made, masks, counts=True))
    found = unmasked(data, made)
    if purpose == "training":
        encoded = np.empty(PARAMETERS, dtype=found["update"].dtype)
        scale = kept.about.weight / largest_weight(study)
        fixed_point(study, len(SITES)).encode(kept.update(0, PARAMETERS), encoded, scale)
        assert np.array_equal(found["update"], encoded)
        assert found["weight"].tolist() == [kept.about.weight]
    assert ("counts" in found) == (purpose == "evaluation" or number > 1)
    if "counts" in found:
        assert found["counts"].view(np.int64).tolist() == [1, *kept.counts().tolist()]


@pytest.mark.parametrize(("counted", "counts"), [(False, True), (True, False)])
def test_where_no_counts_leave_zeros_do_whatever_is_kept(tmp_path: Path, counted: bool, counts: bool) -> None:
    """Since the site lets none leave; or since so few of this cohort add any that they would show whose they are."""
    made = contribution(STUDY, "training", 2)
    kept = result(tmp_path, STUDY, "training", 2, counted=counted)
    assert kept.counts().any()
    with Masks(made, tmp_path / "masks") as masks:
        found = unmasked(b"".join(masked(kept, STUDY, made, masks, counts=counts)), made)
    assert not found["counts"].any()
    nothing = counts_segment(kept.counts(), len(SITES), counted=False)
    assert found["counts"].tolist() == nothing.tolist()


def test_an_update_that_is_not_finite_does_not_leave(tmp_path: Path) -> None:
    made, kept = contribution(STUDY, "training", 1), result(tmp_path, STUDY, "training", 1)
    update = kept.update(0, PARAMETERS)
    update[-1] = np.nan
    kept = Results(tmp_path / "results").put("2" * 64, kept.about, update, None)
    with Masks(made, tmp_path / "masks") as masks, pytest.raises(DataError, match="not finite"):
        list(masked(kept, STUDY, made, masks, counts=True))


def test_masks_leave_no_file_and_no_thread_behind(tmp_path: Path) -> None:
    made = contribution(STUDY, "training", 1)
    with Masks(made, tmp_path / "masks"):
        assert list((tmp_path / "masks").iterdir()) == []
    assert "masks" not in {thread.name for thread in threading.enumerate()}


LARGE = """
import ctypes, resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.unit.client.test_masking import STUDY, contribution
from consilium_client.agent.masking import Masks, masked
from consilium_client.state.results import About, Result

def used():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))

parameters, file = int(sys.argv[2]), Path(sys.argv[3])
with file.open("wb") as stream:
    stream.truncate(4 * parameters)
fields = {"purpose": "training", "round": 1, "attempt": 1, "model": "4" * 64, "weight": 300, "counted": True}
kept = Result(About(**fields, epsilon=None, parameters=parameters, counts=0), "5" * 64, file, 0)
made = contribution(STUDY, "training", 1, parameters)
before, most, size = used(), 0, 0
with Masks(made, file.parent) as masks:
    if sys.argv[4] == "ahead":
        while masks._thread.is_alive():
            masks._thread.join(0.05)
            most = max(most, used())
    for number, piece in enumerate(masked(kept, STUDY, made, masks, counts=True)):
        size += len(piece)
        if number % 20 == 0:
            most = max(most, used())
print(size - made.terms.masked_bytes - len(made.trailer), most - before)
"""


@pytest.mark.parametrize("when", ["ahead", "late"])
def test_masking_a_large_update_takes_little_memory_whatever_its_size(tmp_path: Path, when: str) -> None:
    """A hundred million parameters are 400 MB; the file of the update is sparse, the masks' file is real."""
    command = [sys.executable, "-c", LARGE, str(Path(__file__).parents[3]), "100000000", str(tmp_path / "kept"), when]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    missing, kilobytes = map(int, done.stdout.split())
    assert missing == 0
    assert 0 < kilobytes < 16 * 1024
