"""Small image models: what the default task finetunes."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def small_cnn(shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two convolutions and two linear layers for [B, height, width] inputs, sides divisible by 4.

    28 x 28 and 10 classes: 26,698 parameters. No batch normalisation and no dropout, so that the
    gradient of an example depends on that example alone.
    """
    height, width = shape
    if height % 4 or width % 4:
        raise ValueError(f"small_cnn needs sides divisible by 4, not {height} x {width}")
    return nn.Sequential(
        nn.Unflatten(1, (1, height)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(height * width, 32),
        nn.ReLU(),
        nn.Linear(32, classes),
    )


def mlp(shape: tuple[int, ...], classes: int) -> nn.Module:
    """One hidden layer of 128 on flattened [B, ...] inputs: for vectors and embeddings."""
    features = 1
    for side in shape:
        features *= side
    return nn.Sequential(nn.Flatten(), nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, classes))


ARCHITECTURES: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "small_cnn": small_cnn,
    "mlp": mlp,
}
