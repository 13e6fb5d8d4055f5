"""One study's run at the SuperLink: start it, hold it, send messages, receive replies one by one.

The process of the study is itself the ServerApp: it starts a run, acquires that run's task from the SuperLink's
private side, keeps its lease alive and ends it. No SuperExec starts it and no app bundle is ever unpacked; the
bundle that Flower demands names packages that both ends have installed.

Leans on these internals of flwr 1.41 (pinned): ``HttpGrid`` (its ``push_messages``, ``get_nodes`` and the
``_client`` behind them), ``RuntimeHttpClient`` with the task-token and SuperExec interceptors, ``HeartbeatSender``,
``TaskIdentity``, ``PullMessages``/``PullObject``. ``HttpGrid._try_push_messages`` is replaced.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SubStatus
from flwr.common.serde import message_to_proto, run_from_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest
from flwr.proto.fab_pb2 import Fab as FabProto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from consilium_server.superlink.control import open_control
from consilium_server.superlink.settings import SuperLinkSettings, set_flower_environment
from consilium_shared.errors import TransportError
from consilium_shared.files import write_atomically
from consilium_shared.transport.long_polling import Waits
from consilium_shared.transport.objects import (
    BYTES,
    INLINE_BYTES,
    ReplyUnusable,
    decode,
    header_record,
    payload_record,
    push,
)
from consilium_shared.transport.upload import Upload

logger = logging.getLogger(__name__)

UPLOADING_S = 0.05
"""Seconds between the first two looks for the rest of a reply that its site uploads; then twice as long each time."""

_BUNDLE = {
    "pyproject.toml": b"""
[project]
name = "consilium"
version = "1.0.0"
description = "Names packages that are installed at both ends; carries no code."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "consilium"

