"""Ask sites, receive their answers: the Flower end of one study.

The process of the study is itself the ServerApp: it starts a run, acquires that run's task from the SuperLink's
private side, keeps its lease alive and ends it. No SuperExec starts it and no app bundle is ever unpacked; the
bundle that Flower demands names packages that both ends have installed.

Sites answer idempotently (asked the same again, a site returns the same bytes), so a question is simply repeated
when a SuperNode restarted, was away, or an answer was lost; the first answer of a site counts.

Leans on these internals of flwr 1.41 (pinned): ``HttpGrid`` (its ``push_messages``, ``get_nodes`` and the
``_client`` behind them), ``RuntimeHttpClient`` with the task-token and SuperExec interceptors, ``HeartbeatSender``,
``TaskIdentity``, ``PullMessages``/``PullObject`` and the object-tree functions of ``flwr.supercore.inflatable``.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import run_from_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest
from flwr.proto.fab_pb2 import Fab as FabProto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    get_object_body,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid
from google.protobuf.message import DecodeError

from consilium_server.superlink import open_control
from consilium_server.superlink_settings import SuperLinkSettings, set_flower_environment
from consilium_shared import limits
from consilium_shared.errors import TransportError

logger = logging.getLogger(__name__)

SUPERLINK_PATIENCE_S = 90.0
"""How long the SuperLink may be away. It ends a study's lease itself after 60 s without a sign of life."""
CENSUS_S = 1.0
"""How often the SuperLink is asked which SuperNodes are connected."""
REPEAT_S = 2.0
"""Least time between two deliveries of one question to one site."""
MESSAGE_TYPE = "train"
BYTES = "bytes"
"""``stype`` of our arrays: Flower carries the data as it is, and no array format is parsed at either end."""

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
serverapp = "consilium_server.app:app"
clientapp = "consilium_client.courier:app"
"""
}


@dataclass(frozen=True)
class Answer:
    """What one site answered, or why there is nothing.

    Attributes:
        site: the site's name.
        header, payload: the answer's bytes, unverified; empty when there is a problem.
        problem: None, or ``unavailable`` (never reached within the time), ``timeout`` (reached, no answer),
            ``crashed`` (the site's software failed), ``malformed`` (an answer of the wrong form or size),
            ``aborted`` (we stopped waiting).
    """

    site: str
    header: bytes
    payload: bytes
    problem: str | None


class StudyGrid(HttpGrid):
    """Flower's grid for one run, which hands replies out one by one and never signals the process.

    The stock grid fetches every reply before it returns the first, and its retries end the process on a 401.
    """

    def __init__(self, client: RuntimeHttpClient, run: Run, lost: threading.Event) -> None:
        super().__init__(token="held by the client")
        self._client = client
        self.set_run(run)
        self._lost = lost
        self._announced: deque[tuple[str, ObjectTree]] = deque()

    def check(self) -> None:
        """Raise TransportError when the SuperLink has ended this run."""
        if self._lost.is_set():
            raise TransportError("The SuperLink ended this study's run. Resume the study from its checkpoint.")

    def activations(self) -> dict[int, str]:
        """Node id -> when it connected, for every SuperNode that is connected now."""
        return {node.node_id: node.last_activated_at for node in self.get_nodes() if node.status == "online"}

    def receive(self, questions: set[str], size: int) -> Iterator[_Reply]:
        """Yield the replies that are complete now, each fetched, and removed from the SuperLink, only in its turn.

        Args:
            questions: message ids that are still open.
            size: most bytes of header and payload together.
        """
        # The SuperLink forgets a message as soon as it has announced the reply: asked again, it calls it lost.
        silent = questions - {question for question, _ in self._announced}
        if silent:
            found = self._runtime_client.PullMessages(PullAppMessagesRequest(message_ids=silent))
            for message, tree in zip(found.messages_list, found.message_object_trees, strict=True):
                self._announced.append((message.metadata.reply_to_message_id, tree))
        for _ in range(len(self._announced)):
            question, tree = self._announced[0]
            try:
                reply = _Reply(question, *_read(self._fetch(tree, size)))
            except _Uploading:
                self._announced.rotate(-1)  # the others need not wait for it
                continue
            except _Failed as failure:
                reply = _Reply(question, b"", b"", failure.problem)
            self._discard(tree)
            self._announced.popleft()
            yield reply

    def forget(self) -> None:
        """Drop what was announced and never fetched, so that it does not stay in the SuperLink's store."""
        while self._announced:
            self._discard(self._announced[0][1])
            self._announced.popleft()

    def _fetch(self, tree: ObjectTree, size: int) -> Message:
        contents: dict[str, bytes] = {}
        room = size + _OVERHEAD_BYTES
        # Sites upload in tree order: backwards, a reply that is still uploading costs a single request.
        for each in reversed(list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))):
            request = PullObjectRequest(node=self.node, run_id=self.run.run_id, object_id=each)
            response = self._runtime_client.PullObject(request)
            if not response.object_found:
                raise _Failed("lost")
            if not response.object_available:
                raise _Uploading
            contents[each] = response.object_content
            room -= len(response.object_content)
            if room < 0:
                raise _Failed("malformed")
        try:
            if _assembled_bytes(contents) > size + _OVERHEAD_BYTES:
                raise _Failed("malformed")
            message = inflate_object_from_contents(tree.object_id, contents)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, DecodeError):
            raise _Failed("malformed") from None
        if not isinstance(message, Message):
            raise _Failed("malformed")
        return message

    def _discard(self, tree: ObjectTree) -> None:
        self._runtime_client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=self.run.run_id, message_object_id=tree.object_id)
        )


