"""Empty answers are held back until there may be something; nothing is lost by it, and nobody else is held."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from consilium_shared.transport import long_polling
from consilium_shared.transport.long_polling import LONGEST_SECONDS, WAITS, Holding, Waits

PATH = "/look"


class Store:
    """Application that hands out one thing at a time to each asker; ``between`` is done after each look in vain."""

    def __init__(self) -> None:
        self.things: dict[str, list[bytes]] = {"north": [], "south": []}
        self.status, self.looks = 200, 0
        self.between: Callable[[], None] = lambda: None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        self.looks += 1
        things = self.things[scope["site"]]
        body = things.pop(0) if things else b""
        if not body:
            self.between()
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": body})


class Asker:
    """One request of a site; ``leave`` ends its connection."""

    def __init__(self, site: str = "north", seconds: str | None = "20", path: str = PATH) -> None:
        headers = [] if seconds is None else [(WAITS.encode(), seconds.encode())]
        self.scope = {"type": "http", "path": path, "headers": headers, "site": site}
        self.events: asyncio.Queue[Any] = asyncio.Queue()
        self.events.put_nowait({"type": "http.request", "body": b"", "more_body": False})
        self.sent: list[Any] = []

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def leave(self) -> None:
        self.events.put_nowait({"type": "http.disconnect"})

    def task(self, holding: Holding) -> asyncio.Task[None]:
        async def run() -> None:
            await holding(self.scope, self.events.get, self.send)

        return asyncio.get_running_loop().create_task(run())

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def held(self) -> bool:
        return (WAITS.encode(), b"held") in self.sent[0]["headers"]


def holding(store: Store) -> Holding:
    return Holding(store, {PATH: lambda scope: scope["site"]})


def in_a_loop(work: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await asyncio.wait_for(work(), 20)

    asyncio.run(run())


async def settle() -> None:
    """Everything that can go on without a bell has gone on."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_an_empty_answer_is_held_until_its_own_bell_rings() -> None:
    async def work() -> None:
        store = Store()
        at = holding(store)
        north, south = Asker("north"), Asker("south")
        tasks = [north.task(at), south.task(at)]
        await settle()
        at.ring("south")
        await tasks[1]
        assert (south.body, south.held, north.sent) == (b"", True, [])
        assert store.looks == 2, "the application is asked no oftener than it was asked by the sites"
        at.ring()
        await tasks[0]
        assert north.held

    in_a_loop(work)


def test_what_is_stored_between_a_look_in_vain_and_the_waiting_ends_it_at_once() -> None:
    async def work() -> None:
        store = Store()
        at = holding(store)

        def between() -> None:
            store.things["north"].append(b"late")
            at.ring("north")

        store.between = between
        first, second = Asker(), Asker()
        await first.task(at)
        await second.task(at)
        assert (first.body, first.held, second.body, second.held) == (b"", True, b"late", False)

    in_a_loop(work)


@pytest.mark.parametrize("seconds", [None, "0", "-1", "nan", "soon", "x" * 100_000])
def test_who_does_not_say_that_it_waits_is_answered_at_once(seconds: str | None) -> None:
    async def work() -> None:
        asker = Asker(seconds=seconds)
        await asker.task(holding(Store()))
        assert not asker.held

    in_a_loop(work)


@pytest.mark.parametrize(("status", "things"), [(401, []), (500, []), (200, [b"thing"])])
def test_a_refusal_and_an_answer_with_something_in_it_go_out_at_once(status: int, things: list[bytes]) -> None:
    async def work() -> None:
        store = Store()
        store.status, store.things["north"] = status, things
        asker = Asker()
        await asker.task(holding(store))
        assert (asker.sent[0]["status"], asker.held) == (status, False)

    in_a_loop(work)


def test_other_paths_are_not_held() -> None:
    async def work() -> None:
        asker = Asker(path="/other")
        await asker.task(holding(Store()))
        assert not asker.held

    in_a_loop(work)


def test_whoever_is_gone_is_forgotten_and_loses_nothing() -> None:
    async def work() -> None:
        store = Store()
        at = holding(store)
        gone = Asker()
        task = gone.task(at)
        await settle()
        gone.leave()
        await task
        assert not at._waiting
        store.things["north"].append(b"thing")
        at.ring("north")
        again = Asker()
        await again.task(at)
        assert again.body == b"thing"

    in_a_loop(work)


@pytest.mark.parametrize("said", ["1e300", "inf", str(LONGEST_SECONDS * 2)])
def test_nobody_is_held_for_longer_than_the_bound(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_polling, "LONGEST_SECONDS", 0.01)

    async def work() -> None:
        asker = Asker(seconds=said)
        await asker.task(holding(Store()))
        assert asker.held

    in_a_loop(work)


def test_when_the_server_ends_nobody_is_held_and_nobody_is_any_more() -> None:
    async def work() -> None:
        at = holding(Store())
        held, later = Asker(), Asker()
        task = held.task(at)
        await settle()
        at.stop()
        await task
        await later.task(at)
        assert held.held and not later.held

    in_a_loop(work)


def test_a_bell_may_be_rung_from_any_thread() -> None:
    async def work() -> None:
        at = holding(Store())
        asker = Asker()
        task = asker.task(at)
        await settle()
        await asyncio.get_running_loop().run_in_executor(None, at.ring, "north")
        await task
        assert asker.held

    in_a_loop(work)


# -- the asker's end


class Wire:
    """Answers after so many seconds on a clock of its own, or breaks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.breaks_after = 0.0, 1e9
        self.asked: list[Any] = []
        monkeypatch.setattr(long_polling, "time", SimpleNamespace(monotonic=lambda: self.now))

    def __call__(self, context: Any) -> Any:
        seconds = float(context.request.headers.get(WAITS, "0"))
        self.asked.append(seconds)
        self.now += min(seconds, self.breaks_after) + 0.01  # the way there and back
        if seconds > self.breaks_after:
            raise ConnectionError
        return SimpleNamespace(headers={WAITS: "held"} if seconds else {})


def context(path: str = PATH) -> Any:
    return SimpleNamespace(request=SimpleNamespace(url=SimpleNamespace(path=path), headers={}))


def test_only_the_one_path_is_asked_to_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    wire, waits = Wire(monkeypatch), Waits(PATH)
    waits.intercept(context(), wire)
    assert waits.held
    waits.intercept(context("/other"), wire)
    waits.seconds = 0.0
    waits.intercept(context(), wire)
    assert wire.asked == [LONGEST_SECONDS, 0.0, 0.0] and not waits.held


def test_behind_a_proxy_that_cuts_silent_connections_it_waits_for_less_and_tries_more_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wire, waits = Wire(monkeypatch), Waits(PATH)
    wire.breaks_after = 10.0
    with pytest.raises(ConnectionError):
        waits.intercept(context(), wire)
    for _ in range(2):
        waits.intercept(context(), wire)
    assert wire.asked == pytest.approx([LONGEST_SECONDS, 8.0, 8.8], abs=0.05)
    wire.breaks_after = 1e9
    for _ in range(20):
        waits.intercept(context(), wire)
    assert wire.asked[-1] == LONGEST_SECONDS
