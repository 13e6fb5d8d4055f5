"""The contract's schema number: which keys each schema has, and how a study is written out under one.

The rules, which hold for ever (``tests/vectors/contracts`` guards them):

1. A contract is digested with exactly the keys that it was written with. A key that is present is digested, one that
   is absent is not; no program adds any.
2. An absent key means what it meant before there was such a key: that is the field's default, which never changes.
3. Whoever writes a new study writes every key of its schema out, so that no meaning rests on the reader's release.
4. A key that came after schema 1 is marked ``Since``; a contract of an older schema that has it is refused.
5. No key is removed or given another meaning. A contract of a schema that this release does not know is refused.

A new key of the contract::

    augment_pairs: Annotated[bool, Since(2)] = False                # new studies say false, old ones mean it
    rounding: Annotated[Rounding, Since(2, fresh="up")] = "nearest" # old ones mean nearest, new ones say up
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from consilium_shared.errors import VersionError

SCHEMA = 2
"""The newest schema that this release reads, and the one that it writes; it reads every older one too."""


@dataclass(frozen=True)
class Since:
    """Mark of a contract's key: the schema that brought it.

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
    """A part of a study with every key of that schema, as JSON carries it."""
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


def check_known(contract: Any) -> None:
    """Raises VersionError for a contract of a schema that came after this release."""
    number = contract.get("schema_version") if isinstance(contract, dict) else None
    if isinstance(number, int) and number > SCHEMA:
        raise VersionError(
            f"the study is written in contract schema {number}, this release reads schemas 1 to {SCHEMA}: upgrade "
            "Consilium here, or have the study written in an older schema (schema_version in its file)"
        )
