"""Objects in transit at the SuperLink: small ones in memory, large ones on the disk, where nobody else reads them."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidTag
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from tests.support.live_files import nameless

from consilium_server.superlink.objects import LARGE_BYTES, ObjectsInTransit, Shelf

RUN = 1


def message(length: int) -> tuple[RecordDict, dict[str, bytes]]:
    """A message's content with a payload of this length; its objects."""
    payload = (b"payload " * (length // 8 + 1))[:length]
    content = RecordDict({"header": ConfigRecord({"round": 3})})
    content["payload"] = ArrayRecord({"payload": Array(dtype="uint8", shape=(length,), stype="bytes", data=payload)})
    return content, {name: each.deflate() for name, each in get_all_nested_objects(content).items()}


def held(folder: Path) -> list[bytes]:
    return nameless(os.getpid(), folder)


@pytest.mark.parametrize("length", [100, LARGE_BYTES + 1, 7_000_000])
def test_each_object_is_handed_out_as_it_came_and_all_are_gone_with_their_message(tmp_path: Path, length: int) -> None:
    store, (made, objects) = ObjectsInTransit(tmp_path), message(length)
    assert set(store.preregister(RUN, get_object_tree(made))) == set(objects)
    assert {store.get(name) for name in objects} == {b""}, "on their way"
    for name, content in objects.items():
        store.put(name, content)
        store.put(name, content)  # a repetition
    assert {name: store.get(name) for name in objects} == objects
    large = [content for content in objects.values() if len(content) >= LARGE_BYTES]
    assert (len(held(tmp_path)), list(tmp_path.iterdir())) == (len(large), [])
    assert not any(b"payload" in content for content in held(tmp_path))

    store.delete(made.object_id)
    assert (len(store), held(tmp_path), store.get(made.object_id)) == (0, [], None)


def test_other_bytes_than_an_object_is_named_after_are_refused(tmp_path: Path) -> None:
    store, (made, objects) = ObjectsInTransit(tmp_path), message(LARGE_BYTES * 2)
    store.preregister(RUN, get_object_tree(made))
    large = max(objects, key=lambda name: len(objects[name]))
    with pytest.raises(ValueError, match="does not match"):
        store.put(large, objects[large] + b"x")
    assert (store.get(large), held(tmp_path)) == (b"", [])


def test_a_disk_that_takes_nothing_more_costs_memory_and_no_message(tmp_path: Path) -> None:
    store, (made, objects) = ObjectsInTransit(tmp_path), message(LARGE_BYTES * 2)
    store.preregister(RUN, get_object_tree(made))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))  # no file more can be opened
        for name, content in objects.items():
            store.put(name, content)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert held(tmp_path) == []
    assert {name: store.get(name) for name in objects} == objects


def test_what_lies_there_is_not_what_it_was_where_the_disk_changed_a_bit(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    place = shelf.lay(b"an update" * 1000)
    first = os.pread(place.descriptor, 1, 0)
    os.pwrite(place.descriptor, bytes([first[0] ^ 1]), 0)
    with pytest.raises(InvalidTag):
        shelf.read(place)


def test_two_objects_of_the_same_bytes_look_different(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    kept = [shelf.lay(bytes(1000)) for _ in range(2)]
    assert len({*held(tmp_path)}) == 2
    assert {shelf.read(each) for each in kept} == {bytes(1000)}
