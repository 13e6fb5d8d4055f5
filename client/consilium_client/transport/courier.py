"""The courier: carries a message from the SuperNode to the agent's socket, and the agent's answer back.

    python -m consilium_client.transport.courier --home SITEHOME --runtime-port N

A warm process that takes the place of Flower's SuperExec. It accepts client tasks alone, never looks into the app
bundle, and sees opaque bytes. A message that is not ours never reaches the agent. What goes back when something
fails is one of three fixed sentences; what happened stays in this site's log, which holds sizes and times only.

Leans on these internals of flwr 1.41 (pinned): ``RuntimeHttpClient`` with the task-token and SuperExec
interceptors; ``AcquireTask``/``PullTaskInput``/``PullMessages``/``PullObject`` and their order;
``PushMessages``/``PushObject``; ``HeartbeatSender``; ``TaskIdentity``; the object-tree functions of
``flwr.supercore.inflatable``.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Context, Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, message_from_proto, message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from consilium_client.transport.agent_socket import AgentAway, AgentChannel
from consilium_client.transport.supernode import runtime_files, set_flower_environment
from consilium_shared import limits
from consilium_shared.errors import PeerError, TransportError
from consilium_shared.process import logs
from consilium_shared.transport.large import Asked
from consilium_shared.transport.long_polling import Waits
from consilium_shared.transport.objects import Decoded, ReplyUnusable, content, decode, push
from consilium_shared.transport.upload import Upload

logger = logging.getLogger("courier")

POLL_S = 0.1
"""Seconds between two looks for a task, where the SuperNode does not hold back its answer."""
AWAY_POLL_S = 0.5
AGENT_WAIT_S = 120.0
"""Seconds that a message waits here for an agent that is away, before the coordinator hears of it."""
DELIVERIES = 3
"""Times that one message is given to an agent that dies over it."""
MESSAGE_TYPE = "train"

NOT_OURS = Error(ErrorCode.MOD_FAILED_PRECONDITION, "not a Consilium message")
AGENT_ABSENT = Error(ErrorCode.NODE_UNAVAILABLE, "the site's agent is not running")
AGENT_FAILED = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "the site's agent failed")


class Courier:
    """Takes one task after another from the SuperNode at 127.0.0.1:``runtime_port``."""

    def __init__(self, home: Path, runtime_port: int, *, agent_wait_s: float = AGENT_WAIT_S) -> None:
        self._home = home
        self._address = f"127.0.0.1:{runtime_port}"
        self._agent = AgentChannel(home / "run" / "agent.sock")
        self._spool = home / "run"
        self._agent_wait_s = agent_wait_s

    def run(self) -> None:
        """Work for ever. While the SuperNode is away, look for it again twice a second."""
        away = False
        while True:
            try:
                self._work()
            except (httpx.HTTPError, OSError, TransportError) as error:
                if not away:
                    logger.warning("the SuperNode is away (%s)", type(error).__name__)
                away = True
                time.sleep(AWAY_POLL_S)
            else:
                away = False

    def _work(self) -> None:
        secret = runtime_files(self._home)[2].read_bytes()
        access = SuperExecAuthHttpInterceptor(
            master_secret=secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
        )
        waits = Waits("/v1/runtime/acquire-task")
        with contextlib.closing(self._connect(waits, access)) as supernode:
            while True:
                acquired = supernode.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
                if acquired.token:
                    self._carry(acquired.token)
                elif not waits.held:
                    time.sleep(POLL_S)

    def _carry(self, token: str) -> None:
        """One task: message in, answer out. The SuperNode takes no further message until a reply is there."""
        with contextlib.closing(self._connect(RuntimeTokenHttpInterceptor(token))) as supernode:
            heartbeats = HeartbeatSender(lambda: _send_heartbeat(supernode))
            heartbeats.start()
            try:
                task = supernode.PullTaskInput(PullTaskInputRequest())
                context = context_from_proto(task.context)
                # Where Flower's Message takes its run and its sender from.
                TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, context.run_id
                TaskIdentity.node_id = context.node_id
                question, tree = _announced(supernode)
                with Upload(self._spool) as payload, contextlib.ExitStack() as opened:
                    try:
                        asked = _fetch(supernode, question, tree, context, payload)
                    except PeerError:
                        logger.warning("refused: not a message of ours")
                        reply = Message(NOT_OURS, reply_to=question)
                    else:
                        reply = self._ask_agent(question, asked, payload, opened)
                    _push(supernode, reply, context)
                supernode.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details=""))
            finally:
                if heartbeats.is_running:
                    heartbeats.stop()

    def _ask_agent(self, question: Message, asked: Decoded, payload: Upload, opened: contextlib.ExitStack) -> Message:
        """The agent's answer as a reply; the same message is given again to an agent that was restarted.

        The reply's payload is read from a file that ``opened`` closes.
        """
        started = time.monotonic()
        deliveries = 0
        while True:
            answer = opened.enter_context(Upload(self._spool))
            try:
                said = self._agent.stream(asked.header, payload.pieces(limits.CHUNK_BYTES), answer.write)
            except AgentAway as away:
                answer.close()
                deliveries += away.delivered
                if deliveries >= DELIVERIES:
                    logger.error("the agent stopped %d times over one message", deliveries)
                    return Message(AGENT_FAILED, reply_to=question)
                if time.monotonic() - started > self._agent_wait_s and not away.delivered:
                    logger.error("the agent is away for %.0f s", time.monotonic() - started)
                    return Message(AGENT_ABSENT, reply_to=question)
                time.sleep(0.5)
            except PeerError:
                logger.error("the agent failed on a message")
                return Message(AGENT_FAILED, reply_to=question)
            else:
                sizes = len(asked.header), payload.size, len(said), answer.size
                logger.info("carried %d+%d bytes in, %d+%d out; %.2f s", *sizes, time.monotonic() - started)
                return Message(content(said, answer, asked.compact), reply_to=question)

    def _connect(self, *access: Any) -> RuntimeHttpClient:
        # Without a retry invoker: Flower's own sends SIGINT to this process when the SuperNode forgot a token.
        return RuntimeHttpClient.from_server_address(
            server_address=self._address,
            insecure=False,
            root_certificates=runtime_files(self._home)[0].read_bytes(),
            interceptors=[Asked(), RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"), *access],
        )


def _send_heartbeat(supernode: RuntimeHttpClient) -> bool:
    """Keep the task's lease; whether it was lost shows when the answer is handed back."""
    with contextlib.suppress(httpx.HTTPError):
        supernode.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    return True


