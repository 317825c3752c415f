"""The dense Gaussian sketch: the reference that others are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from dsel_assets.sketching.operator import Sketch, accumulation_dtype
from dsel_assets.sketching.philox import normals

_COLUMNS = 256  # of S that exist at a time


class Gaussian(Sketch):
    """S with independent N(0, 1/D) entries, drawn anew in blocks of columns at every call.

    Relative variance of |Sx|^2 is exactly 2/D for every x. Time p*D per row, memory O(D).
    """

    kind = "gaussian"

    def partial(self, x: Tensor) -> Tensor:
        """S x, one block of coordinates after the other: [B, p] -> [B, D]."""
        total = x.new_zeros(len(x), self.out_features, dtype=accumulation_dtype(x.dtype))
        for start in range(0, self.in_features, _COLUMNS):
            block = self._block(start, x.device)
            total += _combine(x[:, start : start + len(block)].to(total.dtype), block)
        return total

    def partial_adjoint(self, total: Tensor) -> Tensor:
        """S^T y: [B, D] -> [B, p]."""
        starts = range(0, self.in_features, _COLUMNS)
        blocks = (self._block(start, total.device) for start in starts)
        return torch.cat([_combine(total, block.T.contiguous()) for block in blocks], dim=1)

    def _block(self, start: int, device: torch.device) -> Tensor:
        """Columns start, start+1, ... of S as rows: [at most _COLUMNS, D] float32."""
        columns = min(_COLUMNS, self.in_features - start)
        D = self.out_features
        entries = normals(self._key("entries"), start * D, columns * D) / D**0.5
        return torch.from_numpy(entries.reshape(columns, D)).to(device, torch.float32)


def _combine(coefficients: Tensor, rows: Tensor) -> Tensor:
    """Add up coefficients @ rows, [B, k] x [k, m] -> [B, m], in the order of k.

    A matrix product would choose its order of summation, hence its bits, by the batch's shape.
    """
    total = coefficients.new_zeros(len(coefficients), rows.shape[1])
    for coefficient, row in zip(coefficients.T, rows, strict=True):
        total += coefficient[:, None] * row
    return total
