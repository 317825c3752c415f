"""One round of active learning: which unlabelled rows are worth a label, as the model is now.

Section 4 of J. Hübotter et al., NeurIPS 2024, arXiv:2402.15898: after each round of labels the
model is trained again, its embedding changes, and the kernel with it. What was observed enters
through the new embedding, so no posterior is carried over.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dsel_assets.models.tap import embeddings
from dsel_assets.selection.arrays import directions
from dsel_assets.selection.itl import Informative, select_informative

Inputs = NDArray[np.float32]


def ask(
    model: nn.Module,
    candidates: Inputs,
    targets: Inputs | None,
    n: int,
    *,
    observed: Inputs | None = None,
    rule: str = "itl",
    noise: float | None = None,
) -> Informative:
    """Choose n of the candidates to be labelled.

    The kernel is linear on what the last layer of the model reads, centred on all rows but the
    targets and scaled to unit norm.

    Args:
        model: as it was trained on the labels so far; not changed.
        candidates: [N, ...] float32, inputs without a label.
        targets: [m, ...]; None for a rule that has none.
        n: labels to ask for, at most N.
        observed: [k, ...] inputs that have a label or have been asked for: what they say about the
            targets needs no further row.
        rule: as in `select_informative`.
        noise: observation variance; by default the mean squared norm.

    Returns:
        as `select_informative`, with indices of the candidates; the state is empty, and
        `target_variance` begins after what was observed.
    """
    known = np.empty((0, *candidates.shape[1:]), np.float32) if observed is None else observed
    rows = embeddings(model, torch.from_numpy(np.concatenate([known, candidates])))
    centre = rows.mean(0, dtype=np.float64)
    X = directions(rows, centre)
    T = None
    if targets is not None:
        T = directions(embeddings(model, torch.from_numpy(targets)), centre)
    found = select_informative(
        X,
        T,
        n,
        rule=rule,
        noise=noise if noise or X.any() else 1.0,
        taken=np.arange(len(known)),
    )
    return Informative(
        found.indices - len(known),
        found.gains,
        found.target_variance,
        {},
        found.displaced,
        found.missed,
    )
