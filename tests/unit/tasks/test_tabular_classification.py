from __future__ import annotations

from tests.unit.tasks.suite import TaskSuite


class TestTabularClassification(TaskSuite):
    name = "tabular-classification"
