"""Writes the test vectors of this folder: good and bad ledgers, index.json, schema.json. The same bytes every time.

Run from the repository's root, with the project installed: python tests/vectors/ledger/generate.py [FOLDER]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic.json_schema import models_json_schema

from consilium_shared.canonical import canonical_bytes, digest
from consilium_shared.identity import Identity
from consilium_shared.ledger.chain import genesis
from consilium_shared.ledger.entry import DOMAIN, KINDS, LINE_BYTES, Envelope

HERE = Path(__file__).parent
SITE = "north"


def key_of(name: str) -> Identity:
    """A key that everybody knows: for test vectors and nothing else."""
    return Identity(Ed25519PrivateKey.from_private_bytes(sha256(f"consilium test vector {name}".encode()).digest()))


def hex_of(text: str) -> str:
    return digest(text.encode())


KEY, OTHER = key_of(SITE), key_of("south")
STUDY, OPEN_STUDY, LATER = hex_of("private study"), hex_of("open study"), hex_of("later study")
DP_SGD = {"kind": "dp-sgd", "sampling_rate": 0.05, "noise_multiplier": 1.5, "steps": 5}
DP_PLAN = {
    "kind": "dp-sgd", "unit": "patient", "sampling_rate": 0.05, "clipping_norm": 1.0, "noise_multiplier": 1.5,
    "steps_per_round": 5, "rounds": 3, "delta": 0.00001, "epsilon": 3.0, "records_per_patient": 4, "patients": 1003,
    "count_noise": 10.0, "evaluations": 3, "evaluation_noise": 20.5,
}  # fmt: skip
OLD_PLAN = {name: DP_PLAN[name] for name in list(DP_PLAN)[:9]}
OPENED = {"asset": "icu", "unit": "patient", "epsilon": 6.0, "delta": 0.0001, "policy": hex_of("policy"), "reason": ""}
APPROVED = {"study": STUDY, "name": "sepsis", "asset": "icu", "epsilon": 3.0, "by": "Dr Ono", "plan": DP_PLAN}
CHARGED = {
    "study": STUDY, "name": "sepsis", "asset": "icu", "round": 1, "attempt": 1, "event": DP_SGD, "delta": 0.0001,
    "epsilon_after": 1.25, "purpose": "training",
}  # fmt: skip
COUNTED = {**CHARGED, "round": 0, "event": {"kind": "gaussian", "noise_multiplier": 10.0}, "purpose": "count"}
EVALUATED = {**CHARGED, "event": {"kind": "gaussian", "noise_multiplier": 20.5}, "purpose": "evaluation"}
AUDIT = {
    "study": STUDY,
    "name": "sepsis",
    "canaries": 100,
    "guesses": 40,
    "correct": 27,
    "plan": hex_of("plan"),
    "by": "Dr Ono",
}
RELEASED = {"study": STUDY, "round": 1, "message": "update", "sha256": hex_of("an update"), "bytes": 4096}
REFUSED = {"study": STUDY, "round": 2, "reason": "budget", "detail": "ε 3.2 of 3"}


@dataclass
class Pen:
    """Writes lines, each chained to the one before and signed, whether or not they make sense."""

    site: str = SITE
    key: Identity = KEY
    data: bytes = b""
    seq: int = 0

    def __post_init__(self) -> None:
        self.prev = genesis(self.site, self.key.public).sha256

    def envelope(self, kind: str, body: Any, **changes: Any) -> dict[str, Any]:
        """The next entry with its signature; ``changes`` are signed too, but for ``sig``."""
        fields = {"seq": self.seq + 1, "time": self.time, "kind": kind, "body": deepcopy(body), "prev": self.prev}
        sig = changes.pop("sig", None)
        fields.update(changes)
        return {**fields, "sig": sig or self.key.sign(DOMAIN, canonical_bytes(fields)).hex()}

    @property
    def time(self) -> str:
        return f"2026-03-01T08:{self.seq // 60:02d}:{self.seq % 60:02d}.000Z"

    def line(self, kind: str, body: Any, **changes: Any) -> Pen:
        return self.raw(canonical_bytes(self.envelope(kind, body, **changes)))

    def raw(self, line: bytes, end: bytes = b"\n") -> Pen:
        self.data += line + end
        self.prev = digest(line)
        self.seq += 1
        return self

    def head(self) -> dict[str, Any]:
        return {"seq": self.seq, "sha256": self.prev}


@dataclass(frozen=True)
class Vector:
    """``step`` and ``line`` are None for a ledger that verifies."""

    name: str
    data: bytes
    why: str
    step: int | None = None
    line: int | None = None
    site: str = SITE
    identity: str = KEY.public.hex()


def begun(plan: dict[str, Any] = DP_PLAN) -> Pen:
    """Opened and approved, and, where the plan has it, the number of patients charged: two lines or three."""
    pen = Pen().line("open", OPENED).line("approve", {**APPROVED, "plan": plan})
    return pen.line("charge", COUNTED) if "patients" in plan else pen


def charged() -> Pen:
    """And round 1 charged: four lines."""
    return begun().line("charge", CHARGED)


def witness(number: int, heads: dict[str, Any], study: str = STUDY) -> dict[str, Any]:
    return {"study": study, "round": number, "record": hex_of(f"record {number}"), "heads": heads}


def head(seq: int, text: str) -> dict[str, Any]:
    return {"seq": seq, "sha256": hex_of(text)}


def good() -> Iterator[Vector]:
    yield Vector("good-empty", b"", "nothing was written yet: the head is 0 and the genesis")
    pen = Pen().line("open", OPENED)
    pen.line("open", {**OPENED, "asset": "ward", "epsilon": None})
    pen.line("open", {**OPENED, "epsilon": 8.0, "reason": "the ethics board allowed more"})
    pen.line("policy", {"digest": hex_of("stricter"), "reason": ""})
    pen.line("approve", APPROVED).line("charge", COUNTED).line("settle", {"charge_seq": pen.seq, "steps": 1})
    pen.line("charge", CHARGED)
    told = pen.head()
    pen.line("settle", {"charge_seq": pen.seq, "steps": 5}).line("release", RELEASED)
    pen.line("charge", EVALUATED).line("settle", {"charge_seq": pen.seq, "steps": 1})
    pen.line("release", {**RELEASED, "message": "counts"})
    pen.line("release", {**RELEASED, "sha256": hex_of("under other masks"), "again": True})
    pen.line("witness", witness(1, {SITE: told, "south": head(9, "south 9")}))
    pen.line("charge", {**CHARGED, "round": 2}).line("charge", {**CHARGED, "round": 2, "attempt": 2})
    pen.line("settle", {"charge_seq": pen.seq, "steps": 0}).line("recover", {"sha256": hex_of("torn"), "bytes": 17})
    pen.line("refuse", REFUSED).line("refuse", {"study": None, "round": None, "reason": "malformed", "detail": ""})
    pen.line("audit", AUDIT)
    no_privacy = {"kind": "non-private", "steps_per_round": 5, "rounds": 2}
    pen.line("approve", {**APPROVED, "study": OPEN_STUDY, "asset": "ward", "epsilon": None, "plan": no_privacy})
    not_private = {**CHARGED, "study": OPEN_STUDY, "asset": "ward", "event": {"kind": "non-private"}}
    pen.line("charge", {**not_private, "epsilon_after": None})
    pen.line("reject", {"study": OPEN_STUDY, "name": "sepsis", "by": "Dr Ono", "reason": "withdrawn"})
    yield Vector("good-every-kind", pen.data, "every kind of entry, event, plan and purpose")
    pen = charged().line("settle", {"charge_seq": 4, "steps": 5}).line("release", RELEASED)
    pen.line("witness", witness(1, {SITE: charged().head()})).line("charge", {**CHARGED, "round": 2})
    pen.line("charge", EVALUATED).line("settle", {"charge_seq": pen.seq - 1, "steps": 5})
    pen.line("settle", {"charge_seq": pen.seq - 1, "steps": 1})
    carries = {**RELEASED, "round": 2, "sha256": hex_of("update 2"), "counts": True}
    pen.line("release", carries).line("release", {**carries, "sha256": hex_of("update 2 anew"), "again": True})
    yield Vector("good-counts-on-updates", pen.data, "counts of round 1 are charged with the updates of round 2")
    pen = Pen().line("open", OPENED).line("approve", {**APPROVED, "plan": OLD_PLAN})
    older = {name: value for name, value in CHARGED.items() if name != "purpose"}
    pen.line("charge", older).line("settle", {"charge_seq": 3, "steps": 5})
    yield Vector("good-older-entries", pen.data, "fields that later versions added are absent, and not filled in")
    strange = {"ä": "Zürich", "detail": 'Ünïcode, "quotes", \\ and a tab \t; \U0001f3e5 and \u20ac'}
    pen = Pen().line("open", {**OPENED, "asset": strange["ä"], "epsilon": 1e21, "delta": 1e-07})
    pen.line("refuse", {**REFUSED, "detail": strange["detail"]})
    yield Vector("good-canonical-form", pen.data, "beyond ASCII nothing is escaped; numbers as in RFC 8785")
    pen = Pen().line("open", OPENED).line("open", OPENED | {"asset": "ward"}, time="2026-03-01T08:00:00.000Z")
    yield Vector("good-same-time", pen.data, "two entries of the same millisecond")
    pen = begun().line("witness", witness(1, {"south": head(8, "south 8")}, LATER))
    pen.line("witness", witness(1, {"south": head(4, "south 4")}))
    pen.line("witness", witness(3, {"south": head(8, "south 8"), "west": head(5, "west 5")}))
    yield Vector("good-witnesses", pen.data, "rounds may be left out; two studies may show a ledger in any order")
    yield Vector(
        "good-other-site", Pen("south", OTHER).line("open", OPENED).data, "the genesis has site and key",
        site="south", identity=OTHER.public.hex(),
    )  # fmt: skip


def bad() -> Iterator[Vector]:
    first = Pen().line("open", OPENED)
    value = Pen().envelope("open", OPENED)
    line = canonical_bytes(value)

    def of_step(step: int, at: int, cases: dict[str, tuple[bytes, str]]) -> Iterator[Vector]:
        for name, (data, why) in cases.items():
            yield Vector(f"bad-{step}-{name}", data, why, step, at)

    yield from of_step(1, 2, {
        "incomplete": (first.data + line[:100], "the last line has no newline"),
        "no-newline": (first.data + line, "also when it is complete otherwise"),
        "empty-line": (first.data + b"\n", "an empty line"),
        "too-long": (first.data + b" " * (LINE_BYTES + 1) + b"\n", f"longer than {LINE_BYTES} bytes"),
    })  # fmt: skip
    spaced = json.dumps(value, sort_keys=True).encode()
    unsorted = json.dumps(dict(sorted(value.items(), reverse=True)), separators=(",", ":")).encode()
    yield from of_step(2, 1, {
        "space": (spaced + b"\n", "white space"),
        "order": (unsorted + b"\n", "keys out of order"),
        "carriage-return": (line + b"\r\n", "a carriage return before the newline"),
        "duplicate-key": (line[:-1] + b',"sig":"' + b"0" * 128 + b'"}\n', "a key twice"),
        "number": (line.replace(b'"epsilon":6,', b'"epsilon":6.0,') + b"\n", "6.0 is written 6"),
        "escape": (line.replace(b"icu", b"\\u0069cu") + b"\n", "a character that needs no escape"),
        "nan": (line.replace(b'"epsilon":6,', b'"epsilon":NaN,') + b"\n", "NaN is no JSON"),
        "not-utf-8": (line.replace(b"icu", b"\xff\xfe") + b"\n", "not UTF-8"),
        "byte-order-mark": (b"\xef\xbb\xbf" + line + b"\n", "a byte order mark"),
        "cut": (line[:-1] + b"\n", "no JSON"),
    })  # fmt: skip

    def body(kind: str = "open", fields: dict[str, Any] = OPENED, **changes: Any) -> bytes:
        return Pen().line(kind, {**fields, **changes}).data

    without = {name: value for name, value in OPENED.items() if name != "unit"}
    yield from of_step(3, 1, {
        "array": (b"[]\n", "not an object"),
        "unknown-field": (Pen().line("open", OPENED, note="x").data, "a field that no entry has"),
        "unknown-kind": (Pen().line("gift", OPENED).data, "a kind that does not exist"),
        "unknown-body-field": (body(note="x"), "a field that no body of this kind has"),
        "missing-body-field": (Pen().line("open", without).data, "a field is missing"),
        "body-of-another-kind": (Pen().line("policy", OPENED).data, "the fields of another kind"),
        "text-for-number": (body(epsilon="6"), '"6" is not 6'),
        "boolean-for-integer": (body("settle", {"charge_seq": True, "steps": 1}), "true is not 1"),
        "fraction-for-integer": (body("settle", {"charge_seq": 1.5, "steps": 1}), "an integer is needed"),
        "negative": (body(epsilon=-1), "ε is not negative"),
        "release-flag": (body("release", RELEASED, counts=1), "1 is not true"),
        "audit-of-more-right-than-guessed": (
            body("audit", {**AUDIT, "correct": 41}),
            "no more guesses are right than were made",
        ),
        "delta-of-one": (body(delta=1), "δ is below 1"),
        "upper-case-digest": (body(policy=hex_of("policy").upper()), "digests are lower-case hexadecimal"),
        "long-name": (body(asset="a" * 65), "a name has at most 64 characters"),
        "seq-zero": (Pen().line("open", OPENED, seq=0).data, "entries are numbered from 1"),
        "no-such-day": (Pen().line("open", OPENED, time="2026-02-30T08:00:00.000Z").data, "a day that does not exist"),
        "time-zone": (Pen().line("open", OPENED, time="2026-03-01T08:00:00.000+00:00").data, "UTC is written Z"),
        "no-milliseconds": (Pen().line("open", OPENED, time="2026-03-01T08:00:00Z").data, "milliseconds are written"),
        "short-signature": (Pen().line("open", OPENED, sig="ab").data, "a signature has 128 hexadecimal digits"),
        "event-of-nothing": (body("charge", CHARGED, event={"kind": "laplace"}), "an event that does not exist"),
        "sampling-rate": (body("charge", CHARGED, event={**DP_SGD, "sampling_rate": 1.5}), "q is at most 1"),
        "purpose": (body("charge", CHARGED, purpose="curiosity"), "a purpose that does not exist"),
    })  # fmt: skip
    yield from of_step(4, 2, {
        "gap": (Pen().line("open", OPENED).line("open", OPENED, seq=3).data, "2 is missing"),
        "repeated": (first.data + line + b"\n", "the first line again"),
    })  # fmt: skip
    yield Vector("bad-4-starts-at-two", Pen().line("open", OPENED, seq=2).data, "1 is missing", 4, 1)
    elsewhere = genesis("south", KEY.public).sha256
    yield Vector("bad-5-other-name", Pen().line("open", OPENED, prev=elsewhere).data, "genesis of another name", 5, 1)
    yield Vector("bad-5-other-key", Pen(key=OTHER).line("open", OPENED).data, "genesis of another key", 5, 1)
    yield Vector("bad-5-zeros", Pen().line("open", OPENED, prev="0" * 64).data, "the first prev is the genesis", 5, 1)
    edited = Pen().line("open", {**OPENED, "epsilon": 9.0})
    second = Pen(data=edited.data, seq=1)
    second.prev = first.prev
    yield Vector(
        "bad-5-edited-before", second.line("policy", {"digest": hex_of("x"), "reason": ""}).data,
        "line 1 was edited and signed anew; line 2 still names the old one", 5, 2,
    )  # fmt: skip
    unsigned = {name: value[name] for name in ("seq", "time", "kind", "body", "prev")}
    for name, sig, why in (
        ("other-key", OTHER.sign(DOMAIN, canonical_bytes(unsigned)), "signed by another key"),
        ("other-label", KEY.sign("answer", canonical_bytes(unsigned)), "signed under another label"),
        ("zeros", bytes(64), "no signature"),
    ):
        yield Vector(f"bad-6-{name}", Pen().line("open", OPENED, sig=sig.hex()).data, why, 6, 1)
    raised = canonical_bytes({**value, "body": {**OPENED, "epsilon": 9.0}})
    yield Vector("bad-6-edited", raised + b"\n", "a budget was raised without signing anew", 6, 1)
    back = Pen().line("open", OPENED).line("open", {**OPENED, "asset": "ward"}, time="2026-03-01T07:59:59.999Z")
    yield Vector("bad-7-time-goes-back", back.data, "a millisecond before the entry before", 7, 2)
    yield from contradictions()


def contradictions() -> Iterator[Vector]:
    """Step 8: the last line does not fit those before."""
    south = {"south": head(8, "south 8")}
    once = begun().line("witness", witness(1, south))
    told = charged().head()
    after = charged().line("witness", witness(1, {SITE: told}))
    gaussian = {"kind": "gaussian", "noise_multiplier": 20.5}
    rejected = begun().line("reject", {"study": STUDY, "name": "sepsis", "by": "Dr Ono", "reason": ""})
    cases: dict[str, tuple[Pen, str]] = {
        "no-reason": (Pen().line("open", OPENED).line("open", {**OPENED, "epsilon": 9.0}), "a budget changed silently"),
        "approved-unopened": (Pen().line("approve", APPROVED), "approved for an asset that was never opened"),
        "charged-unapproved": (Pen().line("open", OPENED).line("charge", CHARGED), "charged without an approval"),
        "charged-rejected": (rejected.line("charge", CHARGED), "charged after the approval was withdrawn"),
        "other-name": (begun().line("charge", {**CHARGED, "name": "falls"}), "charged under another name"),
        "other-delta": (begun().line("charge", {**CHARGED, "delta": 0.001}), "charged at another δ than the budget's"),
        "less-noise": (begun().line("charge", {**CHARGED, "event": {**DP_SGD, "noise_multiplier": 1.4}}), "another σ"),
        "other-rate": (begun().line("charge", {**CHARGED, "event": {**DP_SGD, "sampling_rate": 0.1}}), "another q"),
        "more-steps": (begun().line("charge", {**CHARGED, "event": {**DP_SGD, "steps": 6}}), "more steps than planned"),
        "round-beyond": (begun().line("charge", {**CHARGED, "round": 4}), "round 4 of 3"),
        "round-zero": (begun().line("charge", {**CHARGED, "round": 0}), "training begins with round 1"),
        "count-in-a-round": (begun().line("charge", {**COUNTED, "round": 1}), "patients are counted in round 0"),
        "attempt-left-out": (begun().line("charge", {**CHARGED, "attempt": 2}), "attempt 2 without attempt 1"),
        "attempt-repeated": (charged().line("charge", CHARGED), "attempt 1 a second time"),
        "charged-uncounted": (
            Pen().line("open", OPENED).line("approve", APPROVED).line("charge", CHARGED), "patients not yet charged"
        ),
        "not-private": (begun().line("charge", {**CHARGED, "event": {"kind": "non-private"}}), "not the plan's event"),
        "unplanned-evaluation": (
            begun(OLD_PLAN).line("charge", {**EVALUATED, "event": gaussian}), "the plan has no evaluation"
        ),
        "settled-nothing": (begun().line("settle", {"charge_seq": 2, "steps": 1}), "entry 2 is no charge"),
        "settled-later": (begun().line("settle", {"charge_seq": 4, "steps": 1}), "it settles itself"),
        "settled-too-much": (charged().line("settle", {"charge_seq": 4, "steps": 6}), "6 steps of 5"),
        "settled-twice": (
            charged().line("settle", {"charge_seq": 4, "steps": 5}).line("settle", {"charge_seq": 4, "steps": 0}),
            "settled a second time",
        ),
        "witnessed-twice": (once.line("witness", witness(1, south)), "the record of a round is witnessed once"),
        "witnessed-earlier": (
            begun().line("witness", witness(2, south)).line("witness", witness(1, {})), "a round before the last one"
        ),
        "head-goes-back": (
            begun().line("witness", witness(1, south)).line("witness", witness(2, {"south": head(7, "south 7")})),
            "the ledger of south went back",
        ),
        "head-stands-still": (
            begun().line("witness", witness(1, south)).line("witness", witness(2, south)),
            "every round adds entries to a participant's ledger",
        ),
        "head-contradicts": (
            begun().line("witness", witness(1, south)).line("witness", witness(1, {"south": head(8, "other")}, LATER)),
            "two different entries 8 of south",
        ),
        "own-head-false": (
            charged().line("witness", witness(1, {SITE: {**told, "sha256": hex_of("another")}})),
            "a head of this ledger that is no entry of it",
        ),
        "own-head-future": (charged().line("witness", witness(1, {SITE: head(5, "itself")})), "an entry not yet there"),
        "own-head-uncharged": (
            charged().line("witness", witness(1, {SITE: begun().head()})), "a head before the charge for that round"
        ),
        "counted-after-next-record": (
            begun().line("witness", witness(1, {})).line("witness", witness(2, south)).line("charge", EVALUATED),
            "counts of round 1 after the record of round 2",
        ),
        "charged-after-record": (after.line("charge", {**CHARGED, "attempt": 2}), "a round whose record was witnessed"),
    }  # fmt: skip
    for name, (pen, why) in cases.items():
        yield Vector(f"bad-8-{name}", pen.data, why, 8, pen.seq)


def vectors() -> list[Vector]:
    return [*good(), *bad()]


def schema() -> dict[str, Any]:
    """JSON Schema of a line of any kind; what it cannot say stands in README.md."""
    names, made = models_json_schema([(model, "validation") for model in KINDS.values()])
    envelope = Envelope.model_json_schema()["properties"]
    kinds = [
        {
            "type": "object",
            "title": kind,
            "properties": {**envelope, "kind": {"const": kind}, "body": names[model, "validation"]},
            "required": ["seq", "time", "kind", "body", "prev", "sig"],
            "additionalProperties": False,
        }
        for kind, model in KINDS.items()
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "An entry of a Consilium ledger",
        "oneOf": kinds,
        "$defs": made["$defs"],
    }


def write(folder: Path) -> None:
    for old in folder.glob("*.jsonl"):
        old.unlink()
    index = []
    for each in vectors():
        (folder / f"{each.name}.jsonl").write_bytes(each.data)
        index.append({
            "file": f"{each.name}.jsonl", "site": each.site, "identity": each.identity,
            "verdict": "good" if each.step is None else "bad", "step": each.step, "line": each.line, "why": each.why,
        })  # fmt: skip
    for name, value in (("index.json", index), ("schema.json", schema())):
        (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
