"""What of a model's outputs is differentiated where it is not the loss at the true label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dsel_assets.sketching.philox import philox, signs, stream_key

Objective = Callable[[Tensor, Tensor], Tensor]
"""Of outputs [B, ...] and the positions [B] of their examples: [B], or [B, k] for k rows each."""


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Of each example, in nats: [B, classes] and [B] to [B]."""
    return F.cross_entropy(outputs, labels, reduction="none")


def loss_at_predicted(outputs: Tensor, positions: Tensor) -> Tensor:
    """The cross-entropy at the most probable class: [B, classes] to [B]."""
    return cross_entropy(outputs, outputs.argmax(1))


def loss_at_drawn(ids: Sequence[str], seed: int = 0) -> Objective:
    """The cross-entropy at one label an example, drawn from the model's softmax: [B].

    The moment of these gradients has the Fisher information J'(diag p - pp')J for its mean. What
    decides is one uniform number of the seed and the example's id (Philox), so that an example has
    the same label in whatever block, order, arrival and machine; but for rounding, where the number
    falls between the probabilities that two machines compute.
    """
    uniform = _uniform(ids, seed)

    def loss(outputs: Tensor, positions: Tensor) -> Tensor:
        below = outputs.double().softmax(1).cumsum(1) <= uniform.to(outputs.device)[positions, None]
        return cross_entropy(outputs, below.sum(1))

    return loss


def outputs_along(directions: Tensor) -> Objective:
    """Combinations of the outputs, one a row of `directions` [k, classes]: [B, classes] to [B, k].

    The rows of their gradients are directions @ J, with J the Jacobian [classes, parameters].
    """

    def combined(outputs: Tensor, positions: Tensor) -> Tensor:
        return outputs @ directions.to(outputs).T

    return combined


def output_directions(classes: int, k: int | None = None, seed: int = 0) -> Tensor:
    """Directions R [k, classes] with E R'R = I: the unit vectors, or k of random signs / sqrt(k).

    Since J'R'RJ has J'J for its mean, moments and inner products of examples (summed over their
    rows) are unbiased.
    """
    if k is None:
        return torch.eye(classes)
    drawn = signs(stream_key(seed, "outputs", "signs"), 0, k * classes)
    return drawn.reshape(k, classes) / k**0.5


def _uniform(ids: Sequence[str], seed: int) -> Tensor:
    """One number in (0, 1) an id: the id's hash is the counter, so the order plays no part."""
    hashes = b"".join(blake2b(str(name).encode(), digest_size=16).digest() for name in ids)
    counters = torch.from_numpy(np.frombuffer(hashes, "<u4").astype(np.int64).reshape(-1, 4))
    words = philox(counters, stream_key(seed, "labels", "uniform"))[:, 0]
    return (words.double() + 0.5) * 2.0**-32