[tool.flwr.app.components]
serverapp = "consilium_server.study.main:app"
clientapp = "consilium_client.transport.courier:app"
"""
}


@dataclass(frozen=True)
class Reply:
    """One reply of a site.

    Attributes:
        question: message id of the question that it answers.
        header, payload: unverified bytes, the payload to be closed by whoever takes it; empty when there is a problem.
        problem: None, ``lost`` or ``unavailable`` (worth asking again), ``crashed`` or ``malformed``.
    """

    question: str
    header: bytes
    payload: Upload
    problem: str | None = None


class StudyGrid(HttpGrid):
    """Flower's grid for one run, which hands replies out one by one and never signals the process.

    The stock grid fetches every reply before it returns the first, and its retries end the process on a 401.
    """

    def __init__(self, client: RuntimeHttpClient, run: Run, lost: threading.Event, waits: Waits) -> None:
        """``waits``: the client's, of its looks for replies."""
        super().__init__(token="-")  # noqa: S106 - the client has it; the stock constructor wants one
        self._client = client
        self.set_run(run)
        self._lost, self._waits = lost, waits
        self._announced: deque[_Incoming] = deque()
        self._in_vain = 0

    def check(self) -> None:
        """Raise TransportError when the SuperLink has ended this run."""
        if self._lost.is_set():
            raise TransportError("The SuperLink ended this study's run. Resume the study from its checkpoint.")

    def activations(self) -> dict[int, str]:
        """Node id -> when it connected, for every SuperNode that is connected now."""
        return {node.node_id: node.last_activated_at for node in self.get_nodes() if node.status == "online"}

    def receive(self, questions: set[str], payload_bytes: int, spool: Path, seconds: float = 0.0) -> Iterator[Reply]:
        """Yield the replies that are complete now, each fetched, and removed from the SuperLink, only in its turn.

        A reply that its site is still uploading is taken up again, by a later call, where it stood.

        Args:
            questions: message ids that are still open.
            payload_bytes: largest payload.
            spool: folder for large payloads.
            seconds: for which to wait for a reply where there is none.
        """
        self._waits.held, self._waits.seconds = False, 0.0 if self._announced else seconds
        # The SuperLink forgets a message as soon as it has announced the reply: asked again, it calls it lost.
        silent = questions - {incoming.question for incoming in self._announced}
        if silent:
            found = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=silent))
            for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                question = message.metadata.reply_to_message_id
                self._announced.append(_Incoming(question, tree, payload_bytes, spool))
        for _ in range(len(self._announced)):
            incoming = self._announced[0]
            try:
                reply = incoming.reply = incoming.reply or self._fetch(incoming)
            except _Uploading:
                self._announced.rotate(-1)  # the others need not wait for it
                continue
            self._discard(incoming.tree)
            self._announced.popleft()
            yield reply

    def _try_push_messages(self, run_id: int, messages: Iterable[Message]) -> list[str]:
        """Push messages as Flower's grid does, but make no content before its turn."""
        messages = list(messages)
        objects = {each: found for message in messages for each, found in get_all_nested_objects(message).items()}
        request = PushAppMessagesRequest(
            messages_list=[message_to_proto(remove_content_from_message(message)) for message in messages],
            message_object_trees=[get_object_tree(message) for message in messages],
        )
        pushed = self._runtime_client.PushMessages(request)

        def send(object_id: str, content: bytes) -> None:
            self._runtime_client.PushObject(
                PushObjectRequest(
                    node=self.node,
                    run_id=run_id,
                    session_id=pushed.session_id,
                    object_id=object_id,
                    object_content=content,
                )
            )

        push(objects, frozenset(pushed.objects_to_push), send)
        return list(pushed.message_ids)

    def pause(self, seconds: float) -> None:
        """Pause before the next look; none where the last one waited, a short one while a reply is on its way."""
        if self._announced:
            time.sleep(min(seconds, UPLOADING_S * 2**self._in_vain))
            self._in_vain += 1
        elif not self._waits.held:
            time.sleep(seconds)

    def forget(self) -> None:
        """Drop what was announced and never fetched, so that it stays neither here nor in the SuperLink's store."""
        for incoming in self._announced:
            incoming.payload.close()
        while self._announced:
            self._discard(self._announced[0].tree)
            self._announced.popleft()

    def _fetch(self, incoming: _Incoming) -> Reply:
        try:
            while True:
                request = PullObjectRequest(node=self.node, run_id=self.run.run_id, object_id=incoming.wanted)
                response = self._runtime_client.PullObject(request)
                gc.collect(1)  # httpx's response with its 5 MiB is a cycle: two dozen of them would wait to be found
                if not response.object_found:
                    raise ReplyUnusable("lost")
                if not response.object_available:
                    raise _Uploading
                self._in_vain = 0
                incoming.wanted = incoming.objects.send(response.object_content)
        except StopIteration as complete:
            return Reply(incoming.question, complete.value.header, incoming.payload)
        except ReplyUnusable as failure:
            incoming.payload.close()
            return Reply(incoming.question, b"", Upload(incoming.spool), failure.problem)

    def _discard(self, tree: ObjectTree) -> None:
        self._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=self.run.run_id, message_object_id=tree.object_id)
        )


class _Uploading(Exception):
    """A reply whose site is still uploading it."""


class _Incoming:
    """A reply that the SuperLink has announced, as far as it was fetched; ``reply`` once that is done."""

    def __init__(self, question: str, tree: ObjectTree, payload_bytes: int, spool: Path) -> None:
        self.question = question
        self.tree = tree
        self.spool = spool
        self.reply: Reply | None = None
        self.payload = Upload(spool)
        self.objects = decode(tree, payload_bytes, self.payload)
        self.wanted = next(self.objects)


def content_of(
    header: bytes, payload: bytes | Upload, shared: dict[int, ArrayRecord], compact: bool = False
) -> RecordDict:
    """A message's content; ``shared`` makes one array of one payload object, so that it is sent and stored once.

    Args:
        payload: in memory, or in a file that is open until the message is sent.
        compact: for a site that reads compact messages; a small payload is then stored with each site's header.
    """
    size = payload.size if isinstance(payload, Upload) else len(payload)
    beside = compact and size <= INLINE_BYTES
    carried = (payload.read() if isinstance(payload, Upload) else payload) if beside else b""
    content = RecordDict({"header": header_record(header, carried if compact else None)})
    if size and not beside:
        if id(payload) not in shared:
            shared[id(payload)] = (
                payload_record(payload)
                if isinstance(payload, Upload)
                else ArrayRecord({"payload": Array(dtype="uint8", shape=(size,), stype=BYTES, data=payload)})
            )
        content["payload"] = shared[id(payload)]
    return content


