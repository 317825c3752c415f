"""Uncertainty sampling: the examples of which the base model is least sure.

Entropy, margin and least confidence as in B. Settles, "Active Learning Literature Survey", 2009,
section 3.1. Nothing but the model's prediction is read: no label, no target, no other example.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import entr
from torch import Tensor, nn

from dsel_assets.data.examples import Examples
from dsel_assets.models import Builder
from dsel_assets.selection.arrays import as_rows
from dsel_assets.selection.scored import Ranking, Scored
from dsel_assets.selection.strategies import STRATEGIES

BLOCK = 1024  # rows of the pool in one forward pass
MEASURES = ("entropy", "margin", "least_confidence")


def uncertainty(probabilities: ArrayLike, measure: str = "entropy") -> NDArray[np.float64]:
    """[N] how unsure each prediction is, from 0; higher is less sure.

        entropy            -sum_c p_c log p_c, in nats
        margin             1 - (p_1 - p_2), p_1 and p_2 the two largest
        least_confidence   1 - p_1

    probabilities: [N, C] of rows that sum to 1. What 1 - p_1 is made of is summed, not subtracted,
    so that predictions that are sure to the last digit still differ. ValueError for an unknown
    measure, and for an array that is empty, no matrix, negative or not finite.
    """
    if measure not in MEASURES:
        raise ValueError(f"unknown measure {measure!r}; there are {', '.join(MEASURES)}")
    p = np.sort(as_rows(probabilities, "probabilities").astype(np.float64, copy=False), axis=1)
    if (p[:, 0] < 0).any():
        raise ValueError("probabilities below 0")
    if measure == "entropy":
        return np.asarray(entr(p).sum(1))
    rest: NDArray[np.float64] = p[:, :-1].sum(1)
    return rest + p[:, -2] if measure == "margin" and p.shape[1] > 1 else rest


@torch.no_grad()
def class_probabilities(model: nn.Module, inputs: Tensor) -> NDArray[np.float64]:
    """[N, C] predictions in eval mode, the softmax in double precision.

    inputs [N, ...] float32. ValueError, naming the rows, for outputs that are not finite.
    """
    model.eval()
    outputs = torch.cat([model(part) for part in inputs.split(BLOCK)])
    outputs = torch.from_numpy(as_rows(outputs, "outputs of the model"))
    found: NDArray[np.float64] = outputs.double().softmax(1).numpy()
    return found


class _Uncertain(Scored):
    """Takes those of which the base model is least sure; `name` is the measure.

    Nothing is trained, so that `trainable` is not read.
    """

    def __init__(self, *, model: Builder, trainable: Sequence[str] | None = None) -> None:
        super().__init__()
        self.model = model

    def rank(self, pool: Examples, target: Examples | None, seed: int) -> Ranking:
        """By falling uncertainty."""
        assert pool.inputs is not None
        probabilities = class_probabilities(self.model(), torch.from_numpy(pool.inputs))
        found = uncertainty(probabilities, self.name)
        order = np.argsort(-found, kind="stable")
        return Ranking(order, {"uncertainty": found}, {"mean_uncertainty": float(found.mean())})


class Entropy(_Uncertain):
    """The largest entropy of the prediction."""

    traits = STRATEGIES["entropy"]


class Margin(_Uncertain):
    """The smallest margin between the two likeliest classes."""

    traits = STRATEGIES["margin"]


class LeastConfidence(_Uncertain):
    """The smallest probability of the likeliest class."""

    traits = STRATEGIES["least_confidence"]
