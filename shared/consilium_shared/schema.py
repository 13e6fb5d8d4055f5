"""The number of a format: which keys each has, and how a contract or a message is written out under one.

A contract says its schema, and the messages of a study are of the protocol with the same number: who can read the
contract that was approved can read them. The rules, which hold for ever (``tests/vectors/contracts`` and
``tests/vectors/messages`` guard them):

1. A contract is digested with exactly the keys that it was written with. A key that is present is digested, one that
   is absent is not; no program adds any.
2. An absent key means what it meant before there was such a key: that is the field's default, which never changes.
3. Whoever writes a new study writes every key of its schema out, so that no meaning rests on the reader's release.
4. A key that came after schema 1 is marked ``Since``; a contract of an older schema that has it is refused, and a
   message of an older protocol is written without it.
5. No key is removed or given another meaning. A contract or message of a number that this release does not know is
   refused by that number; one of a number that it knows has no keys that it does not know.

A new key of the contract, or of a message::

    augment_pairs: Annotated[bool, Since(2)] = False                # new studies say false, old ones mean it
    rounding: Annotated[Rounding, Since(2, fresh="up")] = "nearest" # old ones mean nearest, new ones say up
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from consilium_shared.errors import VersionError

OLDEST, SCHEMA = 1, 2
"""The oldest and the newest schema, and protocol, that this release reads; the newest is what it writes."""


@dataclass(frozen=True)
class Since:
    """Mark of a contract's or a message's key: the schema that brought it.

    Attributes:
        schema: the first schema that has the key.
        fresh: what a new study says that does not give the key, where that is not the field's default.
    """

    schema: int
    fresh: Any = None


_ALWAYS = Since(1)


def since(model: type[BaseModel], key: str) -> Since:
    """The mark of one key of a part of the contract; keys of schema 1 have none."""
    return next((mark for mark in model.model_fields[key].metadata if isinstance(mark, Since)), _ALWAYS)


def written_out(part: BaseModel, schema: int) -> dict[str, Any]:
    """A part of a contract, or a message, with every key of that schema, as JSON carries it."""
    content: dict[str, Any] = {}
    for key, value in part.model_dump(mode="json").items():
        mark, found = since(type(part), key), getattr(part, key)
        if mark.schema > schema:
            continue
        if mark.fresh is not None and key not in part.model_fields_set:
            content[key] = mark.fresh
        elif isinstance(found, BaseModel):
            content[key] = written_out(found, schema)
        elif isinstance(found, tuple) and any(isinstance(item, BaseModel) for item in found):
            content[key] = [written_out(item, schema) for item in found]
        elif isinstance(found, dict) and any(isinstance(item, BaseModel) for item in found.values()):
            content[key] = {name: written_out(item, schema) for name, item in found.items()}
        else:
            content[key] = value
    return content


def later_keys(part: BaseModel, schema: int, where: str = "") -> Iterator[tuple[str, int]]:
    """The keys that were given though that schema has none such: their dotted names, and the schema of each."""
    for key in sorted(part.model_fields_set):
        mark, found = since(type(part), key), getattr(part, key)
        if mark.schema > schema:
            yield where + key, mark.schema
        for item in found if isinstance(found, tuple) else (found,):
            if isinstance(item, BaseModel):
                yield from later_keys(item, schema, f"{where}{key}.")


def check_protocol(message: Any) -> None:
    """Raises VersionError for a message, record or card of a protocol that came after this release."""
    number = message.get("protocol") if isinstance(message, dict) else None
    if isinstance(number, int) and number > SCHEMA:
        raise VersionError(
            f"written in protocol {number}; its reader speaks protocols {OLDEST} to {SCHEMA}: upgrade the reader's "
            "Consilium"
        )


def check_known(contract: Any) -> None:
    """Raises VersionError for a contract of a schema that came after this release."""
    number = contract.get("schema_version") if isinstance(contract, dict) else None
    if isinstance(number, int) and number > SCHEMA:
        raise VersionError(
            f"a contract of schema {number}; its reader knows schemas {OLDEST} to {SCHEMA}: upgrade the reader's "
            f"Consilium, or start the study anew with schema_version: {SCHEMA} in its file"
        )
