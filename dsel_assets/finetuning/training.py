"""The training loop that every strategy gets: same start, same steps, same schedule."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Trained:
    """weights by name; curve: mean training loss of each tenth of the steps; kept: see `train`."""

    weights: dict[str, Tensor]
    curve: list[float]
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)


def train(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    trainable: Sequence[str],
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    keep: Collection[int] = (),
) -> Trained:
    """Train `model` in place with Adam, the rate decayed to 0 by a cosine.

    inputs [n, ...] float32, labels [n] int64, weights [n] float32 (mean 1 is neutral). Every
    example is seen once before any is seen again; the order depends on `seed` alone. `keep` names
    numbers of steps after which a copy of the weights is kept: 0 is the start. ValueError when
    there is nothing to train on.
    """
    if len(inputs) == 0:
        raise ValueError(
            "nothing to train on: the subset is empty and finetune.include_target is off"
        )
    chosen = set(trainable)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=steps)
    batches = shuffled_batches(len(inputs), batch_size, seed)
    losses = torch.zeros(steps)
    torch.manual_seed(seed)  # dropout, where a model has it
    model.train()
    kept = {}
    for step in range(steps):
        if step in keep:
            kept[step] = _copy(model)
        rows = next(batches)
        each = F.cross_entropy(model(inputs[rows]), labels[rows], reduction="none")
        loss = (each * weights[rows]).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        losses[step] = loss.detach()
    model.eval()
    if steps in keep:
        kept[steps] = _copy(model)
    curve = [float(part.mean()) for part in losses.tensor_split(min(10, steps))]
    return Trained({k: v.detach() for k, v in model.state_dict().items()}, curve, kept)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def shuffled_batches(rows: int, size: int, seed: int) -> Iterator[Tensor]:
    """Endless batches of `min(size, rows)` rows, a fresh permutation whenever one runs out."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, rows)
    queue = torch.empty(0, dtype=torch.long)
    while True:
        if len(queue) < size:
            queue = torch.cat([queue, torch.randperm(rows, generator=generator)])
        yield queue[:size]
        queue = queue[size:]


@torch.no_grad()
def predict(model: nn.Module, inputs: Tensor, block: int = 1024) -> Tensor:
    """Class probabilities [n, C] float32, in eval mode."""
    model.eval()
    return torch.cat([model(part).softmax(-1) for part in inputs.split(block)])
