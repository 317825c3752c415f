"""The base model of the default task, trained on scikit-learn's UCI digits."""

from __future__ import annotations

import torch
from torch import Tensor

from dsel_assets.data.bundled import pretraining
from dsel_assets.finetuning import train
from dsel_assets.models.vision import ARCHITECTURES


def pretrain(
    name: str, shape: tuple[int, ...], classes: int, *, seed: int = 0
) -> dict[str, Tensor]:
    """Weights of an architecture trained for 1,000 steps on shifted copies of 1,797 UCI digits."""
    if tuple(shape) != (28, 28) or classes != 10:
        raise ValueError("model.base: bundled:digits is for [28, 28] inputs and 10 classes")
    images, labels = map(torch.from_numpy, pretraining())
    torch.manual_seed(seed)
    model = ARCHITECTURES[name](tuple(shape), classes)
    names = [name for name, _ in model.named_parameters()]
    trained = train(
        model, images, labels, torch.ones(len(images)),
        trainable=names, steps=1000, batch_size=64, lr=2e-3, seed=seed,
    )  # fmt: skip
    return trained.weights
