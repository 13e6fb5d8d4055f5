"""How long an auditor's program takes with the ledger of a busy hospital: many charges, each of another study.

    python tests/bench/auditor.py [--charges 10000] [--near] [--given-back] [--tight] [--accounts]

Makes a ledger of so many charges and one of a quarter as many, and does with each what ``consilium-audit verify`` does
with a ledger by itself: reads it with every signature (step 5), and judges every charge by every limit (step 9). Prints
seconds of processor time, and how many times longer four times as many take: 4 is linear, 16 is quadratic. With
``--accounts`` also what ``consilium-audit budget`` does: the exact ε of each study.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
from rich.console import Console
from rich.table import Table

from consilium_audit.budget import account, check_limits
from consilium_shared.canonical import digest
from consilium_shared.identity import Identity
from consilium_shared.ledger.chain import genesis
from consilium_shared.ledger.entry import line_digest, make_body, sign_entry
from consilium_shared.ledger.verify import verify_ledger
from consilium_shared.privacy import accountant
from consilium_shared.privacy.accountant import epsilon
from consilium_shared.privacy.event import DpSgdEvent

SITE, DELTA, STEPS = "north", 1e-5, 10
Fields = dict[str, object]


def entries(charges: int, near: bool, given_back: bool, tight: bool = False) -> list[tuple[str, Fields]]:
    """Approvals and charges of so many studies, no two alike.

    With ``near`` sampling rates and noise lie close together and follow each other, so that few are far enough apart to
    have a cost of their own; else they are drawn widely, and nearly every study has. With ``given_back`` each charge is
    settled with one step of those charged: the state before every settlement is another one than that after it. With
    ``tight`` each study was approved for what it costs and a thousandth more, as calibrated ones are.
    """
    draw = np.random.default_rng(charges)
    rates = np.exp(draw.uniform(np.log(1e-3), np.log(0.3), charges))
    noise = np.maximum(0.6, rates * np.exp(draw.uniform(-0.7, 0.7, charges)) * np.sqrt(charges * STEPS))
    if near:
        rates, noise = 0.001 + 1e-6 * np.arange(charges), 3.0 + 1e-3 * np.arange(charges)
    opened = {"asset": "icu", "unit": "patient", "epsilon": 50.0, "delta": DELTA, "policy": "1" * 64, "reason": ""}
    found: list[tuple[str, Fields]] = [("open", opened)]
    for i in range(charges):
        how = {"sampling_rate": float(rates[i]), "noise_multiplier": float(noise[i])}
        approved = 50.0
        if tight:
            approved = 1.001 * epsilon([DpSgdEvent(float(rates[i]), float(noise[i]), STEPS)], DELTA)
        about = {"study": digest(b"%d" % i), "name": f"study-{i}", "asset": "icu"}
        plan = {**how, "kind": "dp-sgd", "unit": "patient", "clipping_norm": 1.0, "steps_per_round": STEPS}
        plan |= {"rounds": 1, "delta": DELTA, "epsilon": approved}
        found.append(("approve", {**about, "epsilon": approved, "by": "Dr Ono", "plan": plan}))
        event = {**how, "kind": "dp-sgd", "steps": STEPS}
        found.append(
            ("charge", {**about, "round": 1, "attempt": 1, "event": event, "delta": DELTA, "epsilon_after": 1.0})
        )
        if given_back:
            found.append(("settle", {"charge_seq": len(found), "steps": 1}))
    return found


def ledger(identity: Identity, written: list[tuple[str, Fields]]) -> bytes:
    """A site's ledger with these entries."""
    lines, before = [], genesis(SITE, identity.public).sha256
    for seq, (kind, fields) in enumerate(written, start=1):
        lines.append(sign_entry(seq, "2026-11-30T08:00:00.000Z", make_body(kind, fields), before, identity).line())
        before = line_digest(lines[-1])
    return b"".join(line + b"\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--charges", type=int, default=10_000)
    parser.add_argument("--near", action="store_true", help="studies whose sampling rates and noise lie close together")
    parser.add_argument("--given-back", action="store_true", help="settle each charge with one step")
    parser.add_argument("--tight", action="store_true", help="approve each study for just what it costs")
    parser.add_argument("--accounts", action="store_true", help="also the exact cost of each study")
    asked = parser.parse_args()
    identity, taken = Identity.generate(), {}
    check_limits(
        verify_ledger(ledger(identity, entries(4, asked.near, asked.given_back)), SITE, identity.public)
    )  # loads it all
    table = Table("charges", "ledger, MiB", "reading and verifying, s", "limits, s", "accounts, s")
    for charges in (asked.charges // 4, asked.charges):
        data = ledger(identity, entries(charges, asked.near, asked.given_back, asked.tight))
        accountant._kept.cache_clear()  # each size begins with nothing known
        begun = time.process_time()
        verified = verify_ledger(data, SITE, identity.public)
        read = time.process_time()
        check_limits(verified)
        judged = time.process_time()
        if asked.accounts:
            account(verified)
        taken[charges] = read - begun, judged - read, time.process_time() - judged
        table.add_row(f"{charges:,}", f"{len(data) / 2**20:.1f}", *(f"{each:.2f}" for each in taken[charges]))
    few, many = taken.values()
    table.add_row(
        "times longer", "", *(f"{after / max(before, 1e-3):.1f}" for before, after in zip(few, many, strict=True))
    )
    Console().print(table)


if __name__ == "__main__":
    main()
