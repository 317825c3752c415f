"""A whole model's gradient, sketched tensor by tensor; no flat gradient exists."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dsel_assets.sketching.kinds import KINDS, make_sketch
from dsel_assets.sketching.matrix import MatrixSketch
from dsel_assets.sketching.operator import Sketch
from dsel_assets.sketching.tensorsketch import TensorSketch


class ModelSketch(nn.Module):
    """Independent sketches of a model's tensors, added up in one D-vector.

    Each tensor's randomness is keyed by its name, so its sketch does not depend on which other
    tensors are trained. The sum is itself an unbiased sketch of the concatenated gradient.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        kind: str,
        out_features: int,
        seed: int = 0,
        **options: Any,
    ) -> None:
        """shapes: of each tensor by name, in order; the rest as in `make_sketch`.

        Raises ValueError if there is no tensor, or for what `make_sketch` refuses.
        """
        super().__init__()
        if not shapes:
            raise ValueError("no tensor to sketch: shapes is empty")
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.out_features = out_features
        self.sketches = nn.ModuleList(
            _of_tensor(kind, shape, out_features, seed, name, options)
            for name, shape in self.shapes.items()
        )

    @property
    def identity(self) -> str:
        """JSON of the ordered tensors with their shapes and their sketches' identities."""
        shapes = list(self.shapes.items())
        return json.dumps({"shapes": shapes, "sketches": [s.identity for s in self._sketches()]})

    def forward(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Sketch per-example gradients {name: [B, *shape]} to [B, D].

        The dtype is that of `Sketch`. Raises ValueError, naming the tensor, if one is missing,
        unknown or of another shape.
        """
        self._check(gradients)
        sketches = self._sketches()
        partials = (
            sketch.partial(gradients[sketch.name].reshape(-1, sketch.in_features))
            for sketch in sketches
        )
        total = next(partials)
        for partial in partials:
            total = total + partial
        return sketches[0].finish(total)

    def adjoint(self, y: Tensor) -> dict[str, Tensor]:
        """S^T y by tensor: [B, D] -> {name: [B, *shape]}; ValueError if y is not [B, D]."""
        if y.ndim != 2 or y.shape[1] != self.out_features:
            raise ValueError(f"expected [B, {self.out_features}], got shape {tuple(y.shape)}")
        sketches = self._sketches()
        total = sketches[0].finish_adjoint(y)
        return {
            sketch.name: sketch.partial_adjoint(total).reshape(-1, *self.shapes[sketch.name])
            for sketch in sketches
        }

    def of_matrices(self) -> list[MatrixSketch]:
        """The tensors' sketches, if they take the factors of a gradient; else none."""
        return [sketch for sketch in self._sketches() if isinstance(sketch, MatrixSketch)]

    def _sketches(self) -> list[Sketch]:
        return list(self.sketches)  # type: ignore[arg-type]

    def _check(self, gradients: Mapping[str, Tensor]) -> None:
        missing = self.shapes.keys() - gradients.keys()
        extra = gradients.keys() - self.shapes.keys()
        if missing or extra:
            raise ValueError(
                f"the gradients do not match the sketched tensors: missing {sorted(missing)}, "
                f"unknown {sorted(extra)}"
            )
        first = gradients[next(iter(self.shapes))]
        batch = first.shape[0] if first.ndim else 1
        for name, shape in self.shapes.items():
            expected, got = (batch, *shape), tuple(gradients[name].shape)
            if got != expected:
                raise ValueError(f"gradient of {name!r}: expected shape {expected}, got {got}")
            if not gradients[name].is_floating_point():
                raise TypeError(f"gradient of {name!r}: {gradients[name].dtype} is not floating")


def _of_tensor(
    kind: str,
    shape: Sequence[int],
    out_features: int,
    seed: int,
    name: str,
    options: dict[str, Any],
) -> Sketch:
    """As `make_sketch`; a matrix sketch takes the first dimension for rows, the rest for columns.

    A vector has rank one, on which LoGra fails: it gets a TensorSketch.
    """
    if issubclass(KINDS.get(kind, Sketch), MatrixSketch):
        options = options | {"columns": max(1, math.prod(shape[1:]))}
        if len(shape) < 2:
            kind, options = TensorSketch.kind, {"columns": 1}
    return make_sketch(kind, math.prod(shape), out_features, seed, name, **options)
