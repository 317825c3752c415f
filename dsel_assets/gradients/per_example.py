"""Per-example gradients of the trainable parameters, streamed in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn import functional as F


@dataclass(frozen=True)
class GradientBlock:
    """Gradients of consecutive examples.

    rows      which examples, as a slice of the input
    gradients name -> [B, *shape] float32, one per trainable parameter
    losses    [B] float32, nats
    norms     [B] float32, of the whole gradient
    """

    rows: slice
    gradients: dict[str, Tensor]
    losses: Tensor
    norms: Tensor


def gradient_blocks(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    trainable: Sequence[str],
    *,
    block: int = 64,
) -> Iterator[GradientBlock]:
    """Gradients of each example's cross-entropy at the model's weights, in eval mode.

    inputs [N, ...] float32, labels [N] int64. One backward pass an example; when memory runs out
    the block is halved and goes on from the same example, down to one.
    """
    model.eval()
    frozen = {
        name: p.detach() for name, p in model.named_parameters() if name not in set(trainable)
    }
    frozen |= dict(model.named_buffers())
    trained = {name: model.get_parameter(name).detach() for name in trainable}

    def loss(weights: dict[str, Tensor], example: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, weights | frozen, (example[None],))
        return F.cross_entropy(logits, label[None])

    per_example = vmap(grad_and_value(loss), in_dims=(None, 0, 0))
    start = 0
    while start < len(inputs):
        rows = slice(start, min(start + block, len(inputs)))
        try:
            gradients, losses = per_example(trained, inputs[rows], labels[rows])
            squares = [g.flatten(1).double().square().sum(1) for g in gradients.values()]
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or block == 1:
                raise
            block //= 2
            continue
        norms = torch.stack(squares).sum(0).sqrt().float()
        yield GradientBlock(rows, gradients, losses.detach(), norms)
        start = rows.stop


def out_of_memory(error: BaseException) -> bool:
    """Whether smaller blocks may help."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "allocate memory" in str(error)  # torch's CPU allocator raises a plain RuntimeError
    )
