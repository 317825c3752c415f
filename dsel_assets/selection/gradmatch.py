"""Gradmatch: the examples whose gradients are most like those of the target set.

The baseline in the manner of LESS: M. Xia, S. Malladi, S. Gururangan, S. Arora, D. Chen, "LESS:
Selecting Influential Data for Targeted Instruction Tuning", ICML 2024, arXiv:2402.04333.
"""

from __future__ import annotations

import numpy as np

from dsel_assets.data.examples import Examples
from dsel_assets.selection.attribution import attribution
from dsel_assets.selection.interface import Choice, Floats, Ints, Selector, State
from dsel_assets.selection.strategies import STRATEGIES

ROUNDING = 1e-12  # scores that differ by less than this share of the largest count as equal


class Gradmatch(Selector):
    """Takes the highest mean `attribution` to the target, class by class in turn.

    A class of the target scores an example by its mean score against the targets of that class.
    The classes take turns in the order of their indices, and each takes the best example, of
    whatever label, that none has taken before. Without round_robin the examples come by their mean
    score against the whole target. Equal scores go to the lowest id. Exact: no seed enters.

    As in LESS, cosines are the default: inner products favour long gradients, among them those
    with wrong labels. What differs:

    - the gradients are those of the loss at the base checkpoint; LESS takes the pool's as Adam
      would step and adds up several checkpoints of a warm-up run, weighted by learning rate;
    - they are those of all trained parameters, not of LoRA's;
    - LESS scores an example by the largest of its means over subtasks and takes the top, so that
      one subtask can fill the budget; here each class, in the place of a subtask, has its share.
    """

    traits = STRATEGIES["gradmatch"]

    def __init__(
        self, *, how: str = "cosine", round_robin: bool = True, damping: float = 0.1
    ) -> None:
        self.how, self.round_robin, self.damping = how, round_robin, damping

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """The n picks in order: the score of each, the class that took it, the nearest target."""
        assert target is not None and pool.sketches is not None and target.sketches is not None
        groups = target.labels if self.round_robin else np.zeros_like(target.labels)
        sketches, targets = (s.reshape(len(s), -1) for s in (pool.sketches, target.sketches))
        scores = attribution(sketches, targets, how=self.how, damping=self.damping, groups=groups)
        rows, columns = _in_turns(scores, n)
        cosines = attribution(sketches[rows], targets)
        found = scores[rows, columns]
        taker = {"taken_by": np.unique(groups)[columns]} if self.round_robin else {}
        return Choice(
            rows,
            {
                "score": found,
                **taker,
                "nearest_target": target.ids[cosines.argmax(1)],
                "nearest_cosine": cosines.max(1),
            },
            {"mean_score": float(found.mean()), "lowest_score": float(found.min())},
            # A row's scores do not change as others come, and who was not picked then is not now;
            # but trak's do, by the Fisher matrix of the pool.
            {} if self.how == "trak" else {"ids": pool.ids[rows]},
        )


def _in_turns(scores: Floats, n: int) -> tuple[Ints, Ints]:
    """Rows [n] that the columns of scores [N, G] take in turn, and the column that took each."""
    # of n picks, a column's own is among its first n
    queues = [iter(_ranking(column)[:n]) for column in scores.T]
    columns = np.arange(n) % len(queues)
    taken = np.zeros(len(scores), dtype=bool)
    rows = np.empty(n, np.int64)
    for i, column in enumerate(columns):
        rows[i] = next(row for row in queues[column] if not taken[row])
        taken[rows[i]] = True
    return rows, columns


def _ranking(score: Floats) -> Ints:
    """Rows by falling score, equal ones by index: equal rows differ in their last bits."""
    order = np.argsort(-score, kind="stable")
    falls = -np.diff(score[order], prepend=score[order[:1]])
    level = np.cumsum(falls > ROUNDING * np.abs(score).max())
    return order[np.lexsort((order, level))]
