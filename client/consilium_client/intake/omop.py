"""Tables of the OMOP Common Data Model (5.x) as records and samples.

    records     patient, record (of visits), sex, age, and each outcome as 1, 0 or nothing
    samples     measurements and observations by concept, with the unit's UCUM code

The record's start is the index date: the visit's start, or the person's first condition of the concepts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from consilium_client.intake.profile import OLDEST
from consilium_client.intake.selects import RecordsQuery, SamplesQuery, Source, text
from consilium_client.intake.sql_settings import Omop, Outcome

_SEXES = {8507: "M", 8532: "F"}
"""Gender concepts of the standard vocabulary."""


@dataclass(frozen=True)
class Queries:
    """Statements for tables of OMOP."""

    declared: Omop
    source: Source

    def _table(self, name: str, *columns: str) -> Any:
        table = self.source.table(name)
        for column in columns:
            table.append_column(sa.column(column))
        return table

    def _same(self, one: sa.ColumnElement[Any], other: sa.ColumnElement[Any]) -> sa.ColumnElement[bool]:
        return text(one) == text(other) if self.source.untyped else one == other

    def _of(self, column: sa.ColumnElement[Any], concepts: Sequence[int]) -> sa.ColumnElement[bool]:
        """Condition: the column has one of the concepts, or one that stands below it."""
        own = self.source.among(column, concepts)
        if not self.declared.descendants:
            return own
        ancestor = self._table("concept_ancestor", "ancestor_concept_id", "descendant_concept_id")
        below = ancestor.c.descendant_concept_id
        chosen = sa.select(text(below) if self.source.untyped else below).where(
            self.source.among(ancestor.c.ancestor_concept_id, concepts)
        )
        return sa.or_(own, (text(column) if self.source.untyped else column).in_(chosen))

    def records(self) -> RecordsQuery:
        """Statement of the records."""
        person = self._table("person", "person_id", "gender_concept_id", "year_of_birth")
        index, day, columns, has_record = self._index(person)
        age = sa.func.least(sa.extract("year", day) - sa.cast(person.c.year_of_birth, sa.Integer), OLDEST + 1)
        sex = sa.case(*((self.source.among(person.c.gender_concept_id, [k]), word) for k, word in _SEXES.items()))
        columns = [
            text(person.c.person_id).label("patient"),
            *columns,
            text(sa.cast(age, sa.Integer)).label("column age"),
            text(sex).label("column sex"),
            *(
                text(self._outcome(outcome, person.c.person_id, day)).label(f"column {name}")
                for name, outcome in self.declared.outcomes.items()
            ),
        ]
        names = ["age", "sex", *self.declared.outcomes]
        return RecordsQuery(sa.select(*columns).select_from(index), names, has_record, True, has_record)

    def _index(self, person: Any) -> tuple[Any, Any, list[Any], bool]:
        """The tables that give records, the index date, the columns that identify and time them."""
        if self.declared.index.visits:
            visit = self._table(
                "visit_occurrence",
                *("visit_occurrence_id", "person_id", "visit_concept_id", "visit_start_date", "visit_start_datetime"),
                *("visit_end_date", "visit_end_datetime"),
            )
            there = sa.and_(
                self._same(visit.c.person_id, person.c.person_id),
                self._of(visit.c.visit_concept_id, self.declared.index.visits),
            )
            columns = [
                text(visit.c.visit_occurrence_id).label("record"),
                sa.func.coalesce(text(visit.c.visit_start_datetime), text(visit.c.visit_start_date)).label("start"),
                # A day without a time ends when the next begins.
                sa.func.coalesce(
                    text(visit.c.visit_end_datetime), text(sa.cast(visit.c.visit_end_date, sa.Date) + 1)
                ).label("end"),
            ]
            return person.join(visit, there), sa.cast(visit.c.visit_start_date, sa.Date), columns, True
        condition = self._table("condition_occurrence", "person_id", "condition_concept_id", "condition_start_date")
        first = (
            sa.select(
                condition.c.person_id, sa.func.min(sa.cast(condition.c.condition_start_date, sa.Date)).label("day")
            )
            .where(self._of(condition.c.condition_concept_id, self.declared.index.conditions))
            .group_by(condition.c.person_id)
            .subquery("first")
        )
        joined = person.join(first, self._same(first.c.person_id, person.c.person_id))
        return joined, first.c.day, [text(first.c.day).label("start")], False

    def _outcome(self, outcome: Outcome, person: Any, day: Any) -> sa.ColumnElement[Any]:
        """Expression: 1, 0 where the person was observed until the last of the days without one, or nothing."""
        condition = self._table("condition_occurrence", "person_id", "condition_concept_id", "condition_start_date")
        condition = condition.alias("outcome")
        begins, last = sa.cast(condition.c.condition_start_date, sa.Date), day + outcome.within_days
        happened = sa.exists().where(
            self._same(condition.c.person_id, person),
            self._of(condition.c.condition_concept_id, outcome.conditions),
            begins > day,
            begins <= last,
        )
        period = self._table(
            "observation_period", "person_id", "observation_period_start_date", "observation_period_end_date"
        )
        observed = sa.exists().where(
            self._same(period.c.person_id, person),
            sa.cast(period.c.observation_period_start_date, sa.Date) <= day,
            sa.cast(period.c.observation_period_end_date, sa.Date) >= last,
        )
        return sa.case((happened, "1"), (observed, "0"))

    def samples(self) -> list[SamplesQuery]:
        """Statements of the samples, one for each variable and table."""
        return [
            self._samples(table, name, concepts)
            for name, variable in self.declared.variables.items()
            for table, concepts in (("measurement", variable.measurements), ("observation", variable.observations))
            if concepts
        ]

    def _samples(self, name: str, variable: str, concepts: Sequence[int]) -> SamplesQuery:
        columns = (f"{name}_concept_id", f"{name}_datetime", f"{name}_date")
        table = self._table(name, "person_id", "visit_occurrence_id", *columns, "value_as_number", "unit_concept_id")
        concept = self._table("concept", "concept_id", "concept_code", "vocabulary_id")
        unit = sa.and_(
            self._same(concept.c.concept_id, table.c.unit_concept_id), text(concept.c.vocabulary_id) == "UCUM"
        )
        record = table.c.visit_occurrence_id if self.declared.index.visits else table.c.person_id
        statement = (
            sa.select(
                text(record).label("record"),
                sa.func.coalesce(text(table.c[columns[1]]), text(table.c[columns[2]])).label("time"),
                text(table.c.value_as_number).label("value 0"),
                text(concept.c.concept_code).label("unit"),
            )
            .select_from(table.outerjoin(concept, unit))
            .where(self._of(table.c[columns[0]], concepts), record.is_not(None))
        )
        return SamplesQuery(statement, "timestamp", values={variable: "value 0"}, has_unit=True)
