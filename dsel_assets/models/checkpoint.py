"""Building a model, choosing what of it is trained, and its weights on disk (safetensors only)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from dsel_assets.models.vision import ARCHITECTURES

Builder = Callable[[], nn.Module]


def builder(name: str, shape: Sequence[int], classes: int, weights: dict[str, Tensor]) -> Builder:
    """A function that gives a fresh copy of the model with these weights, in eval mode."""

    def build() -> nn.Module:
        model = ARCHITECTURES[name](tuple(shape), classes)
        model.load_state_dict(weights)
        return model.eval()

    return build


def trainable_names(model: nn.Module, trainable: str | Sequence[str]) -> list[str]:
    """Names of the parameters that are trained, in the model's order.

    `all`; `head`, the last module that has parameters; or patterns (fnmatch) of names. A pattern
    that fits nothing raises ValueError: a misspelt layer must not quietly shrink the gradient.
    """
    names = [name for name, _ in model.named_parameters()]
    if trainable == "all":
        return names
    if trainable == "head":
        head = names[-1].rpartition(".")[0]
        return [name for name in names if name.rpartition(".")[0] == head]
    patterns = [trainable] if isinstance(trainable, str) else trainable
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"finetune.trainable: {pattern!r} fits none of {', '.join(names)}")
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Write named tensors as safetensors."""
    safetensors.torch.save_file({k: v.detach().contiguous() for k, v in weights.items()}, path)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read named tensors from a safetensors file."""
    return safetensors.torch.load_file(path)
