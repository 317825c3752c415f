"""What every sketch is: a random linear map S: R^p -> R^D, with its adjoint and its identity."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd import Function

from dsel_assets.sketching.philox import Key, stream_key
from dsel_assets.sketching.versions import version_of

Rows = Callable[[Tensor], Tensor]  # a linear map of rows, [B, n] -> [B, m]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for double, float32 for single, half and bfloat16."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Linear(Function):
    """A linear map with its adjoint, for autograd and torch.func: `Linear.apply(x, map, adjoint)`.

    Its derivative in both directions is the map or the adjoint, whatever they are computed with.
    """

    @staticmethod
    def forward(x: Tensor, apply: Rows, adjoint: Rows) -> Tensor:
        """The map on rows [B, n] -> [B, m]."""
        return apply(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Rows, Rows], output: Tensor) -> None:
        """Keeps the two maps, and no tensor."""
        ctx.maps = inputs[1:]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The adjoint, itself differentiable."""
        return Linear.apply(gradients[0], *reversed(ctx.maps)), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """The map itself."""
        return Linear.apply(tangents[0], *ctx.maps)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, apply: Rows, adjoint: Rows) -> tuple[Tensor, int]:
        """Rows of rows are rows."""
        rows = x.movedim(in_dims[0], 0)
        return Linear.apply(rows.flatten(0, 1), apply, adjoint).unflatten(0, rows.shape[:2]), 0


class Sketch(nn.Module):
    """A random linear map S: R^p -> R^D with E|Sx|^2 = |x|^2 for every x.

    Calling it maps [..., p] to [..., D]; `adjoint` maps [..., D] to [..., p]. A row gives the same
    bits whatever stands beside it in the batch and however many threads run. NaN and infinity
    surface in the output. Autograd and torch.func pass through both directions, so that
    `grad(lambda w: loss(theta + sketch.adjoint(w)))` at 0 is the sketched gradient (the implicit
    mode of arXiv:2402.03994; `sketch(grad(loss)(theta))`, the explicit one, is faster).

    A sketch is `finish` after `partial`. Partial sketches of several tensors add up and `finish` is
    linear, so that a model's tensors share one `finish` (`ModelSketch`). Subclasses write
    `_partial` and `_partial_adjoint`, and `_finish` with its adjoint where it is not the identity,
    on rows. Randomness is drawn from Philox piece by piece: nothing of p entries is kept.
    """

    kind: ClassVar[str]
    variance: ClassVar[float] = 2.0  # D * Var(|Sx|^2) / |x|^4 is promised not to exceed this

    def __init__(self, in_features: int, out_features: int, seed: int = 0, name: str = "") -> None:
        """A sketch from p = in_features to D = out_features; (seed, name) select the randomness."""
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise ValueError(
                f"sketch {name!r}: in_features and out_features must be at least 1, "
                f"got {in_features} and {out_features}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.seed = seed
        self.name = name

    @property
    def options(self) -> dict[str, Any]:
        """What else determines the operator, as plain values; part of the identity."""
        return {}

    @property
    def identity(self) -> str:
        """JSON of all that determines the operator; equal on every machine and device."""
        fields = {
            "kind": self.kind,
            "version": version_of(self.kind),
            "in_features": self.in_features,
            "out_features": self.out_features,
            "seed": self.seed,
            "name": self.name,
        }
        return json.dumps(fields | self.options)

    def extra_repr(self) -> str:
        """The identity, for print(sketch)."""
        return self.identity

    def forward(self, x: Tensor) -> Tensor:
        """S x: [..., p] -> [..., D], float64 for double input, else float32.

        Raises ValueError if the last dimension is not p, TypeError if x is not floating point.
        """
        rows = self._rows(x, self.in_features, "input")
        return self.finish(self.partial(rows)).reshape(*x.shape[:-1], self.out_features)

    def adjoint(self, y: Tensor) -> Tensor:
        """S^T y: [..., D] -> [..., p], with <Sx, y> = <x, S^T y>; dtypes and errors as for S."""
        rows = self._rows(y, self.out_features, "adjoint's input")
        return self.partial_adjoint(self.finish_adjoint(rows)).reshape(
            *y.shape[:-1], self.in_features
        )

    def partial(self, x: Tensor) -> Tensor:
        """The part of S that is the tensor's own: [B, p] -> [B, D'] in the accumulation dtype."""
        return Linear.apply(x, self._partial, self._partial_adjoint)

    def partial_adjoint(self, total: Tensor) -> Tensor:
        """Adjoint of `partial`: [B, D'] -> [B, p]."""
        return Linear.apply(total, self._partial_adjoint, self._partial)

    def finish(self, total: Tensor) -> Tensor:
        """The part of S that depends on D alone: a sum of partial sketches [B, D'] -> [B, D]."""
        return Linear.apply(total, self._finish, self._finish_adjoint)

    def finish_adjoint(self, y: Tensor) -> Tensor:
        """Adjoint of `finish`: [B, D] -> [B, D'] in the accumulation dtype."""
        return Linear.apply(y.to(accumulation_dtype(y.dtype)), self._finish_adjoint, self._finish)

    def _partial(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _partial_adjoint(self, total: Tensor) -> Tensor:
        raise NotImplementedError

    def _finish(self, total: Tensor) -> Tensor:
        return total

    def _finish_adjoint(self, y: Tensor) -> Tensor:
        return y

    def key(self, stream: str) -> Key:
        """The Philox key of one of the operator's streams."""
        return stream_key(self.seed, self.name, f"{self.kind}/{stream}")

    def _rows(self, x: Tensor, features: int, what: str) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != features:
            raise ValueError(
                f"{self.kind} sketch {self.name!r}: the last dimension of the {what} must be "
                f"{features}, got shape {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"{self.kind} sketch {self.name!r}: the {what} must be floating point, "
                f"got {x.dtype}"
            )
        return x.reshape(-1, features)
