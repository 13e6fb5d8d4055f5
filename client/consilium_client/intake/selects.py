"""Declared rows as SELECT statements. Every column comes as text, so that it reads as the same in a CSV file does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from consilium_client.intake.sql_settings import Between, Records, Rows, Samples, TimeUnit, Word
from consilium_shared.errors import ConfigurationError


@dataclass(frozen=True)
class RecordsQuery:
    """Statement that gives the records: ``patient``, ``record``, ``start``, ``end`` (where they are) and columns."""

    statement: sa.Select[Any]
    columns: Sequence[str]
    has_record: bool
    has_start: bool
    has_end: bool


@dataclass(frozen=True)
class SamplesQuery:
    """Statement that gives samples.

    Attributes:
        statement: with ``record``, ``time``, and either ``value``, perhaps ``item`` and ``unit``, or ``value 0`` ….
        time_unit: of ``time`` and of the record's start.
        items: word of ``item`` -> variable.
        values: variable -> column of the statement, where a row has several, or all are of one variable.
        has_unit: whether it has ``unit``.
    """

    statement: sa.Select[Any]
    time_unit: TimeUnit
    items: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)
    has_unit: bool = False


def text(column: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """A column as text."""
    return sa.cast(column, sa.Text)


@dataclass(frozen=True)
class Source:
    """Peculiarities of a source.

    Attributes:
        schema: of tables that are named without one; None: there are no schemas.
        untyped: whether columns may be text whatever they hold, as in CSV files.
    """

    schema: str | None
    untyped: bool

    def table(self, name: str) -> sa.TableClause:
        """A table of the source by its name."""
        schema, _, own = name.rpartition(".")
        return sa.table(own, schema=schema or self.schema)

    def among(self, column: sa.ColumnElement[Any], words: Sequence[Word]) -> sa.ColumnElement[bool]:
        """Condition: the column is one of the words."""
        if self.untyped:  # no index is lost by it, and a file's 7 is text
            return text(column).in_([_word(word) for word in words])
        return column.in_(list(words))

    def at_least(self, column: sa.ColumnElement[Any], word: Word) -> sa.ColumnElement[bool]:
        """Condition: the column is the word or above it."""
        return self._comparable(column, word) >= word

    def below(self, column: sa.ColumnElement[Any], word: Word) -> sa.ColumnElement[bool]:
        """Condition: the column is below the word."""
        return self._comparable(column, word) < word

    def _comparable(self, column: sa.ColumnElement[Any], word: Word) -> sa.ColumnElement[Any]:
        if not self.untyped:
            return column
        return text(column) if isinstance(word, str) else sa.cast(column, sa.Double)


def _word(word: Word) -> str:
    if isinstance(word, bool):
        return "true" if word else "false"
    return str(word)


def records(declared: Records, source: Source) -> RecordsQuery:
    """Statement of declared records; raises ConfigurationError where a column's table is not joined."""
    rows = _Joined(declared, source)
    named = {"patient": declared.patient, "record": declared.record, "start": declared.start, "end": declared.end}
    wanted = {name: ref for name, ref in named.items() if ref is not None}
    columns = [rows.column(ref, name) for name, ref in wanted.items()]
    columns += [rows.column(ref, f"column {name}") for name, ref in declared.columns.items()]
    return RecordsQuery(
        rows.select(columns), list(declared.columns), "record" in wanted, "start" in wanted, "end" in wanted
    )


def samples(declared: Samples, source: Source) -> SamplesQuery:
    """Statement of declared samples; raises ConfigurationError where a column's table is not joined."""
    rows = _Joined(declared, source)
    columns = [rows.column(declared.record, "record"), rows.column(declared.time, "time")]
    if declared.values:
        values = {name: f"value {number}" for number, name in enumerate(declared.values)}
        columns += [rows.column(ref, values[name]) for name, ref in declared.values.items()]
        return SamplesQuery(rows.select(columns), declared.time_unit, values=values)
    item, value = str(declared.item), str(declared.value)
    columns += [rows.column(item, "item"), rows.column(value, "value")]
    if declared.unit is not None:
        columns.append(rows.column(declared.unit, "unit"))
    items = {_word(word): name for name, words in declared.items.items() for word in words}
    wanted = source.among(rows.find(item), [word for words in declared.items.values() for word in words])
    return SamplesQuery(
        rows.select(columns).where(wanted), declared.time_unit, items=items, has_unit=declared.unit is not None
    )


class _Joined:
    """A table with those that are joined to it."""

    def __init__(self, declared: Rows, source: Source) -> None:
        self._source = source
        first = source.table(declared.table)
        self._tables = {first.name: first}
        self._first = first
        made: sa.FromClause = first
        for each in declared.join:
            other = source.table(each.table)
            if other.name in self._tables:
                raise ConfigurationError(f"site.yaml: table {other.name} is joined twice")
            pairs = [(self.find(here), _column(other, there)) for here, there in each.match.items()]
            if source.untyped:
                pairs = [(text(here), text(there)) for here, there in pairs]
            self._tables[other.name] = other
            made = made.join(other, sa.and_(*(here == there for here, there in pairs)), isouter=each.keep)
        self._from = made
        self._where = [self._condition(self.find(ref), wanted) for ref, wanted in declared.where.items()]

    def find(self, ref: str) -> sa.ColumnElement[Any]:
        table, _, name = ref.rpartition(".")
        if table and table not in self._tables:
            raise ConfigurationError(f"site.yaml: {ref}: no table {table} is read here; those are {self._known()}")
        return _column(self._tables[table] if table else self._first, name)

    def column(self, ref: str, name: str) -> sa.ColumnElement[Any]:
        return text(self.find(ref)).label(name)

    def select(self, columns: Sequence[sa.ColumnElement[Any]]) -> sa.Select[Any]:
        return sa.select(*columns).select_from(self._from).where(*self._where)

    def _known(self) -> str:
        return ", ".join(self._tables)

    def _condition(self, column: sa.ColumnElement[Any], wanted: Word | list[Word] | Between) -> sa.ColumnElement[bool]:
        if isinstance(wanted, Between):
            parts = []
            if wanted.at_least is not None:
                parts.append(self._source.at_least(column, wanted.at_least))
            if wanted.below is not None:
                parts.append(self._source.below(column, wanted.below))
            return sa.and_(*parts)
        return self._source.among(column, wanted if isinstance(wanted, list) else [wanted])


def _column(table: sa.TableClause, name: str) -> sa.ColumnElement[Any]:
    if name not in table.c:
        table.append_column(sa.column(name))
    return table.c[name]
