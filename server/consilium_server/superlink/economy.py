"""Repeated work of Flower's requests, done once.

Each object of a message is a request of its own, and for each Flower verifies the SuperNode's signature that our gate
has just verified, and hands over values that it has at hand through worker threads. Here a signature that the gate has
verified counts as verified for the rest of the same request and for nothing after it, and dependencies that only look
at the request run where they are.

Leans on these internals of flwr 1.41 (pinned): ``node_auth.verify_signature`` and ``.bytes_to_public_key``, looked up
in their module at every request; the functions named in ``_answer_at_once``; and of FastAPI, that it takes
``run_in_threadpool`` from ``fastapi.dependencies.utils`` at every request.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Passed:
    """Signature of a request that the gate has let pass.

    Attributes:
        key: the SuperNode's public key, PEM.
        stamp, signature: the signed time, and its signature under ``key``.
    """

    key: bytes
    stamp: bytes
    signature: bytes


PASSED: contextvars.ContextVar[Passed | None] = contextvars.ContextVar("PASSED", default=None)
"""Set by the gate for the request that it lets pass. Each request is a task with a context of its own."""


def save_repeated_work() -> None:
    """Change Flower's functions in this process; to be called once, before its application answers anything."""
    from flwr.superlink.routers.fleet import node_auth

    checks: Any = node_auth
    checks.bytes_to_public_key, checks.verify_signature = verified_once(
        checks.bytes_to_public_key, checks.verify_signature
    )
    _answer_at_once()


def verified_once(
    parse: Callable[[bytes], Any], verify: Callable[[Any, bytes, bytes], bool]
) -> tuple[Callable[[bytes], Any], Callable[[Any, bytes, bytes], bool]]:
    """Functions like ``parse`` and ``verify`` that do nothing for what the gate has verified in this request.

    Args:
        parse: PEM to a public key.
        verify: (key, message, signature) to whether it holds.
    """

    def parsed(data: bytes) -> Any:
        passed = PASSED.get()
        return data if passed is not None and passed.key == data else parse(data)

    def verified(key: Any, message: bytes, signature: bytes) -> bool:
        passed = PASSED.get()
        if passed is not None and (key, message, signature) == (passed.key, passed.stamp, passed.signature):
            return True
        return verify(parse(key) if isinstance(key, bytes) else key, message, signature)

    return parsed, verified


def _answer_at_once() -> None:
    """Run those of Flower's dependencies that look at nothing but the request in the loop's own thread."""
    from fastapi.dependencies import utils
    from flwr.supercore.dependencies import runtime
    from flwr.supercore.dependencies.version import VersionDependency
    from flwr.supercore.protobuf.translation import get_protobuf_request
    from flwr.superlink.dependencies.linkstate import get_linkstate

    light = {get_protobuf_request, get_linkstate, runtime.get_runtime_state, runtime.get_runtime_handlers}
    solving: Any = utils
    stock = solving.run_in_threadpool

    async def run(call: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(call, VersionDependency) or call in light:
            return call(*arguments, **named)
        return await stock(call, *arguments, **named)

    solving.run_in_threadpool = run
