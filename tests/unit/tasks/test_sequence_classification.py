from __future__ import annotations

from tests.unit.tasks.suite import TaskSuite


class TestSequenceClassification(TaskSuite):
    name = "sequence-classification"
