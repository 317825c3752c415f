"""What a model's last layer reads: the embedding that weights and kernels are made of."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dsel_assets.models.lora import LoRA

BLOCK = 1024  # rows in one forward pass


def last_layer(model: nn.Module) -> nn.Module:
    """The last module with parameters of its own, adapters aside: theirs read something smaller.

    ValueError for a model without parameters.
    """
    adapters = {part for m in model.modules() if isinstance(m, LoRA) for part in (m.down, m.up)}
    layers = [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))]
    found = [layer for layer in layers if layer not in adapters]
    if not found:
        raise ValueError("the model has no parameters, so nothing can be trained")
    return found[-1]


class Tap:
    """What the model's last layer reads, of the latest forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.value = torch.empty(0)
        self.handle = last_layer(model).register_forward_pre_hook(self._see)

    def _see(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.value = given[0].detach()

    def remove(self) -> None:
        """Leave the model as it was."""
        self.handle.remove()


@torch.no_grad()
def embeddings(model: nn.Module, inputs: Tensor) -> NDArray[np.float32]:
    """[N, F] of inputs [N, ...] float32, in eval mode; the model's own mode comes back."""
    training, tap = model.training, Tap(model)
    model.eval()
    try:
        parts = []
        for part in inputs.split(BLOCK):
            model(part)
            parts.append(tap.value.flatten(1).float())
        return torch.cat(parts).numpy()
    finally:
        tap.remove()
        model.train(training)
