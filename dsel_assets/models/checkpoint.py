"""Building a model, choosing what of it is trained, and its weights on disk (safetensors only)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from dsel_assets.models.lora import add_lora, lora_names
from dsel_assets.models.trainable import trained
from dsel_assets.models.vision import ARCHITECTURES

Builder = Callable[[], nn.Module]


def builder(
    name: str,
    shape: Sequence[int],
    classes: int,
    weights: dict[str, Tensor],
    lora: Mapping[str, Any] | None = None,
) -> Builder:
    """A function that gives a fresh copy of the model with these weights, in eval mode.

    lora: settings of `add_lora`, whose adapters start beside the weights.
    """

    def build() -> nn.Module:
        model = ARCHITECTURES[name](tuple(shape), classes)
        model.load_state_dict(weights)
        if lora is not None:
            add_lora(model, **lora)
        return model.eval()

    return build


def trainable_names(model: nn.Module, trainable: str | Sequence[str]) -> list[str]:
    """Names of the parameters that are trained: `trained` of a model."""
    return trained([name for name, _ in model.named_parameters()], lora_names(model), trainable)


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write named tensors as safetensors."""
    safetensors.torch.save_file({k: v.detach().contiguous() for k, v in weights.items()}, path)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read named tensors from a safetensors file."""
    return safetensors.torch.load_file(path)
