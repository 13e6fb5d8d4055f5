"""In a federation of four no ledger can be changed, cut, reordered, extended or taken back unseen.

Over a small study every change of its kind is tried, over a big one a sample. A ledger is verified line by line, and a
line is refused, or not, by what stands before it alone; so a change in one line is tried on a verifier that has the
lines before it already (``LedgerVerifier.check`` is all that ``verify_ledger`` does). Whatever leaves a ledger that
verifies by itself goes through a whole ``Verification`` with the other parties' files.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from consilium_audit.evidence import VerificationFailed
from consilium_audit.verify import Verification
from consilium_shared.errors import LedgerError
from consilium_shared.ledger.entry import decode_entry, decode_json, make_body, sign_entry
from consilium_shared.ledger.verify import LedgerVerifier, verify_ledger

Evidence = Any
"""``conftest.Evidence``: a folder as an auditor gets it; and, for cheating, every key."""
SITES = ("east", "north", "south", "west")
SMALL, BIG = 2, 30
"""Rounds."""
TRIES = 12
"""Of each kind of change, over the big federation."""


@pytest.fixture(scope="module")
def small(of_four: Callable[[int], Evidence]) -> Evidence:
    return of_four(SMALL)


@pytest.fixture(scope="module")
def big(of_four: Callable[[int], Evidence]) -> Evidence:
    return of_four(BIG)


def lines_of(evidence: Evidence, site: str) -> list[bytes]:
    """With their newlines."""
    data: bytes = evidence.ledger(site).read_bytes()
    return data.splitlines(keepends=True)


def standing(evidence: Evidence, site: str) -> Iterator[tuple[int, list[bytes], LedgerVerifier]]:
    """Each place of a ledger, all lines, and a verifier that has those before that place; lastly behind the last."""
    lines, verifier = lines_of(evidence, site), LedgerVerifier(site, evidence.sites[site].public)
    for place, line in enumerate(lines):
        yield place, lines, verifier
        verifier.check(line)
    yield len(lines), lines, verifier


def refused(verifier: LedgerVerifier, data: bytes) -> bool:
    """Whether these bytes are refused as the next ones, with line and step."""
    before = verifier.head
    try:
        verifier.check(data)
    except LedgerError as error:
        assert error.line == before.seq + 1 and error.step is not None
        assert verifier.head == before
        return True
    return False


def found(evidence: Evidence, site: str, data: bytes) -> VerificationFailed:
    """What the whole verification says of the evidence with this ledger."""
    file = evidence.ledger(site)
    faithful = file.read_bytes()
    file.write_bytes(data)
    try:
        with pytest.raises(VerificationFailed) as caught:
            evidence.verified()
    finally:
        file.write_bytes(faithful)
    return caught.value


def test_the_small_and_the_big_federation_verify_as_they_are(small: Evidence, big: Evidence) -> None:
    for evidence, rounds in ((small, SMALL), (big, BIG)):
        verdict = Verification(evidence.root, evidence.coordinator.public.fingerprint).run()
        assert (verdict.rounds, verdict.unchecked, verdict.notes) == (rounds, (), [])
        assert all(seen == entries - 1 for seen, entries in verdict.witnessed.values())


# -- everything, over a small one


@pytest.mark.parametrize("site", SITES)
def test_every_single_flipped_bit_is_found(small: Evidence, site: str) -> None:
    for place, lines, verifier in standing(small, site):
        for position in range(len(lines[place]) if place < len(lines) else 0):
            original = b"".join(lines[place : place + 2])  # a flipped newline joins two lines
            for bit in range(8):
                flipped = bytearray(original)
                flipped[position] ^= 1 << bit
                assert refused(verifier, bytes(flipped)), (place, position, bit)


@pytest.mark.parametrize("site", SITES)
def test_every_cut_within_a_line_is_found(small: Evidence, site: str) -> None:
    for place, lines, verifier in standing(small, site):
        for length in range(1, len(lines[place]) if place < len(lines) else 0):
            assert refused(verifier, lines[place][:length]), (place, length)


@pytest.mark.parametrize("site", SITES)
def test_every_rollback_to_an_earlier_state_is_found_by_what_others_hold(small: Evidence, site: str) -> None:
    lines = lines_of(small, site)
    for kept in range(len(lines)):
        data = b"".join(lines[:kept])
        verify_ledger(data, site, small.sites[site].public)  # by itself it is whole
        failure = found(small, site, data)
        assert failure.step == (6 if kept < len(lines) - 1 else 8), str(failure)
        assert failure.file == small.ledger(site)


@pytest.mark.parametrize("site", SITES)
def test_at_every_place_no_line_but_the_one_that_belongs_there_is_accepted(small: Evidence, site: str) -> None:
    """Hence no reordering, no insertion, no omission, no repetition and no line of another ledger at any place."""
    known = {line for each in SITES for line in lines_of(small, each)}
    for place, lines, verifier in standing(small, site):
        for line in known - set(lines[place : place + 1]):
            assert refused(verifier, line), (place, line)
        assert refused(verifier, b"\n") and refused(verifier, b"{}\n")


@pytest.mark.parametrize("site", SITES)
def test_every_other_history_that_the_site_itself_signs_is_found(small: Evidence, site: str) -> None:
    """From each place on every entry is written anew, a day later, with whatever it then says of its own heads."""
    lines = lines_of(small, site)
    for place in range(len(lines) - 1):
        assert found(small, site, rewritten(small, site, place)).step == 6, place
    # Nobody holds the digest of the very last line. But what it says, that the closing left, is demanded.
    last = decode_entry(decode_json(lines[-1][:-1]))
    assert last.kind == "release"
    other = make_body("release", {**last.body.model_dump(), "sha256": "0" * 64})
    line = sign_entry(last.seq, last.time, other, last.prev, small.sites[site]).line()
    assert found(small, site, b"".join(lines[:-1]) + line + b"\n").step == 8


def rewritten(evidence: Evidence, site: str, place: int) -> bytes:
    """The ledger with other entries from that place on: later ones, properly chained and signed."""
    file = evidence.ledger(site)
    faithful: bytes = file.read_bytes()

    def later(lines: list[list[Any]]) -> list[list[Any]]:
        for line in lines[place:]:
            line[1] = "2126" + line[1][4:]
            if line[2] == "witness":
                line[3]["heads"].pop(site, None)
        return lines

    evidence.rewrite(site, later, heads=False)
    try:
        data: bytes = file.read_bytes()
        return data
    finally:
        file.write_bytes(faithful)


# -- a sample, over a big one


def test_flipped_bits_of_a_big_federation_are_found_at_their_line(big: Evidence) -> None:
    draw = random.Random(1)
    for _ in range(TRIES):
        site = draw.choice(SITES)
        data = bytearray(big.ledger(site).read_bytes())
        position = draw.randrange(len(data))
        data[position] ^= 1 << draw.randrange(8)
        failure = found(big, site, bytes(data))
        assert (failure.step, failure.file) == (5, big.ledger(site))
        assert failure.line == lines_before(big, site, position) + 1


def lines_before(evidence: Evidence, site: str, position: int) -> int:
    data: bytes = evidence.ledger(site).read_bytes()
    return data[:position].count(b"\n")


def test_cuts_of_a_big_federation_are_found(big: Evidence) -> None:
    draw = random.Random(2)
    for _ in range(TRIES):
        site = draw.choice(SITES)
        data, lines = big.ledger(site).read_bytes(), lines_of(big, site)
        length = draw.randrange(len(data))
        assert found(big, site, data[:length]).step == (6 if data[:length].endswith(b"\n") else 5)
        assert found(big, site, b"".join(lines[: draw.randrange(len(lines) - 1)])).step == 6


def test_moved_removed_and_foreign_lines_of_a_big_federation_are_found(big: Evidence) -> None:
    draw = random.Random(3)
    for _ in range(TRIES):
        site = draw.choice(SITES)
        lines, foreign = lines_of(big, site), lines_of(big, draw.choice(SITES))
        place, other = draw.sample(range(len(lines) - 1), 2)
        for changed in (
            [*lines[:place], *lines[place + 1 :]],
            [*lines[:place], lines[other], *lines[place:]],
            [*lines[:place], lines[other], *lines[place + 1 :]],
            [*lines[:place], foreign[other], *lines[place:]],
            [*lines[:place], *foreign[place + 1 :]],
        ):
            failure = found(big, site, b"".join(changed))
            assert (failure.step, failure.file, failure.line) == (5, big.ledger(site), place + 1)


def test_other_histories_of_a_big_federation_are_found(big: Evidence) -> None:
    draw = random.Random(4)
    for _ in range(TRIES):
        site = draw.choice(SITES)
        place = draw.randrange(len(lines_of(big, site)) - 1)
        assert found(big, site, rewritten(big, site, place)).step == 6


def test_every_entry_of_the_small_federation_is_one_that_a_site_writes(small: Evidence) -> None:
    kinds = {decode_entry(decode_json(line[:-1])).kind for site in SITES for line in lines_of(small, site)}
    assert kinds == {"open", "approve", "charge", "settle", "release", "witness"}
