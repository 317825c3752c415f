"""LoGra's two-sided projection (Choe et al. 2024, arXiv:2405.13954): cheap, with larger errors."""

from __future__ import annotations

from math import isqrt
from typing import Any

import torch
from torch import Tensor

from dsel_assets.sketching.dense import combine
from dsel_assets.sketching.matrix import MatrixSketch, sum_over_tokens
from dsel_assets.sketching.operator import accumulation_dtype
from dsel_assets.sketching.philox import signs

_CHUNK = 2**22  # numbers of a factor that exist in the accumulation dtype at a time


class LoGra(MatrixSketch):
    """P G Q^T of a matrix G, flattened: P [k, rows] and Q [D/k, columns] of +-1/sqrt(their rows).

    D * Var(|SG|^2) / |G|^4 is about 2 + 2 (k + D/k) / r, where r = |G|_F^4 / |G^T G|_F^2 is the
    effective rank of G: near a CountSketch's 2 where G has many directions of like size, but 260 at
    D = 4096 on rank one, as a single token or a massive activation makes it. A vector has rank one:
    give it another sketch. Keeps k rows + D/k columns numbers. Time T (k rows + D/k columns) from T
    factors, by matrix products.
    """

    kind = "logra"
    variance = float("inf")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        seed: int = 0,
        name: str = "",
        *,
        columns: int = 1,
        kept_rows: int | None = None,
    ) -> None:
        """See `MatrixSketch`; kept_rows: k, by default the largest divisor of D up to its root.

        Raises ValueError if kept_rows does not divide D; at a prime D one side keeps 1.
        """
        super().__init__(in_features, out_features, seed, name, columns=columns)
        D = out_features
        k = max(k for k in range(1, isqrt(D) + 1) if D % k == 0) if kept_rows is None else kept_rows
        if k < 1 or D % k:
            raise ValueError(f"sketch {name!r}: kept_rows must divide {D}, got {k}")
        self.kept_rows = k
        self.left = self._projection("rows", k, self.rows)
        self.right = self._projection("columns", D // k, columns)

    @property
    def options(self) -> dict[str, Any]:
        """The columns of the matrix and the rows that are kept."""
        return super().options | {"kept_rows": self.kept_rows}

    def _of_factors(self, inputs: Tensor, output_gradients: Tensor, dtype: torch.dtype) -> Tensor:
        left, right = self.left.to(inputs.device, dtype), self.right.to(inputs.device, dtype)

        def projected(x: Tensor, d: Tensor) -> Tensor:
            return ((d.to(dtype) @ left).mT @ (x.to(dtype) @ right)).flatten(1)

        chunk = _CHUNK // max(self.rows, self.columns)
        return sum_over_tokens(projected, inputs, output_gradients, chunk)

    def _of_lookups(self, indices: Tensor, output_gradients: Tensor, dtype: torch.dtype) -> Tensor:
        left, right = self.left.to(indices.device, dtype), self.right.to(indices.device, dtype)

        def projected(index: Tensor, d: Tensor) -> Tensor:
            return (left[index].mT @ (d.to(dtype) @ right)).flatten(1)

        return sum_over_tokens(projected, indices, output_gradients, _CHUNK // self.columns)

    def _partial(self, x: Tensor) -> Tensor:
        dtype = accumulation_dtype(x.dtype)
        left, right = self.left.to(x.device, dtype), self.right.to(x.device, dtype)
        narrow = combine(x.reshape(-1, self.columns).to(dtype), right)
        narrow = narrow.view(len(x), self.rows, right.shape[1]).mT.flatten(0, 1)
        return combine(narrow, left).view(len(x), right.shape[1], self.kept_rows).mT.flatten(1)

    def _partial_adjoint(self, total: Tensor) -> Tensor:
        left, right = self.left.to(total), self.right.to(total)
        wide = combine(total.reshape(-1, right.shape[1]), right.T)
        wide = wide.view(len(total), self.kept_rows, self.columns).mT.flatten(0, 1)
        return combine(wide, left.T).view(len(total), self.columns, self.rows).mT.flatten(1)

    def _projection(self, stream: str, kept: int, size: int) -> Tensor:
        """A factor, transposed: [size, kept]."""
        return (
            (signs(self.key(stream), 0, size * kept).double() * kept**-0.5).float().view(size, kept)
        )
