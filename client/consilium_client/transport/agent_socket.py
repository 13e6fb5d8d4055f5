"""The agent's Unix sockets: how a message and its answer are framed, for both ends.

Two services, both gRPC over a Unix socket (mode 0600) with plain bytes, no protobuf:

    /consilium.Agent/Exchange   stream -> stream   first chunk: the header; then the payload in pieces
                                                   of at most ``limits.CHUNK_BYTES``; the answer likewise
    /consilium.Admin/Call       bytes -> bytes     local administration, on a socket of its own

Whoever may open the socket file may speak: the operating system's file permissions are the only guard, which is
why the sockets never listen on a network and why every message carries its own signature.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any, TypeVar

import grpc

from consilium_shared import limits
from consilium_shared.errors import ConfigurationError, PeerError, TransportError
from consilium_shared.transport.upload import Upload

logger = logging.getLogger(__name__)

EXCHANGE = "/consilium.Agent/Exchange"
ADMIN = "/consilium.Admin/Call"
SOCKET_PATH_BYTES = 100
"""Longest path of a socket file: the kernel's bound is 107 bytes (sun_path), some of them for gRPC."""

Handler = Callable[[bytes, bytes], tuple[bytes, Iterable[bytes]]]
"""(header, payload) of a message -> header of its answer, and its payload in pieces as ``cut`` makes them."""

Answer = TypeVar("Answer")

_OPTIONS = [
    ("grpc.max_receive_message_length", max(limits.CHUNK_BYTES, limits.HEADER_BYTES) + 1024),
    ("grpc.max_send_message_length", max(limits.CHUNK_BYTES, limits.HEADER_BYTES) + 1024),
    ("grpc.enable_http_proxy", 0),
]
_ADMIN_OPTIONS = [
    ("grpc.max_receive_message_length", 4 * limits.FILE_BYTES),
    ("grpc.max_send_message_length", 4 * limits.FILE_BYTES),
    ("grpc.enable_http_proxy", 0),
]


class AgentAway(TransportError):
    """Nobody answers at the socket, or the process behind it went away.

    Attributes:
        delivered: True when the process was there when the message was sent and broke off while handling it.
    """

    def __init__(self, message: str, *, delivered: bool) -> None:
        super().__init__(message)
        self.delivered = delivered


