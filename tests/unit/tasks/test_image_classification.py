from __future__ import annotations

from tests.unit.tasks.suite import TaskSuite


class TestImageClassification(TaskSuite):
    name = "image-classification"
