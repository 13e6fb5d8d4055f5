"""Tasks: one folder each, and one line here.

A task's folder imports ``consilium_shared`` and what tasks share (``classification``), and no other task. Importing it
imports no torch: contracts, counts and metrics are read by the server and the auditor.
"""

from __future__ import annotations

TASKS = {
    "image-classification": "consilium_tasks.image_classification",
    "sequence-classification": "consilium_tasks.sequence_classification",
    "tabular-classification": "consilium_tasks.tabular_classification",
    "image-multilabel": "consilium_tasks.image_multilabel",
    "survival": "consilium_tasks.survival",
    "forecasting": "consilium_tasks.forecasting",
    "cross-table": "consilium_tasks.cross_table",
}
"""Task, as a contract names it, to the module that has it as ``TASK``."""

MODELS = {"graph": "consilium_shared.graphs.model"}
"""Model that every task has, as a contract names it, to the module that has its ``ModelKind`` as ``KIND``."""
