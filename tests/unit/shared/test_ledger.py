"""A ledger's lines: what verifies, and which numbered step refuses what does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from consilium_shared.canonical import canonical_bytes, digest
from consilium_shared.errors import LedgerError
from consilium_shared.identity import Identity
from consilium_shared.ledger.chain import LedgerHead, genesis
from consilium_shared.ledger.entry import LINE_BYTES, make_body, sign_entry
from consilium_shared.ledger.verify import VerifiedLedger, verify_ledger

SITE = Identity.generate()
STUDY, POLICY = "5" * 64, "9" * 64
PLAN = {
    "kind": "dp-sgd",
    "unit": "patient",
    "sampling_rate": 0.1,
    "clipping_norm": 1.0,
    "noise_multiplier": 2.0,
    "steps_per_round": 5,
    "rounds": 3,
    "delta": 1e-5,
    "epsilon": 3.0,
}
EVENT = {"kind": "dp-sgd", "sampling_rate": 0.1, "noise_multiplier": 2.0, "steps": 5}
OPEN = {"asset": "icu", "unit": "patient", "epsilon": 10.0, "delta": 1e-5, "policy": POLICY, "reason": ""}
APPROVE = {"study": STUDY, "name": "sepsis", "asset": "icu", "epsilon": 3.0, "by": "Dr Ono", "plan": PLAN}
CHARGE = {
    "study": STUDY,
    "name": "sepsis",
    "asset": "icu",
    "round": 1,
    "attempt": 1,
    "event": EVENT,
    "delta": 1e-5,
    "epsilon_after": 0.5,
}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("open", OPEN),
    ("approve", APPROVE),
    ("charge", CHARGE),
    ("settle", {"charge_seq": 3, "steps": 5}),
    ("release", {"study": STUDY, "round": 1, "message": "update", "sha256": "a" * 64, "bytes": 12345}),
    ("refuse", {"study": None, "round": None, "reason": "malformed", "detail": "no message of ours"}),
    ("recover", {"sha256": "c" * 64, "bytes": 17}),
    ("policy", {"digest": POLICY, "reason": "yearly review"}),
    ("reject", {"study": STUDY, "name": "sepsis", "by": "Dr Ono", "reason": "withdrawn"}),
]


def write(
    entries: list[tuple[str, dict[str, Any]]],
    *,
    signer: Identity = SITE,
    site: str = "north",
    time: Callable[[int], str] = lambda seq: f"2026-01-01T00:00:{seq:02d}.000Z",
) -> bytes:
    """A ledger of these entries, each signed and chained, however senseless."""
    head, data = genesis(site, SITE.public), b""
    for kind, fields in entries:
        seq = head.seq + 1
        line = sign_entry(seq, time(seq), make_body(kind, fields), head.sha256, signer).line()
        head = LedgerHead(seq, digest(line))
        data += line + b"\n"
    return data


def verify(data: bytes) -> VerifiedLedger:
    return verify_ledger(data, "north", SITE.public)


def refused(data: bytes) -> tuple[int | None, int | None]:
    with pytest.raises(LedgerError) as caught:
        verify(data)
    assert f"line {caught.value.line}: step {caught.value.step}:" in str(caught.value)
    return caught.value.line, caught.value.step


def test_a_ledger_of_every_kind_verifies() -> None:
    data = write(GOOD)
    ledger = verify(data)
    assert [entry.kind for entry in ledger.entries] == [kind for kind, _ in GOOD]
    assert ledger.head == LedgerHead(len(GOOD), digest(data.splitlines()[-1]))
    assert ledger.books.charges[3].settled == 5
    assert b"".join(entry.line() + b"\n" for entry in ledger.entries) == data


def test_the_empty_ledger_has_the_genesis_as_its_head() -> None:
    assert verify(b"").head == genesis("north", SITE.public)
    heads = {genesis("north", SITE.public), genesis("south", SITE.public), genesis("north", Identity.generate().public)}
    assert len(heads) == 3


def test_step_1_whole_lines() -> None:
    data = write(GOOD)
    assert refused(data[:-1]) == (9, 1)
    assert refused(data + b"\n") == (10, 1)
    assert refused(data + b" " * (LINE_BYTES + 1) + b"\n") == (10, 1)


@pytest.mark.parametrize("edit", [lambda e: e + b" ", lambda e: e.replace(b'":', b'": ', 1), lambda e: b"\xff" + e])
def test_step_2_canonical_json(edit: Callable[[bytes], bytes]) -> None:
    first, *rest = write(GOOD).splitlines(keepends=True)
    assert refused(edit(first[:-1]) + b"\n" + b"".join(rest)) == (1, 2)
    assert refused(b'{"a":1,"a":2}\n') == (1, 2)


def _edited(line: int, change: Callable[[dict[str, Any]], None]) -> bytes:
    lines = write(GOOD).splitlines()
    value = json.loads(lines[line - 1])
    change(value)
    lines[line - 1] = canonical_bytes(value)
    return b"\n".join(lines) + b"\n"


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.update(note="more"),
        lambda e: e.pop("sig"),
        lambda e: e.update(seq="3"),
        lambda e: e.update(kind="discount"),
        lambda e: e.update(time="2026-13-01T00:00:00.000Z"),
        lambda e: e.update(time="2026-01-01T00:00:00Z"),
        lambda e: e.update(sig=e["sig"].upper() if e["sig"].upper() != e["sig"] else "F" * 128),
        lambda e: e["body"].update(note="more"),
        lambda e: e["body"].pop("delta"),
        lambda e: e["body"].update(attempt=0),
        lambda e: e["body"].update(epsilon_after="0.5"),
        lambda e: e["body"]["event"].update(kind="free"),
        lambda e: e["body"]["event"].update(noise_multiplier=-2),
        lambda e: e["body"]["event"].update(steps=True),
    ],
)
def test_step_3_exactly_the_fields(change: Callable[[dict[str, Any]], None]) -> None:
    assert refused(_edited(3, change)) == (3, 3)


def test_step_4_numbered_without_a_gap() -> None:
    assert refused(_edited(3, lambda e: e.update(seq=4))) == (3, 4)


def test_step_5_chained_to_the_line_before_and_to_this_site() -> None:
    assert refused(_edited(3, lambda e: e.update(prev="0" * 64))) == (3, 5)
    assert refused(write(GOOD, site="south")) == (1, 5)


def test_step_6_signed_by_the_site() -> None:
    assert refused(_edited(9, lambda e: e["body"].update(reason="other"))) == (9, 6)
    assert refused(write(GOOD, signer=Identity.generate())) == (1, 6)


def test_step_7_time_never_goes_back() -> None:
    assert refused(write(GOOD, time=lambda seq: f"2026-01-01T00:00:{10 - seq:02d}.000Z")) == (2, 7)


SETTLE = {"charge_seq": 3, "steps": 5}


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ([("approve", APPROVE)], 1),
        ([GOOD[0], ("charge", CHARGE)], 2),
        ([GOOD[0], ("open", {**OPEN, "epsilon": 20.0})], 2),
        ([*GOOD[:2], ("reject", GOOD[8][1]), ("charge", CHARGE)], 4),
        ([*GOOD[:2], ("charge", {**CHARGE, "asset": "other"})], 3),
        ([*GOOD[:2], ("charge", {**CHARGE, "attempt": 2})], 3),
        ([*GOOD[:3], ("charge", CHARGE)], 4),
        ([*GOOD[:2], ("charge", {**CHARGE, "round": 4})], 3),
        ([*GOOD[:2], ("charge", {**CHARGE, "delta": 1e-3})], 3),
        ([*GOOD[:2], ("charge", {**CHARGE, "event": {**EVENT, "steps": 6}})], 3),
        ([*GOOD[:2], ("charge", {**CHARGE, "event": {**EVENT, "noise_multiplier": 3.0}})], 3),
        ([*GOOD[:2], ("charge", {**CHARGE, "event": {"kind": "non-private"}})], 3),
        ([*GOOD[:3], ("settle", {"charge_seq": 3, "steps": 6})], 4),
        ([*GOOD[:3], ("settle", {"charge_seq": 2, "steps": 5})], 4),
        ([*GOOD[:3], ("settle", {"charge_seq": 5, "steps": 5})], 4),
        ([*GOOD[:3], ("settle", SETTLE), ("settle", SETTLE)], 5),
    ],
)
def test_step_8_an_entry_fits_those_before_it(entries: list[tuple[str, dict[str, Any]]], line: int) -> None:
    assert refused(write(entries)) == (line, 8)


def test_a_changed_budget_with_a_reason_and_a_second_attempt_fit() -> None:
    verify(write([*GOOD[:3], ("charge", {**CHARGE, "attempt": 2}), ("open", {**OPEN, "reason": "ethics board 7/26"})]))
