"""No edit of a ledger passes verification, except one that only other parties' copies of a head can show."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from consilium_client.state.ledger_file import LedgerFile
from consilium_shared.errors import LedgerError
from consilium_shared.identity import Identity
from consilium_shared.ledger.verify import verify_ledger

SITE, OTHER = Identity.generate(), Identity.generate()
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("open", {"asset": "icu", "unit": "patient", "epsilon": None, "delta": 1e-5, "policy": "1" * 64, "reason": ""}),
    ("refuse", {"study": "2" * 64, "round": 1, "reason": "budget", "detail": "spent ε 2"}),
    ("refuse", {"study": "2" * 64, "round": 1, "reason": "budget", "detail": "spent ε 2"}),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Three entries, the last two alike."""
    return _written(tmp_path_factory.mktemp("north"), "north", SITE)


def _written(folder: Path, site: str, identity: Identity) -> bytes:
    with LedgerFile(folder / "ledger.jsonl", site, identity) as ledger:
        for kind, fields in BODIES:
            ledger.append(kind, fields)
    return (folder / "ledger.jsonl").read_bytes()


def _refused(data: bytes) -> None:
    with pytest.raises(LedgerError) as caught:
        verify_ledger(data, "north", SITE.public)
    assert caught.value.step is not None and caught.value.line is not None


def test_the_ledger_itself_passes(small: bytes) -> None:
    assert len(verify_ledger(small, "north", SITE.public).entries) == len(BODIES)


def test_every_flipped_bit_is_found(small: bytes) -> None:
    for position in range(len(small)):
        for bit in range(8):
            _refused(small[:position] + bytes([small[position] ^ (1 << bit)]) + small[position + 1 :])


def test_every_cut_is_found_except_one_between_two_entries(small: bytes) -> None:
    # Whole entries missing at the end: only who holds a later head can tell, which is why heads are exchanged.
    invisible = []
    for length in range(len(small)):
        try:
            rest = verify_ledger(small[:length], "north", SITE.public)
        except LedgerError:
            continue
        invisible.append(length)
        assert rest.head != verify_ledger(small, "north", SITE.public).head
    assert invisible == [0, *(i + 1 for i, byte in enumerate(small[:-1]) if byte == ord("\n"))]


def test_every_removed_byte_and_every_removed_span_of_lines_but_the_tail_is_found(small: bytes) -> None:
    for position in range(len(small)):
        _refused(small[:position] + small[position + 1 :])
    lines = small.splitlines(keepends=True)
    for start in range(len(lines)):
        for end in range(start + 1, len(lines)):  # never up to the last
            _refused(b"".join(lines[:start] + lines[end:]))


def test_every_inserted_or_repeated_line_is_found(small: bytes) -> None:
    lines = small.splitlines(keepends=True)
    for position in range(len(lines) + 1):
        for line in [*lines, b"{}\n", b"\n"]:
            _refused(b"".join([*lines[:position], line, *lines[position:]]))


def test_every_other_order_is_found(small: bytes) -> None:
    lines = small.splitlines(keepends=True)
    for order in permutations(lines):
        if list(order) != lines:
            _refused(b"".join(order))


def test_lines_of_another_site_or_of_the_same_site_under_another_name_are_found(small: bytes, tmp_path: Path) -> None:
    lines = small.splitlines(keepends=True)
    for name, identity in (("south", OTHER), ("north", OTHER), ("south", SITE)):
        foreign = _written(tmp_path / f"{name}-{identity is SITE}", name, identity).splitlines(keepends=True)
        for position in range(len(lines)):
            _refused(b"".join([*lines[:position], foreign[position], *lines[position + 1 :]]))
            _refused(b"".join([*lines[:position], *foreign[position:]]))
