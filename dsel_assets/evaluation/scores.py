"""Scores of predicted probabilities."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BINS = 15


def scores(probabilities: NDArray[np.floating], labels: NDArray[np.int64]) -> dict[str, float]:
    """Accuracy, macro-F1, mean negative log-likelihood (nats) and calibration error.

    probabilities [n, C], labels [n]. Macro-F1 averages over the classes that occur among the
    labels, the same ones for every model. Calibration is the expected calibration error over 15
    equal bins of the top probability (Guo et al. 2017). ValueError for no rows and for
    probabilities that are not finite.
    """
    from sklearn.metrics import f1_score

    if len(labels) == 0:
        raise ValueError("no examples to score")
    if not np.isfinite(probabilities).all():
        raise ValueError("the probabilities are not finite: the training diverged; lower its rate")
    predicted = probabilities.argmax(1)
    correct = predicted == labels
    confidence = probabilities.max(1)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gap = np.bincount(bins, weights=correct - confidence.astype(np.float64), minlength=BINS)
    given = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    return {
        "accuracy": float(correct.mean()),
        "macro_f1": float(
            f1_score(labels, predicted, average="macro", labels=np.unique(labels), zero_division=0)
        ),
        "loss": float(-np.log(np.maximum(given, 1e-12)).mean()),
        "calibration_error": float(np.abs(gap).sum() / len(labels)),
    }