@dataclass(frozen=True)
class _Reply:
    question: str
    header: bytes
    payload: bytes
    problem: str | None = None


class _Uploading(Exception):
    """A reply whose site is still uploading it."""


class _Failed(Exception):
    """A reply that cannot be used. ``lost`` and ``unavailable`` may be asked for again."""

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


_OVERHEAD_BYTES = 256 * 1024  # Flower's own objects around header and payload
_PROBLEM_OF_CODE = {
    ErrorCode.NODE_UNAVAILABLE: "unavailable",
    ErrorCode.MESSAGE_UNAVAILABLE: "lost",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "lost",
    ErrorCode.CLIENT_APP_CRASHED: "lost",  # the courier died; it is supervised and comes back
}


def _assembled_bytes(contents: Mapping[str, bytes]) -> int:
    """Bytes that Flower would put together from these objects; an array may name one chunk a million times."""
    total = 0
    for content in contents.values():
        kind, children, _ = get_object_head_values_from_object_content(content)
        if kind == Array.__qualname__:
            indices = json.loads(get_object_body(content, Array))["arraychunk_ids"]
            total += sum(len(contents[children[index]]) for index in indices)
    return total


def _read(message: Message) -> tuple[bytes, bytes]:
    if message.has_error():
        raise _Failed(_PROBLEM_OF_CODE.get(message.error.code, "crashed"))
    records = dict(message.content)
    header_record = records.pop("header", None)
    payload_record = records.pop("payload", None)
    if records or not isinstance(header_record, ConfigRecord) or list(header_record) != ["header"]:
        raise _Failed("malformed")
    header = header_record["header"]
    if not isinstance(header, bytes) or not 0 < len(header) <= limits.HEADER_BYTES:
        raise _Failed("malformed")
    if payload_record is None:
        return header, b""
    if not isinstance(payload_record, ArrayRecord) or list(payload_record) != ["payload"]:
        raise _Failed("malformed")
    array = payload_record["payload"]
    if (array.dtype, array.stype, tuple(array.shape)) != ("uint8", BYTES, (len(array.data),)):
        raise _Failed("malformed")
    return header, array.data


@dataclass
class _Question:
    """A site that has not answered yet."""

    site: str
    node: int
    content: RecordDict
    activation: str | None = None  # the life of the SuperNode that holds our question; None: nobody holds it
    next_push: float = 0.0
    problem: str = "unavailable"


def ask(
    grid: StudyGrid,
    requests: Mapping[str, tuple[bytes, bytes]],
    nodes: Mapping[str, int],
    timeout_s: float,
    *,
    poll_s: float = 0.2,
    payload_bytes: int = limits.PAYLOAD_BYTES,
    on_wait: Callable[[Mapping[str, str]], None] | None = None,
    abort: Callable[[], bool] | None = None,
) -> Iterator[Answer]:
    """Ask every site its question; yield each answer as it arrives, and one ``Answer`` per site in the end.

    A site that is offline is asked as soon as it is back within ``timeout_s``. Between two yields the answers of
    other sites stay in the SuperLink's store, so that at most one is in memory here.

    Args:
        grid: from ``open_grid``.
        requests: site -> (header, payload). One payload *object* given to many sites is sent and stored once.
        nodes: site -> node id, from ``superlink.register_nodes``.
        timeout_s: seconds after which the missing sites are reported.
        poll_s: seconds between two looks.
        payload_bytes: largest payload accepted in an answer.
        on_wait: called before each pause with site -> ``offline`` or ``asked`` for the sites still missing.
        abort: return True to stop waiting.

    Raises:
        TransportError: the SuperLink was away too long, or has ended this study's run.
    """
    shared: dict[int, ArrayRecord] = {}
    waiting = {
        site: _Question(site, nodes[site], _content(header, payload, shared))
        for site, (header, payload) in requests.items()
    }
    asked: dict[str, str] = {}  # message id -> site; a repeated question has several ids
    deadline = time.monotonic() + timeout_s
    patience = _Patience(grid)
    next_census = 0.0
    while waiting and time.monotonic() < deadline:
        if abort is not None and abort():
            for question in waiting.values():
                question.problem = "aborted"
            break
        with patience:
            if time.monotonic() >= next_census:
                _push_due(grid, waiting, asked, grid.activations(), deadline)
                next_census = time.monotonic() + CENSUS_S
            for reply in grid.receive(set(asked), payload_bytes + limits.HEADER_BYTES):
                site = asked.pop(reply.question, "")
                if site not in waiting:
                    continue  # a second answer to a question that was repeated
                if reply.problem in ("lost", "unavailable"):
                    question = waiting[site]
                    question.activation, question.problem = None, "unavailable"
                    question.next_push = time.monotonic() + REPEAT_S
                    continue
                del waiting[site]
                yield Answer(site, reply.header, reply.payload, reply.problem)
        if waiting:
            if on_wait is not None:
                on_wait({each.site: "asked" if each.activation else "offline" for each in waiting.values()})
            time.sleep(min(poll_s, max(0.0, deadline - time.monotonic())))
    with contextlib.suppress(httpx.HTTPError):
        grid.forget()
    for question in waiting.values():
        yield Answer(question.site, b"", b"", question.problem)


