"""Flower's objects of a message, one by one: read as they come, made as they go, and no payload held as a whole.

Flower cuts a message into a tree of objects, each named by the SHA-256 of its content; an array becomes chunks of
5 MiB. Ours is a message with one header and at most one payload:

    Message ── RecordDict ─┬─ "header":  ConfigRecord {"header": bytes}
                           └─ "payload": ArrayRecord ── "payload": Array (uint8 [n]) ── chunks

Each object is a request of its own at every hop, so a compact message, of studies from protocol 2 on, carries a small
payload beside the header, and of a large one nothing there. An answer is compact where its question was:

    Message ── RecordDict ── "header": ConfigRecord {"header": bytes, "payload": bytes}

``decode`` says which object is wanted next, and whether what came is what must come; the chunks go on to an ``Upload``,
in the array's order. ``content`` makes a message's content whose chunks are read from an ``Upload`` when they are sent.

Leans on these internals of flwr 1.41 (pinned): ``Array._chunks``, which it makes once; the object forms of ``flwr.app``
(head, children, body; an Array's body in JSON), read with the functions of ``flwr.supercore.inflatable``;
``FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE``; ``flwr.proto`` messages; ``ErrorCode``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK_BYTES
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    add_header_to_object_body,
    get_object_body,
    get_object_head_values_from_object_content,
    get_object_id,
)
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from consilium_shared import limits
from consilium_shared.transport.upload import Upload

BYTES = "bytes"
"""``stype`` of our arrays: Flower carries the data as it is, and no array format is parsed at either end."""

OBJECT_BYTES = limits.HEADER_BYTES + 256 * 1024
"""Largest object that is not a chunk: the header, or the names of all chunks of the largest payload (27 KiB)."""

_PROBLEM_OF_CODE = {
    ErrorCode.NODE_UNAVAILABLE: "unavailable",
    ErrorCode.MESSAGE_UNAVAILABLE: "lost",
    ErrorCode.REPLY_MESSAGE_UNAVAILABLE: "lost",
    ErrorCode.CLIENT_APP_CRASHED: "lost",  # the courier died; it is supervised and comes back
}

INLINE_BYTES = 128 * 1024
"""Largest payload that a compact message carries beside its header."""

Objects = Generator[str, bytes, Any]
"""Yields the id of an object that is wanted, and is sent its content."""


class ReplyUnusable(Exception):
    """A message that cannot be used.

    Attributes:
        problem: ``lost`` or ``unavailable`` (may be asked for again), ``crashed`` or ``malformed``.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


@dataclass(frozen=True)
class Decoded:
    """Header of a message that was read whole.

    Attributes:
        header: unverified bytes.
        compact: whether the message was compact, so that its answer may be.
    """

    header: bytes
    compact: bool


def decode(tree: ObjectTree, payload_bytes: int, payload: Upload) -> Generator[str, bytes, Decoded]:
    """Yield the ids of the objects of a message, one by one, to be sent their contents; return the header.

    The first wanted is the message itself, which is uploaded last: one that is still on its way costs one look.

    Args:
        tree: as the SuperLink announced it; objects outside it are never asked for.
        payload_bytes: largest payload; its chunks are asked for only when the array says that it is no larger.
        payload: takes the payload's bytes.

    Raises:
        ReplyUnusable: the sender's error, or not a message of exactly our form.
        TransportError: the disk does not take the payload.
    """
    try:
        decoded: Decoded = yield from _message(tree, payload_bytes, payload)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, DecodeError):
        raise ReplyUnusable("malformed") from None
    return decoded


def header_record(header: bytes, payload: bytes | None) -> ConfigRecord:
    """Record of a message's header; of a compact message with its small payload, or with b"" for none or a large one.

    >>> sorted(header_record(b"h", None)), sorted(header_record(b"h", b""))
    (['header'], ['header', 'payload'])
    """
    return ConfigRecord({"header": header} if payload is None else {"header": header, "payload": payload})


def content(header: bytes, payload: Upload, compact: bool = False) -> RecordDict:
    """A message's content, to be sent with ``push`` while the payload is open."""
    beside = compact and payload.size <= INLINE_BYTES
    carried = (payload.read() if beside else b"") if compact else None
    found = RecordDict({"header": header_record(header, carried)})
    if payload.size and not beside:
        found["payload"] = payload_record(payload)
    return found


def payload_record(payload: Upload) -> ArrayRecord:
    """Record of a large payload, whose chunks are read when they are sent."""
    parts = [_Part(payload, start) for start in range(0, payload.size, CHUNK_BYTES)]
    record = ArrayRecord({"payload": Array(dtype="uint8", shape=(payload.size,), stype=BYTES, data=b"")})
    record["payload"].__dict__["_chunks"] = [(part.object_id, part) for part in parts]  # the record made a copy
    return record


