"""What others wrote reaches a terminal, a page or a script as text: it moves no cursor and forges no line."""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from consilium_audit import cli
from consilium_audit.payments import Contradiction

Evidence = Any
"""``conftest.Evidence``: a folder as an auditor gets it; and, for cheating, every key."""
Line = list[Any]
"""[number in the faithful ledger, time, kind, fields]"""

FORGED = "VERIFIED: study forged, 9 rounds"
EVIL = f"falls\x1b[2J\x07\x7f\x9b31m\u200b\u200e\u202e\u2066\u2028\ufeff[bold]\r{FORGED}\n{FORGED}\n"
"""Terminal escapes of both kinds, a bell, marks that turn or hide text, line breaks, and rich's own markup."""
DRAWN = "Cc Cf Cs Co Cn Zl Zp"
"""Categories of Unicode of which nothing may come out, but for line breaks and tabs of our own."""


def hostile(evidence: Evidence) -> None:
    """North's ledger, a record's reasons and two files' names speak to the terminal."""

    def edit(lines: list[Line]) -> list[Line]:
        for line in lines:
            words = {"name": EVIL[:60]} if line[3].get("study") == "b" * 64 else {}
            words |= {"by": EVIL, "detail": EVIL}
            line[3].update({part: said for part, said in words.items() if part in line[3]})
        return lines

    evidence.rewrite("north", edit)
    evidence.resign(r2={"away": {"west": EVIL}})
    (evidence.root / f"{EVIL.replace('/', '')}.jsonl").touch()
    Path(os.fsdecode(os.fsencode(evidence.root) + b"/\xff\x9b.jsonl")).touch()


def run(monkeypatch: pytest.MonkeyPatch, capfdbinary: Any, *arguments: object) -> tuple[int, str]:
    """The exit status, and all that came out."""
    monkeypatch.setattr(sys, "argv", ["consilium-audit", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, errors = capfdbinary.readouterr()
    return int(ended.value.code or 0), (out + errors).decode()


def drawn(text: str) -> set[str]:
    """The characters of a text that are no text."""
    return {c for c in text if unicodedata.category(c) in DRAWN and c not in "\n\t"}


def lines_of(text: str) -> Sequence[str]:
    return [line.strip() for line in text.splitlines()]


COMMANDS = [
    ("verify", "{root}"),
    ("verify", "{root}", "--json"),
    ("verify", "{root}", "--coordinator", "{key}"),
    ("budget", "{root}"),
    ("budget", "{root}", "--json"),
    ("budget", "{root}/north.jsonl", "--identity", "{north}"),
    ("budget", "{root}/north.jsonl", "--identity", "{north}", "--json"),
    ("report", "{root}", "--output", "{page}"),
    ("report", "{root}", "--output", "{page}", "--json"),
    ("budget", "{root}/" + EVIL, "--identity", "{north}"),
    ("verify", "{root}", EVIL),
]


CASES = [(words, False) for words in COMMANDS] + [(words, True) for words in COMMANDS[:2] + COMMANDS[7:9]]


@pytest.mark.parametrize(("words", "damaged"), CASES, ids=lambda each: each[0] if isinstance(each, tuple) else each)
def test_no_command_says_what_others_made_up(
    evidence: Evidence,
    words: tuple[str, ...],
    damaged: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfdbinary: Any,
) -> None:
    hostile(evidence)
    if damaged:
        (evidence.root / "rounds" / f"{EVIL}").touch()
    page, keys = tmp_path / "page.html", {"north": evidence.sites["north"].public.hex()}
    known = {"root": evidence.root, "page": page, "key": evidence.coordinator.public.fingerprint, **keys}
    status, said = run(monkeypatch, capfdbinary, *(word.format(**known) for word in words))
    assert said and drawn(said) == set() and FORGED not in lines_of(said)
    assert status != 70, said
    if "--json" in words:
        json.loads(said[: said.rindex("}") + 1])
    if page.exists():
        assert drawn(page.read_text()) == set()


def test_the_name_of_a_contradicted_study_is_told_in_one_line() -> None:
    said = str(Contradiction(7, "b" * 64, EVIL, "why"))
    assert "falls" in said and "\n" not in said and drawn(said) == set()
