"""Confident learning: the examples whose label a model that never saw them agrees with.

C. Northcutt, L. Jiang, I. Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels",
JAIR 2021, arXiv:1911.00068, by the authors' library cleanlab. It needs no target set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsel_assets.data.examples import Examples
from dsel_assets.finetuning import predict, train
from dsel_assets.models import Builder
from dsel_assets.selection.scored import Ranking, Scored
from dsel_assets.selection.strategies import STRATEGIES

Quality = Literal["self_confidence", "normalized_margin", "confidence_weighted_entropy"]


def label_quality(
    labels: NDArray[np.int64],
    probabilities: NDArray[np.floating],
    *,
    method: Quality = "self_confidence",
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Quality in [0, 1], by cleanlab, of each label [N], and whether it is thought to be wrong [N].

    labels [N] in 0 ... C - 1; probabilities [N, C] of models that were not trained on the row.
    Wrong ones are found by the noise rates of the confident joint (`prune_by_noise_rate`).
    """
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    quality = get_label_quality_scores(labels, probabilities, method=method)
    wrong = np.zeros(len(labels), bool)
    if len(np.unique(labels)) > 1:  # of one class the package can't tell
        wrong = find_label_issues(labels, probabilities, n_jobs=1)
    return np.asarray(quality, dtype=np.float64), np.asarray(wrong, dtype=bool)


def out_of_fold(
    model: Builder,
    inputs: Tensor,
    labels: Tensor,
    *,
    trainable: Sequence[str] | None = None,
    folds: int = 5,
    steps: int = 400,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
) -> NDArray[np.float64]:
    """[N, C] class probabilities of each row by the model that was trained on the other folds.

    inputs [N, ...] float32, labels [N] int64. Folds are drawn by `seed` and as equal as can be; at
    most N of them. ValueError for fewer than two rows or folds.
    """
    if min(len(inputs), folds) < 2:
        raise ValueError(f"{folds} folds of {len(inputs)} rows: both must be at least 2")
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(len(inputs)))
    fold %= min(folds, len(inputs))
    probabilities: NDArray[np.float64] | None = None
    for out in range(int(fold.max()) + 1):
        fresh, rest = model(), fold != out
        names = trainable or [name for name, _ in fresh.named_parameters()]
        train(
            fresh, inputs[rest], labels[rest], torch.ones(int(rest.sum())),
            trainable=names, steps=steps, batch_size=batch_size, lr=lr, seed=seed,
        )  # fmt: skip
        found = predict(fresh, inputs[~rest]).double().numpy()
        if probabilities is None:
            probabilities = np.empty((len(inputs), found.shape[1]))
        probabilities[(~rest).numpy()] = found
    assert probabilities is not None
    return probabilities


class Confident(Scored):
    """Takes the labels of highest quality; those that are thought to be wrong come last.

    As good as the pool is on the whole: where most labels of a class are wrong in the same way, the
    model learns the wrong ones. Every fold is trained from the base.
    """

    traits = STRATEGIES["cleanlab"]

    def __init__(
        self,
        *,
        model: Builder,
        trainable: Sequence[str] | None = None,
        method: Quality = "self_confidence",
        folds: int = 5,
        steps: int = 400,
        batch_size: int = 32,
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        self.model, self.trainable, self.method, self.folds = model, trainable, method, folds
        self.steps, self.batch_size, self.lr = steps, batch_size, lr

    def rank(self, pool: Examples, target: Examples | None, seed: int) -> Ranking:
        """Labels thought right by falling quality, then the others likewise."""
        assert pool.inputs is not None
        if len(pool) == 1:
            return Ranking(np.zeros(1, np.int64), {})
        probabilities = out_of_fold(
            self.model,
            torch.from_numpy(pool.inputs),
            torch.from_numpy(pool.labels),
            trainable=self.trainable,
            folds=self.folds,
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            seed=seed,
        )
        quality, wrong = label_quality(pool.labels, probabilities, method=self.method)
        return Ranking(
            np.lexsort((-quality, wrong)),
            {"label_quality": quality, "thought_wrong": wrong.astype(np.int64)},
            {"share_thought_wrong": float(wrong.mean())},
        )
