"""Scores against scikit-learn and by hand."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, log_loss

from dsel_assets.evaluation import scores


def drawn(rows=300, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.dirichlet(np.ones(classes), rows), rng.integers(0, classes, rows)


@pytest.mark.parametrize("dtype, rtol", [(np.float64, 1e-9), (np.float32, 1e-5)])
def test_scores_are_those_of_scikit_learn(dtype, rtol):
    probabilities, labels = drawn()
    probabilities = probabilities.astype(dtype)
    found = scores(probabilities, labels)
    predicted = probabilities.argmax(1)
    assert found["accuracy"] == accuracy_score(labels, predicted)
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    expected = log_loss(labels, drawn()[0], labels=range(5))
    assert found["loss"] == pytest.approx(expected, rel=rtol)
    assert all(type(value) is float for value in found.values())


def test_calibration_error_is_that_of_a_loop_over_the_bins():
    probabilities, labels = drawn()
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    expected = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence >= low) & (confidence < low + 1 / 15)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            expected += inside.mean() * gap
    assert scores(probabilities, labels)["calibration_error"] == pytest.approx(expected)


def test_by_hand():
    probabilities = np.array([[0.8, 0.2], [0.8, 0.2], [0.4, 0.6], [0.4, 0.6]])
    found = scores(probabilities, np.array([0, 1, 1, 1]))
    assert found["accuracy"] == 0.75
    assert found["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found["loss"] == pytest.approx(-np.log([0.8, 0.2, 0.6, 0.6]).mean())
    # at 0.8 half are right, at 0.6 all are: (0.3 + 0.4) / 2
    assert found["calibration_error"] == pytest.approx(0.35)


def test_sure_and_right_is_perfect_and_sure_and_wrong_is_finite():
    sure = np.eye(3)[[0, 1, 2]]
    best = {"accuracy": 1.0, "macro_f1": 1.0, "loss": 0.0, "calibration_error": 0.0}
    assert scores(sure, np.array([0, 1, 2])) == best
    worst = scores(sure, np.array([1, 2, 0]))
    assert worst["accuracy"] == worst["macro_f1"] == 0.0
    assert worst["calibration_error"] == 1.0
    assert worst["loss"] == pytest.approx(-np.log(1e-12))


def test_classes_that_never_occur_do_not_lower_macro_f1():
    found = scores(np.eye(10)[[3, 5, 3]], np.array([3, 5, 3]))
    assert found["macro_f1"] == 1.0


def test_one_row():
    assert scores(np.array([[0.3, 0.7]]), np.array([1]))["calibration_error"] == pytest.approx(0.3)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no examples"):
        scores(np.empty((0, 3)), np.empty(0, dtype=np.int64))


def test_probabilities_of_a_diverged_model_are_refused():
    probabilities, labels = drawn()
    probabilities[7] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        scores(probabilities, labels)
