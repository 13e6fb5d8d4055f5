"""Repeated work of Flower's requests, done once.

Each object of a message is a request of its own, and for each Flower verifies the signature that our gate has just
verified, looks the SuperNode up a second time, sweeps overdue tasks with two writes, counts bytes with a third, and
hands over values that it has at hand through worker threads. None of that decides anything here:

    signature      one that the gate has verified counts as verified for the rest of the same request
    SuperNode      so does the node that the gate has found, and for nothing after that request
    overdue tasks  are swept once a second, not with every request; ``up`` watches the study's process anyway
    bytes          are not counted: nobody reads Flower's count
    dependencies   that only look at the request run where they are, not in a thread

Leans on these internals of flwr 1.41 (pinned): ``node_auth.verify_signature`` and ``.bytes_to_public_key``, looked up
in their module at every request; ``SqlLinkState.get_node_id_by_public_key``, ``.store_traffic`` and
``._cleanup_expired_task_tokens``; the functions named in ``_answer_at_once``; and of FastAPI, that it takes
``run_in_threadpool`` from ``fastapi.dependencies.utils`` at every request.
"""

from __future__ import annotations

import contextvars
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SWEEP_S = 1.0
"""Least seconds between two sweeps of tasks whose heartbeat is overdue."""


@dataclass(frozen=True)
class Passed:
    """A request that the gate has let pass: what it verified, and whose it is.

    Attributes:
        key: the SuperNode's public key, PEM.
        stamp, signature: the signed time, and its signature under ``key``.
        node: id of the SuperNode that is registered with ``key``.
    """

    key: bytes
    stamp: bytes
    signature: bytes
    node: int


PASSED: contextvars.ContextVar[Passed | None] = contextvars.ContextVar("PASSED", default=None)
"""Set by the gate for the request that it lets pass. Each request is a task with a context of its own."""


def save_repeated_work() -> None:
    """Change Flower's functions in this process; to be called once, before its application answers anything."""
    from flwr.server.superlink.linkstate.sql_linkstate import SqlLinkState
    from flwr.superlink.routers.fleet import node_auth

    state: Any = SqlLinkState
    checks: Any = node_auth
    checks.bytes_to_public_key, checks.verify_signature = verified_once(
        checks.bytes_to_public_key, checks.verify_signature
    )
    state.get_node_id_by_public_key = found_once(SqlLinkState.get_node_id_by_public_key)
    state._cleanup_expired_task_tokens = now_and_then(SqlLinkState._cleanup_expired_task_tokens, time.monotonic)
    state.store_traffic = lambda self, run_id, *, bytes_sent, bytes_recv: None
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


def found_once(look: Callable[[Any, bytes], int | None]) -> Callable[[Any, bytes], int | None]:
    """A method like ``look``, public key to node id, that does not look for the SuperNode which the gate has found."""

    def found(self: Any, public_key: bytes) -> int | None:
        passed = PASSED.get()
        return passed.node if passed is not None and passed.key == public_key else look(self, public_key)

    return found


def now_and_then(sweep: Callable[[Any], None], clock: Callable[[], float]) -> Callable[[Any], None]:
    """A method like ``sweep`` that does nothing within ``SWEEP_S`` of its last time; for a class with one object."""
    last = [-SWEEP_S]

    def swept(self: Any) -> None:
        now = clock()
        if now - last[0] >= SWEEP_S:
            last[0] = now
            sweep(self)

    return swept


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
