"""Small loss: the examples that a model trained on the target set alone finds easiest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dsel_assets.data.examples import Examples
from dsel_assets.finetuning import train
from dsel_assets.models import Builder
from dsel_assets.selection.scored import Ranking, Scored, places
from dsel_assets.selection.strategies import STRATEGIES

BLOCK = 1024  # rows of the pool in one forward pass


def target_losses(
    model: nn.Module,
    pool: tuple[Tensor, Tensor],
    target: tuple[Tensor, Tensor],
    *,
    trainable: Sequence[str] | None = None,
    steps: int = 400,
    batch_size: int = 32,
    lr: float = 1e-3,
    seed: int = 0,
) -> NDArray[np.float64]:
    """[N] cross entropy in nats of each pool example, once `model` was trained on the target alone.

    model is trained in place (pass a copy); trainable: names of parameters, None for all. pool and
    target are inputs [N, ...] float32 and labels [N] int64. ValueError for an empty target.
    """
    names = trainable or [name for name, _ in model.named_parameters()]
    train(
        model, *target, torch.ones(len(target[0])),
        trainable=names, steps=steps, batch_size=batch_size, lr=lr, seed=seed,
    )  # fmt: skip
    parts = zip(*(part.split(BLOCK) for part in pool), strict=True)
    with torch.no_grad():
        losses = [F.cross_entropy(model(x), y, reduction="none") for x, y in parts]
    return torch.cat(losses).double().numpy()


class SmallLoss(Scored):
    """Takes the smallest losses under a model that knows nothing but the target.

    The honest baseline of every method that tells clean from noisy labels with the help of a clean
    set: it costs one short training run and one forward pass. As all of them, it prefers what is
    easy, not what teaches most. With `per_class` the labels take turns, each with its easiest
    example next, so that no class is starved because it is hard.
    """

    traits = STRATEGIES["smallloss"]

    def __init__(
        self,
        *,
        model: Builder,
        trainable: Sequence[str] | None = None,
        steps: int = 400,
        batch_size: int = 32,
        lr: float = 1e-3,
        per_class: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.trainable = model, trainable
        self.steps, self.batch_size, self.lr, self.per_class = steps, batch_size, lr, per_class

    def rank(self, pool: Examples, target: Examples | None, seed: int) -> Ranking:
        """By rising loss; with per_class by place within the label, then by loss."""
        assert target is not None and pool.inputs is not None and target.inputs is not None
        losses = target_losses(
            self.model(),
            (torch.from_numpy(pool.inputs), torch.from_numpy(pool.labels)),
            (torch.from_numpy(target.inputs), torch.from_numpy(target.labels)),
            trainable=self.trainable,
            steps=self.steps,
            batch_size=self.batch_size,
            lr=self.lr,
            seed=seed,
        )
        order = np.argsort(losses, kind="stable")
        if self.per_class:
            order = order[np.argsort(places(pool.labels[order]), kind="stable")]
        return Ranking(order, {"loss": losses}, {"median_loss": float(np.median(losses))})
