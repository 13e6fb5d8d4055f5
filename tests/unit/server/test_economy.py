"""The SuperLink does repeated work once, and what the gate has verified counts for that one request alone."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

import pytest

from consilium_server.superlink.economy import PASSED, SWEEP_S, Passed, found_once, now_and_then, verified_once

KEY, STAMP, SIGNATURE = b"a key", b"a time", b"a signature"
HERE = Passed(KEY, STAMP, SIGNATURE, 7)


def after(passed: Passed | None, work: Any, *arguments: Any) -> Any:
    """What ``work`` returns in a request that the gate has let pass."""

    def run() -> Any:
        PASSED.set(passed)
        return work(*arguments)

    return contextvars.Context().run(run)


@pytest.mark.parametrize(
    ("passed", "asked", "verified"),
    [
        (HERE, (KEY, STAMP, SIGNATURE), []),
        (None, (KEY, STAMP, SIGNATURE), ["parsed a key"]),
        (HERE, (KEY, b"a later time", SIGNATURE), ["parsed a key"]),
        (HERE, (KEY, STAMP, b"another signature"), ["parsed a key"]),
        (HERE, (b"another", STAMP, SIGNATURE), ["parsed another"]),
    ],
)
def test_a_signature_is_verified_unless_the_gate_has_verified_this_very_one(
    passed: Passed | None, asked: tuple[bytes, bytes, bytes], verified: list[str]
) -> None:
    seen: list[str] = []

    def verify(key: str, message: bytes, signature: bytes) -> bool:
        seen.append(key)
        return False

    parse, check = verified_once(lambda data: f"parsed {data.decode()}", verify)
    key, message, signature = asked
    assert after(passed, lambda: check(parse(key), message, signature)) is (not verified)
    assert seen == verified


@pytest.mark.parametrize(("passed", "key", "node"), [(HERE, KEY, 7), (HERE, b"another", 9), (None, KEY, 9)])
def test_a_node_is_looked_up_unless_the_gate_has_found_it_for_this_key(
    passed: Passed | None, key: bytes, node: int
) -> None:
    assert after(passed, found_once(lambda self, wanted: 9), None, key) == node


def test_what_one_request_has_passed_is_nothing_to_the_next_and_to_one_beside_it() -> None:
    look = found_once(lambda self, wanted: 9)

    async def request(passes: bool) -> int | None:
        if passes:
            PASSED.set(HERE)
        await asyncio.sleep(0)
        return look(None, KEY)

    async def all_of_them() -> list[int | None]:
        beside = await asyncio.gather(*(asyncio.create_task(request(passes)) for passes in (True, False)))
        return [*beside, await asyncio.create_task(request(False))]

    assert asyncio.run(all_of_them()) == [7, 9, 9]


def test_overdue_tasks_are_swept_again_and_again_but_not_with_every_request() -> None:
    times, swept = iter([0.0, SWEEP_S / 2, SWEEP_S, SWEEP_S * 1.5, SWEEP_S * 2.5]), []
    sweep = now_and_then(lambda self: swept.append(self), lambda: next(times))
    for number in range(5):
        sweep(number)
    assert swept == [0, 2, 4]
