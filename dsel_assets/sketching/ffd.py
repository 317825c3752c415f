"""FFD, the transposed Fastfood of arXiv:2402.03994 (section 3.1)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsel_assets.sketching.blocks import BLOCK, fold, next_power_of_two
from dsel_assets.sketching.hadamard import hadamard
from dsel_assets.sketching.operator import Sketch, accumulation_dtype
from dsel_assets.sketching.philox import normals, permutations, signs


class FFD(Sketch):
    """B H P^T G H on every run of D' coordinates, the next power of two above D, added up.

    B: random signs, H: orthonormal Hadamard, P: a permutation, G: a Gaussian diagonal. The last run
    is padded with zeros. If D < D', the first D outputs are kept and scaled by sqrt(D'/D), which
    keeps S unbiased, as all entries of H have the same square.

    There is no promise: no random sign stands before G, so that |Sx|^2 = g^2 |x|^2, with relative
    variance 2, for an x in one run whose transform is one coordinate (Theorem 3.1). Spread inputs
    have D * Var(|Sx|^2) / |x|^4 = 2. Time p log D per row.
    """

    kind = "ffd"
    variance = float("inf")

    def __init__(self, in_features: int, out_features: int, seed: int = 0, name: str = "") -> None:
        """See `Sketch`."""
        super().__init__(in_features, out_features, seed, name)
        self.points = next_power_of_two(out_features)

    def _partial(self, x: Tensor) -> Tensor:
        total = x.new_zeros(self.points, len(x), dtype=accumulation_dtype(x.dtype))
        for start, gains, order, flips in self._chunks(x.device):
            part = x[:, start : start + order.numel()].T
            tile = total.new_zeros(order.numel(), len(x))
            tile[: len(part)] = part
            tile = hadamard(tile.unflatten(0, (-1, self.points)).transpose(0, 1)) * gains
            tile = hadamard(tile.take_along_dim(order[:, :, None], 0)) * flips
            total += fold(tile.transpose(0, 1), 1)[0]
        return total[: self.out_features].T.contiguous()

    def _partial_adjoint(self, total: Tensor) -> Tensor:
        x = total.new_empty(len(total), self.in_features)
        rows = total.new_zeros(self.points, 1, len(total))
        rows[: self.out_features, 0] = total.T
        for start, gains, order, flips in self._chunks(total.device):
            tile = hadamard(rows * flips)
            tile = hadamard(tile.take_along_dim(order.argsort(0)[:, :, None], 0) * gains)
            part = x[:, start : start + order.numel()].T
            part.copy_(tile.transpose(0, 1).flatten(0, 1)[: len(part)])
        return x

    def _chunks(self, device: torch.device) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Of each chunk of R runs: start, gains [D', R, 1], permutations [D', R], signs [D', R, 1].

        R is a power of two. Both Hadamard factors and the cut are scaled in the gains.
        """
        start = 0
        while start < self.in_features:
            runs = next_power_of_two(-(-(self.in_features - start) // self.points))
            runs = min(runs, max(1, BLOCK // self.points))
            size = runs * self.points
            gains = normals(self.key("gains"), start, size, device)
            gains = gains * (self.points * self.out_features) ** -0.5
            flips = signs(self.key("signs"), start, size, device)
            yield (
                start,
                gains.float().view(runs, -1).T[:, :, None],
                permutations(self.key("orders"), start // self.points, runs, self.points, device).T,
                flips.view(runs, -1).T[:, :, None],
            )
            start += size
