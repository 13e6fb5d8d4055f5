"""The agent's socket: what is handed in comes out, in pieces, and a fault there is one fixed sentence here."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from consilium_client.transport.agent_socket import AgentChannel, Handler, cut, serve
from consilium_shared import limits
from consilium_shared.errors import PeerError


@pytest.fixture
def exchange() -> Iterator[Callable[[Handler, bytes], tuple[bytes, bytes]]]:
    """``exchange(handler, payload)``: one message to an agent that answers so."""
    folder = Path(tempfile.mkdtemp(prefix="sock"))  # short: a socket's path has at most 100 bytes
    servers = []

    def ask(handler: Handler, payload: bytes) -> tuple[bytes, bytes]:
        servers.append(serve(folder / "agent.sock", handler))
        return AgentChannel(folder / "agent.sock").exchange(b"header", payload)

    yield ask
    for server in servers:
        server.stop(grace=None).wait()
    shutil.rmtree(folder)


Exchange = Callable[[Handler, bytes], tuple[bytes, bytes]]


@pytest.mark.parametrize("size", [0, 1, limits.CHUNK_BYTES, 3 * limits.CHUNK_BYTES + 1])
def test_a_message_and_its_answer_arrive_as_they_were_sent(exchange: Exchange, size: int) -> None:
    payload = secrets.token_bytes(size)
    assert exchange(lambda header, body: (b"to " + header, cut(body)), payload) == (b"to header", payload)
    assert {len(piece) for piece in list(cut(payload))[:-1]} <= {limits.CHUNK_BYTES}


def test_an_answer_may_have_no_payload(exchange: Exchange) -> None:
    assert exchange(lambda *_: (b"answer", ()), b"x") == (b"answer", b"")


@pytest.mark.parametrize("pieces", [0, 1, 20])
def test_a_fault_in_the_handler_or_amid_its_pieces_ends_the_exchange_without_its_text(
    exchange: Exchange, pieces: int
) -> None:
    def broken() -> Iterable[bytes]:
        for _ in range(pieces):
            yield bytes(limits.CHUNK_BYTES)
        raise ValueError("Erika Mustermann, born 1964")

    with pytest.raises(PeerError) as failure:
        exchange(lambda *_: (b"answer", broken() if pieces else list(broken())), b"")
    assert "Mustermann" not in str(failure.value)