def _announced(supernode: RuntimeHttpClient) -> tuple[Message, ObjectTree]:
    """The message of this task, without its content. The SuperNode makes the task a moment before the message."""
    deadline = time.monotonic() + 30
    while True:
        found = supernode.PullMessages(PullAppMessagesRequest())
        if found.messages_list:
            return message_from_proto(found.messages_list[0]), found.message_object_trees[0]
        if time.monotonic() > deadline:
            raise TransportError("The SuperNode handed out a task without a message.")
        time.sleep(0.02)


def _fetch(
    supernode: RuntimeHttpClient, question: Message, tree: ObjectTree, context: Context, payload: Upload
) -> Decoded:
    """The header of the message, whose payload is written as its pieces come from the SuperNode.

    Raises:
        PeerError: larger than our limits, or not of exactly our form.
        TransportError: the SuperNode has given the message up, since its run has ended; no reply is wanted. Or the
            disk is full.
    """
    node = Node(node_id=context.node_id)

    def pull(object_id: str) -> bytes:
        while True:  # the SuperNode may still be downloading it
            pulled = supernode.PullObject(PullObjectRequest(node=node, run_id=context.run_id, object_id=object_id))
            if not pulled.object_found:
                raise TransportError("The SuperNode gave up a message in the middle.")
            if pulled.object_available:
                return bytes(pulled.object_content)
            time.sleep(0.02)

    try:
        if question.metadata.message_type != MESSAGE_TYPE:
            raise ReplyUnusable("malformed")
        objects = decode(tree, limits.PAYLOAD_BYTES, payload)
        wanted = next(objects)
        while True:
            wanted = objects.send(pull(wanted))
    except StopIteration as complete:
        asked: Decoded = complete.value
    except ReplyUnusable:
        for each in dict.fromkeys(part.object_id for part in iterate_object_tree(tree)):
            pull(each)  # the SuperNode takes no confirmation of a message that it has not downloaded
        raise PeerError("not a message of ours") from None
    finally:
        with contextlib.suppress(httpx.HTTPError):
            supernode.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=node, run_id=context.run_id, message_object_id=tree.object_id)
            )
    return asked


def _push(supernode: RuntimeHttpClient, reply: Message, context: Context) -> None:
    """Hand a reply to the SuperNode, object by object."""
    with no_object_id_recompute():
        reply.metadata.__dict__["_message_id"] = reply.object_id
        pushed = supernode.PushMessages(
            PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
            )
        )

        def send(object_id: str, content: bytes) -> None:
            supernode.PushObject(
                PushObjectRequest(
                    node=Node(node_id=context.node_id),
                    run_id=context.run_id,
                    session_id=pushed.session_id,
                    object_id=object_id,
                    object_content=content,
                )
            )

        push(get_all_nested_objects(reply), frozenset(pushed.objects_to_push), send)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``python -m consilium_client.transport.courier``; runs until it is stopped."""
    parser = argparse.ArgumentParser(prog="consilium_client.transport.courier", description="Start the site's courier.")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--runtime-port", type=int, required=True)
    parser.add_argument("--agent-wait", type=float, default=AGENT_WAIT_S, metavar="SECONDS")
    given = parser.parse_args(arguments)
    logs.configure()
    home = given.home.resolve()
    set_flower_environment(home)
    with contextlib.suppress(KeyboardInterrupt):
        Courier(home, given.runtime_port, agent_wait_s=given.agent_wait).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
