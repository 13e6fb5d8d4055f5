"""A reply is taken object by object: exactly our form, every object the one that its id names, nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as CHUNK_BYTES
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from hypothesis import given, settings
from hypothesis import strategies as st

from consilium_server.transport.study_run import content_of
from consilium_shared import limits
from consilium_shared.errors import TransportError
from consilium_shared.transport.objects import INLINE_BYTES, Decoded, ReplyUnusable, content, decode, push
from consilium_shared.transport.upload import IN_MEMORY_BYTES, Upload

LARGE = 3 * CHUNK_BYTES


@dataclass
class Sent:
    """What a site sent: the tree that the SuperLink announces, and the contents that it stores."""

    tree: ObjectTree
    contents: dict[str, bytes]

    def kind(self, kind: str) -> str:
        """Id of the first object of a kind."""
        return next(each for each, content in self.contents.items() if content.startswith(kind.encode() + b" "))


def sent(content: RecordDict | Error) -> Sent:
    metadata = Metadata(1, "", 2, 1, "0" * 64, "", 0.0, 60.0, "train")
    if isinstance(content, Error):
        message = make_message(metadata, error=content)
    else:
        message = make_message(metadata, content=content)
    contents = {each: found.deflate() for each, found in get_all_nested_objects(message).items()}
    return Sent(get_object_tree(message), contents)


def receive(reply: Sent, upload: Upload, largest: int = LARGE) -> tuple[bytes, list[str]]:
    """The header, and the ids that were asked for."""
    wanted: list[str] = []
    objects = decode(reply.tree, largest, upload)
    try:
        wanted.append(next(objects))
        while True:
            wanted.append(objects.send(reply.contents[wanted[-1]]))
    except StopIteration as done:
        return done.value.header, wanted


def problem(reply: Sent, folder: Path, largest: int = LARGE) -> str:
    with Upload(folder) as upload, pytest.raises(ReplyUnusable) as unusable:
        receive(reply, upload, largest)
    return unusable.value.problem


def ours(payload: bytes = b"payload") -> RecordDict:
    return content_of(b"header", payload, {})


def payload_record(payload: bytes, **changes: Any) -> RecordDict:
    fields = {"dtype": "uint8", "shape": (len(payload),), "stype": "bytes", "data": payload, **changes}
    return RecordDict(
        {"header": ConfigRecord({"header": b"header"}), "payload": ArrayRecord({"payload": Array(**fields)})}
    )


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"x",
        secrets.token_bytes(CHUNK_BYTES),
        secrets.token_bytes(2 * CHUNK_BYTES + 1),
        bytes(2 * CHUNK_BYTES),
        bytes(CHUNK_BYTES) + b"x" + bytes(CHUNK_BYTES),
    ],
    ids=["nothing", "a byte", "a chunk", "some chunks", "the same chunk twice", "zeros and a byte"],
)
def test_a_payload_arrives_in_its_order_with_its_size_and_digest(tmp_path: Path, payload: bytes) -> None:
    with Upload(tmp_path) as upload:
        header, wanted = receive(sent(ours(payload)), upload)
        assert (header, upload.size, upload.sha256) == (b"header", len(payload), hashlib.sha256(payload).hexdigest())
        assert upload.read() == payload
    assert len(wanted) == (5 if payload else 3) + -(-len(payload) // CHUNK_BYTES)


@pytest.mark.parametrize("size", [0, 1, INLINE_BYTES, INLINE_BYTES + 1])
def test_a_compact_message_has_three_objects_unless_its_payload_is_large_and_says_that_its_answer_may_be(
    tmp_path: Path, size: int
) -> None:
    data = secrets.token_bytes(size)
    with Upload(tmp_path) as spooled, Upload(tmp_path) as got:
        spooled.write(data)
        message = sent(content(b"header", spooled, compact=True))
        assert message == sent(content_of(b"header", data, {}, compact=True)), "both ends make the same"
        assert message == sent(content_of(b"header", spooled, {}, compact=True)), "of a file as of memory"
        assert sent(content_of(b"header", spooled, {})) == sent(content_of(b"header", data, {}))
        objects = decode(message.tree, LARGE, got)
        wanted = [next(objects)]
        with pytest.raises(StopIteration) as end:
            while True:
                wanted.append(objects.send(message.contents[wanted[-1]]))
        assert (end.value.value, got.read()) == (Decoded(b"header", compact=True), data)
    assert len(wanted) == (3 if size <= INLINE_BYTES else 6)


@pytest.mark.parametrize(
    "fields",
    [
        {"header": b"header", "payload": bytes(INLINE_BYTES + 1)},
        {"header": b"header", "payload": "text"},
        {"header": b"header", "payload": [b"x"]},
        {"header": b"header", "other": b"x"},
        {"header": b"header", "payload": b"x", "other": b"x"},
        {"payload": b"x"},
    ],
    ids=["too large", "text", "a list", "another field", "one field more", "no header"],
)
def test_a_compact_message_of_another_form_is_malformed(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert problem(sent(RecordDict({"header": ConfigRecord(fields)})), tmp_path) == "malformed"


def test_a_compact_message_with_a_payload_beside_its_header_and_another_below_is_malformed(tmp_path: Path) -> None:
    both = payload_record(b"payload")
    both["header"] = ConfigRecord({"header": b"header", "payload": b"payload"})
    assert problem(sent(both), tmp_path) == "malformed"


def test_a_compact_payload_is_no_larger_than_its_reader_permits(tmp_path: Path) -> None:
    assert problem(sent(content_of(b"header", b"payload", {}, compact=True)), tmp_path, largest=6) == "malformed"


@settings(max_examples=30)
@given(size=st.integers(0, 40), piece=st.integers(1, 50))
def test_pieces_have_the_size_asked_for_and_can_be_read_again(
    tmp_path_factory: pytest.TempPathFactory, size: int, piece: int
) -> None:
    payload = bytes(range(size))
    with Upload(tmp_path_factory.getbasetemp()) as upload:
        for start in range(0, size, 7):
            upload.write(payload[start : start + 7])
        first = list(upload.pieces(piece))
        assert b"".join(first) == payload and {len(each) for each in first[:-1]} <= {piece}
        assert list(upload.pieces(piece)) == first


def test_two_readings_do_not_disturb_each_other(tmp_path: Path) -> None:
    with Upload(tmp_path) as upload:
        upload.write(b"abcd")
        assert [one + other for one, other in zip(upload.pieces(1), upload.pieces(2), strict=False)] == [b"aab", b"bcd"]


def open_files(folder: Path) -> list[os.stat_result]:
    """Files below a folder that this process holds open, with or without a name."""
    held = list(Path("/proc/self/fd").iterdir())
    return [each.stat() for each in held if each.exists() and str(each.readlink()).startswith(f"{folder}/")]


def test_a_large_payload_has_a_private_file_without_a_name_and_a_small_one_none(tmp_path: Path) -> None:
    with Upload(tmp_path) as upload:
        upload.write(bytes(IN_MEMORY_BYTES))
        assert open_files(tmp_path) == []
        upload.write(b"x")
        (file,) = open_files(tmp_path)
        assert (stat.S_IMODE(file.st_mode), file.st_nlink) == (0o600, 0)
        assert list(tmp_path.iterdir()) == []
    assert open_files(tmp_path) == []


def test_a_full_disk_is_said_to_the_operator(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    with Upload(folder) as upload, pytest.raises(TransportError, match=r"gone.*Make room"):
        upload.write(bytes(IN_MEMORY_BYTES + 1))


def test_a_payload_above_the_limit_is_refused_before_a_chunk_is_asked_for(tmp_path: Path) -> None:
    reply = sent(ours(secrets.token_bytes(1001)))
    chunk = reply.kind("ArrayChunk")
    del reply.contents[chunk]  # asked for it, ``receive`` would fail
    assert problem(reply, tmp_path, largest=1000) == "malformed"


@pytest.mark.parametrize(
    "content",
    [
        RecordDict({}),
        RecordDict({"header": ConfigRecord({"header": b"h"}), "more": ConfigRecord({"x": 1})}),
        RecordDict({"payload": ArrayRecord({})}),
        RecordDict({"header": ArrayRecord({})}),
        RecordDict({"header": ConfigRecord({"header": b"h", "more": 1})}),
        RecordDict({"header": ConfigRecord({"header": "text"})}),
        RecordDict({"header": ConfigRecord({"header": b""})}),
        RecordDict({"header": ConfigRecord({"header": bytes(limits.HEADER_BYTES + 1)})}),
        RecordDict({"header": ConfigRecord({"header": b"h"}), "payload": ConfigRecord({"payload": b"x"})}),
        RecordDict({"header": ConfigRecord({"header": b"h"}), "payload": ArrayRecord({})}),
        payload_record(b"xx", shape=(1,)),
        payload_record(b"xx", shape=(3,)),
        payload_record(b"xx", shape=(1, 2)),
        payload_record(b"xx", shape=()),
        payload_record(b"", shape=(-1,)),
        payload_record(b"x", shape=(True,)),
        payload_record(b"xx", dtype="int8"),
        payload_record(b"xx", stype="numpy.ndarray"),
    ],
)
def test_another_form_is_malformed(tmp_path: Path, content: RecordDict) -> None:
    assert problem(sent(content), tmp_path) == "malformed"


@pytest.mark.parametrize("kind", ["Message", "RecordDict", "ConfigRecord", "ArrayRecord", "Array", "ArrayChunk"])
@pytest.mark.parametrize("change", [lambda c: c + b"x", lambda c: c[:-1], lambda _: b"", lambda c: b"X" + c[1:]])
def test_an_object_that_its_id_is_not_the_digest_of_is_refused(
    tmp_path: Path, kind: str, change: Callable[[bytes], bytes]
) -> None:
    reply = sent(ours())
    reply.contents[reply.kind(kind)] = change(reply.contents[reply.kind(kind)])
    assert problem(reply, tmp_path) == "malformed"


def replaced(reply: Sent, kind: str, content: bytes) -> Sent:
    """The reply with one object in place of another, all ids above it made right again."""

    def renamed(tree: ObjectTree) -> ObjectTree:
        children = [renamed(child) for child in tree.children]
        changed = reply.contents[tree.object_id]
        if tree.object_id == target:
            changed = content
        for old, new in zip(tree.children, children, strict=True):
            changed = changed.replace(old.object_id.encode(), new.object_id.encode())
        name = hashlib.sha256(changed).hexdigest()
        contents[name] = changed
        return ObjectTree(object_id=name, children=children)

    target, contents = reply.kind(kind), dict[str, bytes]()
    return Sent(renamed(reply.tree), contents)


def array(reply: Sent, order: Any, size: Any) -> bytes:
    """The array of a reply, with other chunks and another size in its body."""
    head = reply.contents[reply.kind("Array")].partition(b"\0")[0].split(b" ")[1]
    body = json.dumps({"dtype": "uint8", "shape": [size], "stype": "bytes", "arraychunk_ids": order}).encode()
    return b"Array %s %d\0%s" % (head, len(body), body)


@pytest.mark.parametrize(
    ("order", "size"),
    [
        ([0] * 1000, LARGE),
        ([0] * 3, 21),
        ([0, 0], 14),
        ([0], 8),
        ([0], 6),
        ([], 7),
        ([-1], 7),
        ([1], 7),
        (["0"], 7),
        ([None], 7),
        ("0", 7),
        (0, 7),
        ([0], "7"),
        ([0], 7.0),
        ([0], None),
    ],
)
def test_an_array_names_each_chunk_as_often_as_its_size_has_room_for(tmp_path: Path, order: Any, size: Any) -> None:
    reply = sent(ours(b"payload"))
    with Upload(tmp_path) as upload:
        assert receive(replaced(reply, "Array", array(reply, [0], 7)), upload)[0] == b"header"
    assert problem(replaced(reply, "Array", array(reply, order, size)), tmp_path) == "malformed"


def test_an_object_outside_the_announced_tree_is_never_asked_for(tmp_path: Path) -> None:
    """Another site's chunk, named by its digest, would otherwise become this site's payload."""
    reply, other = sent(ours(b"mine")), sent(ours(b"hers"))
    mine, hers = reply.kind("ArrayChunk"), other.kind("ArrayChunk")
    content = reply.contents[reply.kind("Array")].replace(mine.encode(), hers.encode())
    changed = replaced(reply, "Array", content)
    with Upload(tmp_path) as upload, pytest.raises(ReplyUnusable, match="malformed"):
        receive(changed, upload)
    assert upload.size == 0


@pytest.mark.parametrize("kind", ["ArrayChunk", "Array", "ConfigRecord"])
@pytest.mark.parametrize("body", [b"", b"\0", b"\xff\xff", b"[]", b"{}", b'"x"', b"null", b"[" * 100_000])
def test_a_body_of_another_form_is_malformed(tmp_path: Path, kind: str, body: bytes) -> None:
    reply = sent(ours())
    head = reply.contents[reply.kind(kind)].partition(b"\0")[0].rpartition(b" ")[0]
    assert problem(replaced(reply, kind, b"%s %d\0%s" % (head, len(body), body)), tmp_path) == "malformed"


@settings(max_examples=200)
@given(
    kind=st.sampled_from(["Message", "RecordDict", "ConfigRecord", "ArrayRecord", "Array", "ArrayChunk"]),
    content=st.binary(max_size=60) | st.builds(lambda n, b: b"%s  %d\0%s" % (n.encode(), len(b), b),
                                               st.sampled_from(["Message", "Array", "RecordDict"]), st.binary()),
)  # fmt: skip
def test_whatever_an_object_holds_it_is_taken_or_malformed(
    tmp_path_factory: pytest.TempPathFactory, kind: str, content: bytes
) -> None:
    assert problem(replaced(sent(ours()), kind, content), tmp_path_factory.getbasetemp()) in ("malformed", "crashed")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (ErrorCode.NODE_UNAVAILABLE, "unavailable"),
        (ErrorCode.REPLY_MESSAGE_UNAVAILABLE, "lost"),
        (ErrorCode.CLIENT_APP_CRASHED, "lost"),
        (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "crashed"),
    ],
)
def test_an_error_says_whether_to_ask_again(tmp_path: Path, code: int, expected: str) -> None:
    assert problem(sent(Error(code, "reason")), tmp_path) == expected


def test_a_message_of_ours_is_made_of_what_flower_makes_of_it() -> None:
    """The kinds that the tests above change are those that a message has."""
    kinds = {content.partition(b" ")[0].decode() for content in sent(ours()).contents.values()}
    assert kinds == {each.__qualname__ for each in (Message, RecordDict, ConfigRecord, ArrayRecord, Array)} | {
        "ArrayChunk"
    }


@pytest.mark.parametrize("size", [0, 1, IN_MEMORY_BYTES + 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 7])
def test_a_message_made_from_an_upload_is_read_back_and_is_what_flower_makes_of_the_bytes(
    size: int, tmp_path: Path
) -> None:
    data = secrets.token_bytes(size)
    with Upload(tmp_path) as sent, Upload(tmp_path) as got:
        sent.write(data)
        metadata = Metadata(1, "", 2, 1, "q", "", 0.0, 60.0, "train")
        message = make_message(metadata, content(b"header", sent))
        contents: dict[str, bytes] = {}
        nested = get_all_nested_objects(message)
        push(nested, set(nested), contents.__setitem__)
        assert list(contents)[-1] == message.object_id, "the message itself comes last"
        stock = get_all_nested_objects(make_message(metadata, content_of(b"header", data, {})))
        assert contents == {each: found.deflate() for each, found in stock.items()}
        objects = decode(get_object_tree(message), size, got)
        wanted = next(objects)
        with pytest.raises(StopIteration) as end:
            while True:
                wanted = objects.send(contents[wanted])
        assert (end.value.value, got.read()) == (Decoded(b"header", compact=False), data)
