"""QK, a Kronecker product of random orthogonal matrices (arXiv:2402.03994, Theorem 3.3)."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsel_assets.sketching.blocks import factors, next_power_of_two
from dsel_assets.sketching.kronecker import haar, kronecker
from dsel_assets.sketching.operator import Sketch, accumulation_dtype
from dsel_assets.sketching.preconditioners import rows_kept

_LARGEST = 1024  # factor of the paper's listing


class QK(Sketch):
    """sqrt(N/D) (Q_1 kron ... kron Q_K), Q_i the first D_i rows of a Haar orthogonal B_i x B_i.

    x is padded with zeros to N, the power of two that is not below p and D; the outputs are cut
    from the next power of two to D, so that S S^T = (N/D) I.

    layout "balanced": two factors, B_1 and B_2 about sqrt(N), D_1 and D_2 about sqrt(D).
    layout "listed": the paper's listing, square factors of at most 1024, the smaller one leading,
    and a flat cut to D, which leaves few rows of the leading one, often D_1 = 1.

    There is no promise: D * Var(|Sx|^2) / |x|^4 is 2 on spread inputs and of the order of D / D_1
    on a rank-one x, one row, one column or one coordinate. Time p D_1 per row.
    """

    kind = "qk"
    variance = float("inf")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        seed: int = 0,
        name: str = "",
        *,
        layout: str = "balanced",
    ) -> None:
        """See `Sketch`; ValueError for another layout."""
        super().__init__(in_features, out_features, seed, name)
        outputs = next_power_of_two(out_features)
        self.size = max(next_power_of_two(in_features), outputs)
        self.layout = layout
        if layout == "balanced":
            self.columns, self.rows = factors(self.size, 2), factors(outputs, 2)
        elif layout == "listed":
            self.columns = _listed(self.size)
            self.rows = rows_kept(self.columns, out_features)
        else:
            raise ValueError(f"layout must be balanced or listed, got {layout!r}")

    @property
    def options(self) -> dict[str, Any]:
        """The layout."""
        return {"layout": self.layout}

    def _partial(self, x: Tensor) -> Tensor:
        tile = x.new_zeros(self.size, len(x), dtype=accumulation_dtype(x.dtype))
        tile[: self.in_features] = x.T
        y = kronecker(self._matrices(x.device), tile)[: self.out_features]
        return (y * self._scale).T.contiguous()

    def _partial_adjoint(self, total: Tensor) -> Tensor:
        tile = pad(total.T * self._scale, (0, 0, 0, prod(self.rows) - self.out_features))
        x = kronecker([matrix.T for matrix in self._matrices(total.device)], tile)
        return x[: self.in_features].T.contiguous()

    @property
    def _scale(self) -> float:
        return (self.size / self.out_features) ** 0.5

    def _matrices(self, device: torch.device) -> list[Tensor]:
        """Drawn anew at every call, [D_i, B_i] each."""
        return haar(self.key("factors"), self.rows, self.columns, device)


def _listed(size: int) -> tuple[int, ...]:
    """Factors of a power of two: as many of _LARGEST as divide it, the rest leading."""
    count = (size.bit_length() - 1) // (_LARGEST.bit_length() - 1)
    rest = size // _LARGEST**count
    return (rest,) * (rest > 1 or not count) + (_LARGEST,) * count
