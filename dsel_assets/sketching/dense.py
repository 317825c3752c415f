"""The dense sketches: the references that others are measured against."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsel_assets.sketching.operator import Sketch, accumulation_dtype
from dsel_assets.sketching.philox import normals, signs

_COLUMNS = 256  # of S that exist at a time


class Dense(Sketch):
    """S with independent entries, drawn anew in blocks of columns at every call.

    Time p*D per row, memory O(D).
    """

    def _entries(self, start: int, count: int, device: torch.device) -> Tensor:
        """Entries of unit variance, S read column by column: [count]."""
        raise NotImplementedError

    def _partial(self, x: Tensor) -> Tensor:
        total = x.new_zeros(len(x), self.out_features, dtype=accumulation_dtype(x.dtype))
        for start, columns in self._blocks(x.device):
            total += combine(x[:, start : start + len(columns)].to(total.dtype), columns)
        return total

    def _partial_adjoint(self, total: Tensor) -> Tensor:
        blocks = (columns.T.contiguous() for _, columns in self._blocks(total.device))
        return torch.cat([combine(total, block) for block in blocks], dim=1)

    def _blocks(self, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """Of each block: where it starts, its columns of S as rows [at most _COLUMNS, D]."""
        D = self.out_features
        for start in range(0, self.in_features, _COLUMNS):
            size = min(_COLUMNS, self.in_features - start)
            entries = self._entries(start * D, size * D, device).double() / D**0.5
            yield start, entries.float().reshape(size, D)


class Gaussian(Dense):
    """Entries N(0, 1/D): the relative variance of |Sx|^2 is exactly 2/D for every x."""

    kind = "gaussian"

    def _entries(self, start: int, count: int, device: torch.device) -> Tensor:
        return normals(self.key("entries"), start, count, device)


class Rademacher(Dense):
    """Entries +-1/sqrt(D): Var<Sx, Sy> = (|x|^2 |y|^2 + <x,y>^2 - 2 sum x_i^2 y_i^2) / D."""

    kind = "rademacher"

    def _entries(self, start: int, count: int, device: torch.device) -> Tensor:
        return signs(self.key("entries"), start, count, device)


def combine(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Add up coefficients @ rows, [B, k] x [k, m] -> [B, m], in the order of k.

    A matrix product would choose its order of summation, hence its bits, by the batch's shape.
    """
    total = coefficients.new_zeros(len(coefficients), rows.shape[1])
    for coefficient, row in zip(coefficients.T, rows, strict=True):
        total += coefficient[:, None] * row
    return total