class _Part(ArrayChunk):
    """A chunk that is read when it is sent, and not kept."""

    def __init__(self, payload: Upload, start: int) -> None:
        self._payload, self._start = payload, start
        self._id = get_object_id(self.deflate())

    @property
    def object_id(self) -> str:
        """The SHA-256 of its content."""
        return self._id

    def deflate(self) -> bytes:
        """Its content: read from the payload each time."""
        return add_header_to_object_body(memoryview(self._payload.piece(self._start, CHUNK_BYTES)), self)


_Part.__qualname__ = ArrayChunk.__qualname__  # which is how Flower's content names the kind


def push(objects: Mapping[str, Any], wanted: Container[str], send: Callable[[str, bytes], object]) -> None:
    """Send the objects that the other end wants one after the other, each made for it and dropped.

    Flower's own function makes the contents of all before it sends the first.

    Args:
        objects: id to object, children before their parents (``get_all_nested_objects``).
        wanted: ids that the other end has not.
        send: given an id and its content.
    """
    for each, found in objects.items():
        if each in wanted:
            send(each, found.deflate())


def _message(tree: ObjectTree, payload_bytes: int, payload: Upload) -> Objects:
    message = MessageProto.FromString(get_object_body((yield from _object(tree, Message)), Message))
    if message.HasField("error"):
        raise ReplyUnusable(_PROBLEM_OF_CODE.get(message.error.code, "crashed"))
    (content,) = tree.children
    records = yield from _named(content, RecordDict)
    if not {"header"} <= records.keys() <= {"header", "payload"}:
        raise ValueError("records")
    record = ConfigRecord.inflate((yield from _object(records["header"], ConfigRecord)))
    header, compact = record["header"], "payload" in record
    if set(record) != {"header", *(["payload"] if compact else [])}:
        raise ValueError("fields")
    if not isinstance(header, bytes) or not 0 < len(header) <= limits.HEADER_BYTES:
        raise ValueError("header")
    if compact and record["payload"] != b"":
        carried = record["payload"]
        if not isinstance(carried, bytes) or len(carried) > min(INLINE_BYTES, payload_bytes) or "payload" in records:
            raise ValueError("payload")
        payload.write(carried)
    if "payload" in records:
        arrays = yield from _named(records["payload"], ArrayRecord)
        if list(arrays) != ["payload"]:
            raise ValueError("arrays")
        yield from _array(arrays["payload"], payload_bytes, payload)
    return Decoded(header, compact)


def _array(tree: ObjectTree, payload_bytes: int, payload: Upload) -> Objects:
    content = yield from _object(tree, Array)
    about = json.loads(get_object_body(content, Array))
    (size,), order = about["shape"], about["arraychunk_ids"]
    if (about["dtype"], about["stype"], type(size)) != ("uint8", BYTES, int) or not 0 <= size <= payload_bytes:
        raise ValueError("array")
    # An array may name a chunk twice, as one of zeros does: no more of them than its size has room for.
    if len(order) != -(-size // CHUNK_BYTES) or set(order) != set(range(len(tree.children))):
        raise ValueError("chunks")
    nodes = {child.object_id: child for child in tree.children}
    chunks = [nodes[each] for each in get_object_head_values_from_object_content(content)[1]]
    for index in order:
        expected = min(CHUNK_BYTES, size - payload.size)
        content = yield from _object(chunks[index], ArrayChunk, CHUNK_BYTES + OBJECT_BYTES)
        body = get_object_body(content, ArrayChunk)
        if len(body) != expected:
            raise ValueError("chunk")
        payload.write(body)


def _named(tree: ObjectTree, kind: type[RecordDict] | type[ArrayRecord]) -> Objects:
    """The nodes below an object that gives each of its children one name, by name."""
    names: Mapping[str, str] = json.loads(get_object_body((yield from _object(tree, kind)), kind))
    nodes = {child.object_id: child for child in tree.children}
    if sorted(names.values()) != sorted(nodes):
        raise ValueError("names")
    return {name: nodes[each] for name, each in names.items()}


def _object(tree: ObjectTree, kind: Any, largest: int = OBJECT_BYTES) -> Objects:
    """The content of one object: what its id is the digest of, with exactly the tree's children; ValueError."""
    content: bytes = yield tree.object_id
    if len(content) > largest or get_object_id(content) != tree.object_id:
        raise ValueError("content")
    _, children, size = get_object_head_values_from_object_content(content)
    if len(get_object_body(content, kind)) != size:
        raise ValueError("size")
    if sorted(children) != sorted(child.object_id for child in tree.children) or len(set(children)) != len(children):
        raise ValueError("children")
    return content