class AgentChannel:
    """The courier's end of the agent's socket. Makes a fresh connection per exchange, so it survives the agent."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def exchange(
        self, header: bytes, payload: bytes, *, timeout: float | None = None, connect_timeout: float = 2.0
    ) -> tuple[bytes, bytes]:
        """Hand one message to the agent and wait for its answer, both in memory; the rest as ``stream`` has it."""
        pieces: list[bytes] = []
        answer = self.stream(header, cut(payload), pieces.append, timeout=timeout, connect_timeout=connect_timeout)
        return answer, b"".join(pieces)

    def stream(
        self,
        header: bytes,
        pieces: Iterable[bytes],
        take: Callable[[bytes], object],
        *,
        timeout: float | None = None,
        connect_timeout: float = 2.0,
    ) -> bytes:
        """Hand one message to the agent piece by piece, and take its answer's payload likewise; returns its header.

        Args:
            header: at most ``limits.HEADER_BYTES``.
            pieces: of the payload, each at most ``limits.CHUNK_BYTES``, together ``limits.PAYLOAD_BYTES``.
            take: given the pieces of the answer's payload in order.
            timeout: seconds for the whole exchange; None waits as long as the agent works.
            connect_timeout: seconds to wait for the socket.

        Raises:
            AgentAway: the agent is not running, or stopped while it handled the message.
            PeerError: the agent refused the message's form, failed, or its answer is malformed.
        """
        with _channel(self._path, _OPTIONS, connect_timeout) as channel:
            call = channel.stream_stream(EXCHANGE)(itertools.chain([header], pieces), timeout=timeout)
            try:
                return _receive(call, take)
            except grpc.RpcError as error:
                raise _peer_failure(error, "agent") from None


def serve(path: Path, handler: Handler) -> grpc.Server:
    """Start the agent's socket service: messages are handled strictly one at a time, in order of arrival.

    An exception in ``handler``, or in the pieces that it returns, ends that one call with a fixed text; its own text
    stays here (it may name data). Pieces are asked for as they go out.

    Args:
        path: socket file; its directory must exist. A stale file is replaced.
        handler: called in one worker thread.

    Raises:
        ConfigurationError: the path is too long, or another process already serves there.
    """

    def exchange(pieces: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            message = _join(pieces, path.parent)
        except PeerError:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "malformed message")
        header, answer = _guarded(lambda: handler(*message), context)
        message = b"", b""  # a model need not stay in memory while the answer is sent
        yield header
        left = iter(answer)
        while (piece := _guarded(lambda: next(left, None), context)) is not None:
            yield piece

    method = grpc.stream_stream_rpc_method_handler(exchange)
    return _start(path, EXCHANGE, method, _OPTIONS)


def serve_admin(path: Path, handler: Callable[[bytes], bytes]) -> grpc.Server:
    """Start the local administration service on a socket of its own. ``handler``: request bytes -> answer bytes.

    Raises:
        ConfigurationError: as for ``serve``.
    """

    def call(request: bytes, context: grpc.ServicerContext) -> bytes:
        return _guarded(lambda: handler(request), context)

    return _start(path, ADMIN, grpc.unary_unary_rpc_method_handler(call), _ADMIN_OPTIONS)


def call_admin(path: Path, request: bytes, *, timeout: float = 30.0) -> bytes:
    """Ask the running agent for local administration.

    Raises:
        AgentAway: no agent is running at this site.
        PeerError: the agent could not handle the request.
    """
    with _channel(path, _ADMIN_OPTIONS, connect_timeout=2.0) as channel:
        try:
            answer: bytes = channel.unary_unary(ADMIN)(request, timeout=timeout)
            return answer
        except grpc.RpcError as error:
            raise _peer_failure(error, "agent's administration") from None


def cut(payload: bytes) -> Iterator[bytes]:
    """A payload in pieces of at most ``limits.CHUNK_BYTES``."""
    view = memoryview(payload)
    for start in range(0, len(view), limits.CHUNK_BYTES):
        yield bytes(view[start : start + limits.CHUNK_BYTES])


def _join(pieces: Iterable[bytes], folder: Path) -> tuple[bytes, bytes]:
    """Put the chunks of one message together again, or raise PeerError when it is empty or too large.

    A large payload waits in a file without a name in ``folder``, so that its chunks and the whole are never in memory
    at once.
    """
    with Upload(folder) as payload:
        header = _receive(pieces, payload.write)
        return header, payload.read()


def _receive(pieces: Iterable[bytes], take: Callable[[bytes], object]) -> bytes:
    """The header of a message, whose payload is taken piece by piece; PeerError when it is empty or too large."""
    received = iter(pieces)
    header = next(received, b"")
    if not header or len(header) > limits.HEADER_BYTES:
        raise PeerError("A message on the agent's socket has no header, or one that is too large.")
    size = 0
    for piece in received:
        size += len(piece)
        if size > limits.PAYLOAD_BYTES:
            raise PeerError(f"A message on the agent's socket is larger than {limits.PAYLOAD_BYTES} bytes.")
        take(piece)
    return header


def _guarded(handle: Callable[[], Answer], context: grpc.ServicerContext) -> Answer:
    try:
        return handle()
    except Exception as error:  # a handler's fault must not end the service, nor carry its text out
        logger.error("the handler failed: %s", type(error).__name__)
        context.abort(grpc.StatusCode.INTERNAL, "the handler failed")
        raise AssertionError("abort always raises") from None


def _start(path: Path, method: str, handler: grpc.RpcMethodHandler, options: list[tuple[str, Any]]) -> grpc.Server:
    service, name = method.lstrip("/").split("/")
    _make_way(path)
    # One worker: training, the ledger and the GPU are one resource, and answers must come in the order asked.
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1), options=options)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {name: handler}),))
    with _private_umask:
        before = os.umask(0o077)  # before the bind: there is no moment at which the socket is open to others
        try:
            bound = server.add_insecure_port(f"unix:{path}")
        except RuntimeError:
            bound = 0
        finally:
            os.umask(before)
    if not bound:
        raise ConfigurationError(f"Cannot open the socket {path}. Check that its directory exists and is writable.")
    server.start()
    return server


_private_umask = threading.Lock()  # the umask belongs to the whole process


def _make_way(path: Path) -> None:
    if len(os.fsencode(path)) > SOCKET_PATH_BYTES:
        raise ConfigurationError(
            f"The socket's path is longer than {SOCKET_PATH_BYTES} bytes: {path}. Choose a shorter home directory."
        )
    if not path.exists():
        return
    try:
        with _channel(path, _OPTIONS, connect_timeout=0.5):
            pass
    except AgentAway:
        path.unlink(missing_ok=True)
    else:
        raise ConfigurationError(f"Another process already serves {path}. Stop it first.")


@contextlib.contextmanager
def _channel(path: Path, options: list[tuple[str, Any]], connect_timeout: float) -> Iterator[grpc.Channel]:
    """A connected gRPC channel to a socket file, closed at the end of the block; AgentAway if nobody answers."""
    # A subchannel shared within the process would remember a dead agent's back-off.
    with grpc.insecure_channel(f"unix:{path}", options=[*options, ("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            if not path.exists():
                raise grpc.FutureTimeoutError
            grpc.channel_ready_future(channel).result(timeout=connect_timeout)
        except grpc.FutureTimeoutError:
            raise AgentAway(f"No agent answers at {path}. Is it running?", delivered=False) from None
        yield channel


def _peer_failure(error: grpc.RpcError, whom: str) -> AgentAway | PeerError:
    code = error.code()
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED):
        return AgentAway(f"The {whom} went away while it handled a message ({code.name}).", delivered=True)
    return PeerError(f"The {whom} could not handle a message ({code.name}).")