def _push_due(
    grid: StudyGrid,
    waiting: Mapping[str, _Question],
    asked: dict[str, str],
    online: Mapping[int, str],
    deadline: float,
) -> None:
    """Send the question to every connected site whose present SuperNode does not hold it."""
    now = time.monotonic()
    due = []
    for question in waiting.values():
        activation = online.get(question.node)
        if activation is not None and activation != question.activation and now >= question.next_push:
            due.append((question, activation))
    if not due:
        return
    # A site that answers after the deadline is refused by the SuperLink, so nothing stale is stored.
    ttl = max(deadline - now, 1.0) + 60.0
    messages = [Message(each.content, each.node, MESSAGE_TYPE, ttl=ttl) for each, _ in due]
    for message_id, (question, activation) in zip(grid.push_messages(messages), due, strict=True):
        question.next_push = now + REPEAT_S
        if message_id:
            asked[message_id] = question.site
            question.activation, question.problem = activation, "timeout"


def _content(header: bytes, payload: bytes, shared: dict[int, ArrayRecord]) -> RecordDict:
    content = RecordDict({"header": ConfigRecord({"header": header})})
    if payload:
        if id(payload) not in shared:
            array = Array(dtype="uint8", shape=(len(payload),), stype=BYTES, data=payload)
            shared[id(payload)] = ArrayRecord({"payload": array})
        content["payload"] = shared[id(payload)]
    return content


class _Patience:
    """Bridges a short absence of the SuperLink; tells an absence from the end of the run."""

    def __init__(self, grid: StudyGrid) -> None:
        self._grid = grid
        self._since: float | None = None

    def __enter__(self) -> None:
        self._grid.check()

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if error is None:
            self._since = None
            return False
        if not isinstance(error, httpx.HTTPError):
            return False
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code < 500:
            raise TransportError(
                f"The SuperLink no longer accepts this study's run (HTTP {error.response.status_code}). "
                "Resume the study from its checkpoint."
            ) from None
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since > SUPERLINK_PATIENCE_S:
            raise TransportError(f"The SuperLink has been away for {SUPERLINK_PATIENCE_S:.0f} s.") from None
        return True


@contextlib.contextmanager
def open_grid(settings: SuperLinkSettings) -> Iterator[StudyGrid]:
    """Start a run, become its ServerApp, and end it with the block: completed, or failed on an exception.

    Raises:
        TransportError: the SuperLink does not answer or refuses.
        ConfigurationError: no SuperLink was ever started in this home.
    """
    set_flower_environment(settings)
    token = _start_and_acquire(settings)
    client = _runtime_client(settings, RuntimeTokenHttpInterceptor(token=token))
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
        yield StudyGrid(client, run_from_proto(started.run), lost)
        status, details = SubStatus.COMPLETED, ""
    finally:
        with contextlib.suppress(httpx.HTTPError):
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
        if heartbeats.is_running:
            heartbeats.stop()
        client._client.close()
        with contextlib.suppress(TransportError), open_control(settings) as control:
            control.ListRuns(ListRunsRequest())  # Flower empties the store of ended runs when it lists them


def _start_and_acquire(settings: SuperLinkSettings) -> str:
    """Start a run and return the token of its task."""
    bundle, _ = build_fab_from_files(_BUNDLE)
    secret = SuperExecAuthHttpInterceptor(
        master_secret=settings.superexec_secret(),
        protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}),
    )
    # Two starters at once could each acquire the other's task.
    with (settings.directory / "start.lock").open("w") as lock, open_control(settings) as control:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run_id = control.StartRun(StartRunRequest(fab=FabProto(content=bundle))).run_id
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


def _runtime_client(settings: SuperLinkSettings, access: Any) -> RuntimeHttpClient:
    # Without a retry invoker: Flower's own sends SIGINT to this process on a 401 and never gives up otherwise.
    return RuntimeHttpClient.from_server_address(
        server_address=settings.private_address,
        insecure=False,
        root_certificates=settings.ca_certificate.read_bytes(),
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr-serverapp"), access],
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
