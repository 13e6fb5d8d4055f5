"""Strict YAML: a person's file becomes a frozen model, or an error that names file, line and the nearest valid key."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from consilium_shared.canonical import canonical_bytes
from consilium_shared.errors import ConfigurationError, PeerError
from consilium_shared.limits import FILE_BYTES

Model = TypeVar("Model", bound=BaseModel)
Location = tuple[str | int, ...]


class Strict(BaseModel):
    """Base of every configuration and message model: frozen, unknown keys refused, no NaN or infinity.

    No error shows what was given: it may be a secret.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


def validated(adapter: TypeAdapter[Any], value: Any) -> Any:
    """Value that a peer sent, as the adapter's type.

    Raises:
        PeerError: a field that is unknown, missing, out of bounds or nested too deep, or a value that is not written
            as it is read: what was signed and what is read must be one thing. (A field with a default may be absent.)
    """
    try:
        found = adapter.validate_python(value)
        written = canonical_bytes(adapter.dump_python(found, mode="json", exclude_unset=True))
    except (ValueError, RecursionError) as error:  # of pydantic's too; what is nested too deep cannot be written
        raise PeerError("a message with unknown or missing fields, or values out of bounds") from error
    if written != canonical_bytes(value):
        raise PeerError("a message with a value that is not written as it is read")
    return found


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and keys that are not text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, "keys must be text", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_text(path: Path) -> str:
    """The text of a person's file.

    Raises:
        ConfigurationError: missing, unreadable, larger than ``limits.FILE_BYTES``, or not UTF-8.
    """
    try:
        if path.stat().st_size > FILE_BYTES:
            raise ConfigurationError(f"{path} is larger than {FILE_BYTES} bytes; this is not a file of ours")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text (byte {error.start})") from error


def load_yaml(
    path: Path, model: type[Model], complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> Model:
    """Read ``path`` and check it against ``model``.

    Args:
        path: the file.
        model: what it is to be.
        complete: puts in what the file only names, such as another file's content.

    Raises:
        ConfigurationError: unreadable, not YAML, an unknown key (with the nearest valid one), or a wrong value; each
            finding stands on a line of its own as ``file:line: key: what``.
    """
    value, node = _parsed(path)
    value = value if complete is None else complete(value)
    try:
        return model.model_validate(value)
    except ValidationError as error:
        lines = [f"{path}:{_line(node, item['loc'])}: {_finding(model, item)}" for item in error.errors()]
        raise ConfigurationError(*dict.fromkeys(lines)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values that stand in a person's file, unchecked; raises as ``load_yaml`` for what is no YAML."""
    return _parsed(path)[0]


def _parsed(path: Path) -> tuple[dict[str, Any], yaml.Node | None]:
    text = read_text(path)
    try:
        node = yaml.compose(text, Loader=_Loader)
        value = yaml.load(text, Loader=_Loader)  # noqa: S506  (a SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigurationError(f"{path}:{line}: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(f"{path}:1: expected keys and values, as in the samples under deploy/")
    return value, node


def _line(node: yaml.Node | None, location: Location) -> int:
    """1-based line of the deepest part of ``location`` that stands in the file."""
    line = node.start_mark.line + 1 if node is not None else 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == part), None)
            if found is None:
                continue  # a union's tag, or a missing key
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _finding(model: type[BaseModel], item: Any) -> str:
    location: Location = item["loc"]
    dotted = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        key = str(location[-1])
        near = difflib.get_close_matches(key, sorted(_keys(model)), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{dotted}: no such key{hint}"
    if item["type"] == "missing":
        return f"{dotted}: this key is required"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{dotted}: {message}" if dotted else message


def _keys(model: type[BaseModel]) -> set[str]:
    """Every key that is valid anywhere in the file; enough to guess what a misspelt one meant."""
    keys: set[str] = set()
    waiting: list[Any] = [model]
    seen: set[Any] = set()
    while waiting:
        kind = waiting.pop()
        if kind in seen:
            continue
        seen.add(kind)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            for name, field in kind.model_fields.items():
                keys.add(field.alias or name)
                waiting.append(field.annotation)
        waiting.extend(getattr(kind, "__args__", ()))
    return keys