@contextlib.contextmanager
def open_grid(settings: SuperLinkSettings, noted: Path | None = None) -> Iterator[StudyGrid]:
    """Start a run, become its ServerApp, and end it with the block: completed, or failed on an exception.

    Args:
        noted: file that keeps the run's number. A run that stands there was left by a killed process: it is ended, so
            that no SuperNode waits for the rest of a message that nobody will send.

    Raises:
        TransportError: the SuperLink does not answer or refuses.
        ConfigurationError: no SuperLink was ever started in this home.
    """
    set_flower_environment(settings)
    token = _start_and_acquire(settings, noted)
    waits = Waits("/v1/runtime/pull-messages", 0.0)
    client = _runtime_client(settings, waits, RuntimeTokenHttpInterceptor(token=token))
    lost = threading.Event()
    heartbeats = HeartbeatSender(lambda: _send_heartbeat(client, lost))
    status, details = SubStatus.FAILED, "the study ended early"
    try:
        try:
            heartbeats.start()
            started = client.PullTaskInput(PullTaskInputRequest())
        except httpx.HTTPError as error:
            raise TransportError(f"The SuperLink did not start the study's run ({type(error).__name__}).") from None
        # Where Flower's Message takes its run and its sender from: one run per process.
        TaskIdentity.task_id, TaskIdentity.run_id = started.task_id, started.run.run_id
        TaskIdentity.node_id = started.context.node_id
        yield StudyGrid(client, run_from_proto(started.run), lost, waits)
        status, details = SubStatus.COMPLETED, ""
    finally:
        with contextlib.suppress(httpx.HTTPError):
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
        if heartbeats.is_running:
            heartbeats.stop()
        client._client.close()
        with contextlib.suppress(TransportError), open_control(settings) as control:
            control.ListRuns(ListRunsRequest())  # Flower empties the store of ended runs when it lists them


def _start_and_acquire(settings: SuperLinkSettings, noted: Path | None) -> str:
    """Start a run, after the end of the one that is noted, and return the token of its task."""
    bundle, _ = build_fab_from_files(_BUNDLE)
    secret = SuperExecAuthHttpInterceptor(
        master_secret=settings.superexec_secret(),
        protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}),
    )
    # Two starters at once could each acquire the other's task.
    lock = os.open(settings.directory / "start.lock", os.O_WRONLY | os.O_CREAT, 0o600)
    with os.fdopen(lock, "w"), open_control(settings) as control:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if noted is not None and noted.exists():
            with contextlib.suppress(ValueError, httpx.HTTPStatusError, TransportError):  # it has ended, or is unknown
                control.StopRun(StopRunRequest(run_id=int(noted.read_text())))
        run_id = control.StartRun(StartRunRequest(fab=FabProto(content=bundle))).run_id
        if noted is not None:
            write_atomically(noted, str(run_id).encode())
        runtime = _runtime_client(settings, secret)
        try:
            while True:
                acquired = runtime.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"]))
                if not acquired.token:
                    raise TransportError(f"The SuperLink did not hand out the task of run {run_id}.")
                if acquired.task.run_id == run_id:
                    return str(acquired.token)
                logger.warning("stopped run %d: its starter died before it began", acquired.task.run_id)
                control.StopRun(StopRunRequest(run_id=acquired.task.run_id))
        finally:
            runtime._client.close()


def _runtime_client(settings: SuperLinkSettings, *access: Any) -> RuntimeHttpClient:
    # Without a retry invoker: Flower's own sends SIGINT to this process on a 401 and never gives up otherwise.
    return RuntimeHttpClient.from_server_address(
        server_address=settings.private_address,
        insecure=False,
        root_certificates=settings.ca_certificate.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"), *access],
    )


def _send_heartbeat(client: RuntimeHttpClient, lost: threading.Event) -> bool:
    """Keep the lease; False makes Flower's sender try again soon."""
    try:
        alive = client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
    except httpx.HTTPStatusError as error:
        alive = error.response.status_code >= 500
        if alive:
            return False
    except httpx.HTTPError:
        return False
    if not alive:
        lost.set()
    return True
