"""Low-rank adapters (LoRA, Hu et al., arXiv:2106.09685) beside the linear layers of any model.

Written here since gradients by factors need plain nn.Linear layers, and checkpoints plain names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatch
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init


class LoRA(nn.Module):
    """base(x) + alpha / rank * up(down(x)), as a linear layer would be after W + alpha/rank * U D.

    base is frozen; down [rank, in] is Kaiming-uniform, drawn from the name alone; up [out, rank] is
    zero. So at the start the layer is its base, and only up has a gradient: with delta that of the
    output and x the input, alpha / rank * delta (D x)' for up, zero for down.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float, name: str = "") -> None:
        super().__init__()
        like = {"bias": False, "device": base.weight.device, "dtype": base.weight.dtype}
        self.base = base.requires_grad_(False)
        self.down = skip_init(nn.Linear, base.in_features, rank, **like)
        self.up = skip_init(nn.Linear, rank, base.out_features, **like)
        self.scale = alpha / rank
        drawn = torch.empty(rank, base.in_features)
        generator = torch.Generator().manual_seed(crc32(name.encode()))
        nn.init.kaiming_uniform_(drawn, math.sqrt(5), generator=generator)
        with torch.no_grad():
            self.down.weight.copy_(drawn)
            self.up.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return self.base(x) + self.scale * self.up(self.down(x))


def add_lora(
    model: nn.Module, rank: int = 8, alpha: float = 16.0, modules: Sequence[str] = ("*",)
) -> None:
    """Put a `LoRA` in place of each nn.Linear whose name fits one of the patterns (fnmatch).

    A layer `fc` becomes `fc.base`, with `fc.down` and `fc.up` beside it. ValueError for a pattern
    that fits nothing.
    """
    # a subclass may use its weight in other ways than by calling it
    linear = {name: part for name, part in model.named_modules() if type(part) is nn.Linear}
    for pattern in modules:
        if not any(fnmatch(name, pattern) for name in linear):
            raise ValueError(f"model.lora.modules: {pattern!r} fits none of {', '.join(linear)}")
    for name, part in linear.items():
        if any(fnmatch(name, pattern) for pattern in modules):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRA(part, rank, alpha, name))


def lora_names(model: nn.Module) -> list[str]:
    """Names of the adapters' parameters, in the model's order."""
    layers = [name for name, part in model.named_modules() if isinstance(part, LoRA)]
    return [f"{name}.{part}.weight" for name in layers for part in ("down", "up")]
