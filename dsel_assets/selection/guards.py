"""What goes wrong with inferred weights, as figures and warnings."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsel_assets.selection.posterior import rank_correlation

Bools = NDArray[np.bool_]
BOUND = 12.0  # of a logit: there a weight is within 1e-5 of 0 or 1 and has stopped moving
RUNAWAY = 0.05  # share of logits beyond it
BLOCK = 1024  # rows whose distances to the target are in memory
JUNK = 0.1  # share of rows outside the target among those that the weights put first
ALARMS = {
    "collapsed": "lower sigma, or set beta to the fraction that you believe useful",
    "runaway": "raise sigma or take fewer steps",
    "easy_junk": "look at the rows of highest weight",
}


class Neighbourhood:
    """Where the target lies: each row belongs or not, by its nearest target row of the same label.

    A row is outside if that is farther from it than any target row is from the nearest other one of
    its label, or if the target has no row of its label. embeddings [M, F], labels [M]. Of a target
    with one row a label nothing can be said, and no row of those labels is outside.
    """

    def __init__(self, embeddings: Tensor, labels: Tensor) -> None:
        self.embeddings, self.labels = embeddings, labels
        nearest = torch.cat(
            [
                self._nearest(
                    embeddings[start : start + BLOCK], labels[start : start + BLOCK], start
                )
                for start in range(0, len(labels), BLOCK)
            ]
        )
        known = nearest.isfinite()
        self.radius = float(nearest[known].max()) if known.any() else float("inf")

    def outside(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """[b] bool of these rows."""
        found = self._nearest(embeddings, labels) > self.radius
        return found | ~torch.isin(labels, self.labels)

    def _nearest(self, embeddings: Tensor, labels: Tensor, own: int | None = None) -> Tensor:
        """[b] distance to the nearest target row of the same label; own: where these rows begin."""
        apart = torch.cdist(embeddings.float(), self.embeddings.float())
        apart.masked_fill_(labels[:, None] != self.labels, torch.inf)
        if own is not None:
            apart.diagonal(own).fill_(torch.inf)
        return apart.min(dim=1).values


def guards(
    mean: NDArray[np.float32],
    losses: NDArray[np.float32],
    outside: Bools,
    beta: float,
    logits: Iterable[Tensor],
) -> dict[str, Any]:
    """Alarms and what they rest on; every alarm that is on also warns, with what to do.

    mean, losses, outside [N]: posterior means, losses under the joint model, and whether a row lies
    outside the target (`Neighbourhood`). logits: [N] of each chain, none for a weight network.

    collapsed  the mean weight is nearer to 0 or 1 than to beta
    runaway    more than 5 % of the logits are beyond 12 in size
    easy_junk  of the beta N rows of highest weight, more than 10 % are outside the target, and
               their median loss is no higher than the others': they are there as they are easy
    """
    if not (np.isfinite(mean).all() and np.isfinite(losses).all()):
        raise ValueError(
            "the chain diverged: its weights or losses are not finite; lower rate or step"
        )
    mean_weight = float(mean.mean(dtype=np.float64))
    sizes = [_beyond(each) for each in logits]
    first = _largest(mean, max(1, round(beta * len(mean))))
    far, near = losses[first & outside], losses[first & ~outside]
    share, of_pool = len(far) / (len(far) + len(near)), float(outside.mean())
    junk = share > JUNK and (len(near) == 0 or np.median(far) <= np.median(near))
    found: dict[str, Any] = {
        "mean_weight": mean_weight,
        "beta": beta,
        "collapsed": abs(mean_weight - beta) > min(beta, 1 - beta) / 2,
        "runaway_share": max(sizes, default=0.0),
        "runaway": max(sizes, default=0.0) > RUNAWAY,
        "weight_loss_correlation": rank_correlation(mean, losses),
        "outside_share": of_pool,
        "outside_share_top": share,
        "easy_junk": bool(junk),
    }
    said = {
        "collapsed": f"the mean weight is {mean_weight:.3f}, far from beta = {beta:g}",
        "runaway": f"{found['runaway_share']:.0%} of the logits are beyond {BOUND:g}",
        "easy_junk": f"{share:.0%} of the rows of highest weight lie outside the target "
        f"({of_pool:.0%} of the pool does) and are easier than the rest",
    }
    for name, text in said.items():
        if found[name]:
            warnings.warn(f"bads: {name}: {text}; {ALARMS[name]}", stacklevel=3)
    return found


def _beyond(logits: Tensor) -> float:
    """Share of the logits beyond the bound."""
    parts = logits.split(1 << 16)
    return sum(int((part.abs() > BOUND).sum()) for part in parts) / len(logits)


def _largest(values: NDArray[np.float32], k: int) -> Bools:
    """[N] whether a value is among the k largest; of equal ones the first are."""
    least = np.partition(values, len(values) - k)[len(values) - k]
    chosen: Bools = values > least
    chosen[np.flatnonzero(values == least)[: k - np.count_nonzero(chosen)]] = True
    return chosen
