"""The SuperLink does repeated work once, and what the gate has verified counts for that one request alone."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

import pytest

from consilium_server.superlink.economy import PASSED, Passed, verified_once

KEY, STAMP, SIGNATURE = b"a key", b"a time", b"a signature"
HERE = Passed(KEY, STAMP, SIGNATURE)


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


def test_what_one_request_has_passed_is_nothing_to_the_next_and_to_one_beside_it() -> None:
    parse, check = verified_once(bytes, lambda key, message, signature: False)

    async def request(passes: bool) -> bool:
        if passes:
            PASSED.set(HERE)
        await asyncio.sleep(0)
        return check(parse(KEY), STAMP, SIGNATURE)

    async def all_of_them() -> list[bool]:
        beside = await asyncio.gather(*(asyncio.create_task(request(passes)) for passes in (True, False)))
        return [*beside, await asyncio.create_task(request(False))]

    assert asyncio.run(all_of_them()) == [True, False, False]
