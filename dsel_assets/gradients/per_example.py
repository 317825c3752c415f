"""Per-example gradients of the trainable parameters, streamed in blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from dsel_assets.gradients.objectives import Objective, cross_entropy


@dataclass(frozen=True)
class GradientBlock:
    """Gradients of consecutive examples.

    rows      which examples, as a slice of the input
    gradients name -> [B, *shape] float32, one per trainable parameter; [B, k, *shape] where the
              objective has k rows an example
    losses    [B] float32, nats, at the given labels
    norms     [B] float32, of the whole gradient, all k rows together
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
    of: Objective | None = None,
    block: int = 64,
) -> Iterator[GradientBlock]:
    """Gradients of each example's cross-entropy at the model's weights, in eval mode.

    inputs [N, ...] float32, labels [N] int64. of: what is differentiated instead. One backward pass
    an example and row; when memory runs out the block is halved and goes on from the same example,
    down to one.
    """
    model.eval()
    frozen = {
        name: p.detach() for name, p in model.named_parameters() if name not in set(trainable)
    }
    frozen |= dict(model.named_buffers())
    trained = {name: model.get_parameter(name).detach() for name in trainable}

    def gradients_and_loss(
        weights: dict[str, Tensor], example: Tensor, label: Tensor, position: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        def values(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            outputs = functional_call(model, weights | frozen, (example[None],))
            loss = cross_entropy(outputs, label[None])
            return (loss if of is None else of(outputs, position[None]))[0], loss[0]

        found, pull, loss = vjp(values, weights, has_aux=True)  # type: ignore[misc]
        if found.ndim:
            (rows,) = vmap(pull)(torch.eye(len(found)).to(found))
        else:
            (rows,) = pull(torch.ones_like(found))
        return rows, loss

    per_example = vmap(gradients_and_loss, in_dims=(None, 0, 0, 0))
    positions = torch.arange(len(inputs), device=inputs.device)
    start = 0
    while start < len(inputs):
        rows = slice(start, min(start + block, len(inputs)))
        try:
            gradients, losses = per_example(trained, inputs[rows], labels[rows], positions[rows])
            norms = _norms(gradients)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or block == 1:
                raise
            block //= 2
            continue
        yield GradientBlock(rows, gradients, losses, norms)
        start = rows.stop


def _norms(gradients: dict[str, Tensor]) -> Tensor:
    """Of each example; in double precision no square of a float32 overflows."""
    # row by row: torch sums all of a tensor ten times as fast as along a dimension
    parts = [
        torch.stack([torch.linalg.vector_norm(row, dtype=torch.float64) for row in tensor])
        for tensor in gradients.values()
    ]
    return torch.linalg.vector_norm(torch.stack(parts), dim=0).float()


def out_of_memory(error: BaseException) -> bool:
    """Whether smaller blocks may help."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "allocate memory" in str(error)  # torch's CPU allocator raises a plain RuntimeError
    )
