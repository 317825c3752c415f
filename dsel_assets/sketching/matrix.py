"""Sketches of a matrix that need its factors only, as a linear layer's gradient has them."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from dsel_assets.sketching.operator import Sketch, accumulation_dtype


class MatrixSketch(Sketch):
    """A sketch of flattened matrices [rows, columns] that can be had from their factors.

    A linear layer's weight gradient is G = sum_t d_t x_t^T [out, in] over its tokens: d_t what
    arrives at its outputs, x_t its inputs. `sketch.of_factors(x, d)` is `sketch(G.flatten(1))` to
    rounding, and G never exists. Autograd does not pass through `of_factors` and `of_lookups`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        seed: int = 0,
        name: str = "",
        *,
        columns: int = 1,
    ) -> None:
        """See `Sketch`; columns: of the matrix, whose rows are in_features / columns.

        Raises ValueError if there are no columns or they do not divide in_features.
        """
        super().__init__(in_features, out_features, seed, name)
        if columns < 1 or in_features % columns:
            raise ValueError(
                f"sketch {name!r}: columns must divide the {in_features} entries, got {columns}"
            )
        self.rows, self.columns = in_features // columns, columns

    @property
    def options(self) -> dict[str, Any]:
        """The columns of the matrix."""
        return {"columns": self.columns}

    @torch.no_grad()
    def of_factors(self, inputs: Tensor, output_gradients: Tensor) -> Tensor:
        """Sketch of sum_t d_t x_t^T: x [n, T, columns] and d [n, T, rows] to [n, D].

        float64 if one of them is double, else float32. Tokens are streamed: what exists beside the
        output does not grow with T. Raises ValueError for other shapes, TypeError if they are not
        floating point.
        """
        dtype = self._check(inputs, (self.columns,), "inputs")
        dtype = torch.promote_types(dtype, self._check(output_gradients, (self.rows,), "gradients"))
        self._check_tokens(inputs, output_gradients)
        if not len(inputs) or not inputs.shape[1]:
            return inputs.new_zeros(len(inputs), self.out_features, dtype=dtype)
        with torch.autocast(inputs.device.type, enabled=False):
            return self._of_factors(inputs, output_gradients, dtype)

    @torch.no_grad()
    def of_lookups(self, indices: Tensor, output_gradients: Tensor) -> Tensor:
        """Sketch of the matrix that has the sum of d_t over t with indices_t = r as its row r.

        It is the gradient of an embedding: indices [n, T] int64 and d [n, T, columns] to [n, D].
        Dtypes and errors as for `of_factors`; IndexError for an index outside of the rows.
        """
        dtype = self._check(output_gradients, (self.columns,), "gradients")
        self._check_tokens(indices, output_gradients)
        if not indices.numel():
            return output_gradients.new_zeros(len(indices), self.out_features, dtype=dtype)
        least, most = int(indices.min()), int(indices.max())
        if least < 0 or most >= self.rows:
            raise IndexError(
                f"{self.kind} sketch {self.name!r}: indices must be 0 to {self.rows - 1}, "
                f"got {least} to {most}"
            )
        with torch.autocast(indices.device.type, enabled=False):
            return self._of_lookups(indices, output_gradients, dtype)

    def _of_factors(self, inputs: Tensor, output_gradients: Tensor, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def _of_lookups(self, indices: Tensor, output_gradients: Tensor, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError

    def _check(self, x: Tensor, features: tuple[int], what: str) -> torch.dtype:
        if x.ndim != 3 or x.shape[2:] != features:
            raise ValueError(
                f"{self.kind} sketch {self.name!r}: the {what} must be [n, T, {features[0]}], "
                f"got shape {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(
                f"{self.kind} sketch {self.name!r}: the {what} must be floating point, "
                f"got {x.dtype}"
            )
        return accumulation_dtype(x.dtype)

    def _check_tokens(self, left: Tensor, right: Tensor) -> None:
        if left.shape[:2] != right.shape[:2]:
            raise ValueError(
                f"{self.kind} sketch {self.name!r}: the factors' tokens differ: "
                f"{tuple(left.shape[:2])} and {tuple(right.shape[:2])}"
            )


def sum_over_tokens(
    product: Callable[[Tensor, Tensor], Tensor], left: Tensor, right: Tensor, chunk: int
) -> Tensor:
    """Sum of product(left, right) over tokens, at most `chunk` of them at a time: -> [n, m].

    left, right: [n, T, ...], not empty; product: of slices [e, t, ...] of both to [e, m]. How an
    example's tokens are cut depends on T and `chunk` alone.
    """
    chunk = max(chunk, 1)
    together = max(chunk // left.shape[1], 1)
    sums = (
        reduce(add, map(product, x.split(chunk, 1), y.split(chunk, 1)))
        for x, y in zip(left.split(together), right.split(together), strict=True)
    )
    return torch.cat(list(sums))
