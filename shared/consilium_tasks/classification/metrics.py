"""Metrics of a classifier in words, for a model's page."""

from __future__ import annotations

from types import MappingProxyType

EXPLAINED = MappingProxyType(
    {
        "auroc": "Area under the ROC curve: how often a case ranks above a non-case",
        "auprc": "Area under the precision-recall curve",
        "accuracy": "Share of correct classes",
        "balanced-accuracy": "Mean over classes of the share of their cases that are found",
        "sensitivity": "Share of cases that are found",
        "specificity": "Share of non-cases that are not called cases",
        "f1": "F1: harmonic mean of precision and sensitivity",
        "loss": "Mean loss in nats (smaller is better)",
        "ece": "Expected calibration error: how far probabilities are from frequencies",
        "brier": "Brier score: mean squared error of the probability (smaller is better)",
        "calibration-intercept": "Calibration intercept: 0 where probabilities are right on average, above if too low",
        "calibration-slope": "Calibration slope: 1 where probabilities are as far apart as they should be",
    }
)
