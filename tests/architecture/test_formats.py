"""Formats are for ever: no key of a released contract schema is lost, gets another default, or appears unmarked."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel

from consilium_client.policy import SitePolicy
from consilium_shared import task
from consilium_shared.identity import Identity
from consilium_shared.protocol import messages
from consilium_shared.schema import SCHEMA, since
from consilium_shared.study import Study

RELEASED: dict[str, dict[str, dict[str, Any]]] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "contracts" / "schema-1.json").read_text()
)


def contract_parts() -> Iterator[type[BaseModel]]:
    """Every class that a contract is made of, those of each task too."""
    yield from parts(Study)
    for own in map(task.get, task.names()):
        yield from parts(own.data)
        for kind in task.kinds(own.name).values():
            yield from parts(kind.options)


def parts(kind: Any) -> Iterator[type[BaseModel]]:
    """A class and those of its fields."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
        for field in kind.model_fields.values():
            yield from parts(field.annotation)
    for argument in getattr(kind, "__args__", ()):
        yield from parts(argument)


def without_later(now: Any, was: Any) -> Any:
    """A default without the later keys of its parts, each of which has a default of its own."""
    if not (isinstance(now, dict) and isinstance(was, dict)):
        return now
    return {key: without_later(value, was[key]) for key, value in now.items() if key in was}


def test_a_key_that_schema_1_lacks_is_marked_with_the_schema_that_brought_it() -> None:
    for part in contract_parts():
        for key in part.model_fields:
            known = key in RELEASED.get(part.__name__, {})
            mark = since(part, key).schema
            if part.__name__ in RELEASED:  # the keys of a new part stand under a key that is marked
                assert known == (mark == 1), f"mark {part.__name__}.{key} as Since({SCHEMA}), see schema.py"
            assert mark <= SCHEMA


def test_no_key_of_schema_1_is_lost_and_no_absence_means_something_new() -> None:
    found = {part.__name__: part for part in contract_parts()}
    for name, keys in RELEASED.items():
        for key, was in keys.items():
            field = found[name].model_fields[key]
            where = f"{name}.{key}"
            assert field.is_required() == was.get("required", False), where
            if not field.is_required():
                default = field.get_default(call_default_factory=True)
                plain = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
                now = json.loads(json.dumps(plain))
                assert without_later(now, was["default"]) == was["default"], where


def test_a_later_key_may_be_absent() -> None:
    for part in contract_parts():
        for key, field in part.model_fields.items():
            assert since(part, key).schema == 1 or not field.is_required(), f"{part.__name__}.{key} needs a default"


# -- messages

MESSAGES = Path(__file__).parents[1] / "vectors" / "messages"
KEYS = {
    side: Identity(Ed25519PrivateKey.from_private_bytes(bytes([number]) * 32))
    for number, side in enumerate(("request", "answer"), 1)
}
"""Everybody knows them: for test vectors and nothing else."""


@pytest.mark.parametrize("file", sorted(MESSAGES.glob("*-*.json")), ids=lambda file: file.stem)
def test_a_message_in_protocol_1_is_the_bytes_that_release_0_1_reads_and_writes(file: Path) -> None:
    side = file.stem.split("-")[0]
    decode = messages.decode_request if side == "request" else messages.decode_answer
    message = decode(file.read_bytes(), KEYS[side].public)
    assert message.protocol == 1
    written = messages.encode(message, KEYS[side], 1)
    assert written == file.read_bytes(), "mark the new field as Since(2), see schema.py"
    later = json.loads(messages.encode(message, KEYS[side]))["body"]
    assert later["protocol"] == SCHEMA


def test_no_kind_of_message_is_lost() -> None:
    kinds = {file.stem for file in MESSAGES.glob("*-*.json")}
    sides = {"request": get_args(messages.Request), "answer": get_args(messages.Answer)}
    expected = {f"{side}-{one.model_fields['kind'].default}" for side, every in sides.items() for one in every}
    assert kinds <= expected


def test_every_program_says_in_which_protocol_it_writes() -> None:
    """The default is for tests: a message of a study is of that study's protocol, an answer of its request's."""
    root = Path(__file__).parents[2]
    calls = [
        (file, node)
        for package in ("server", "client")
        for file in sorted((root / package).rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "messages.encode"
    ]
    assert {file.relative_to(root).parts[0] for file, _ in calls} == {"server", "client"}
    for file, call in calls:
        assert len(call.args) == 3, f"{file}:{call.lineno}: give the protocol"


# -- policies


def test_an_upgrade_permits_nothing_that_nobody_has_decided_on() -> None:
    """A site.yaml that leaves a key out means what it meant under the release for which it was written."""
    file = Path(__file__).parents[1] / "vectors" / "policy" / "defaults.json"
    for key, default in json.loads(file.read_text()).items():
        now = SitePolicy.model_fields[key].get_default(call_default_factory=True)
        assert json.loads(json.dumps(now)) == default, key
