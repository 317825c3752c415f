"""AFFD, the Kronecker-permuted fast Gaussian transform of arXiv:2402.03994 (Theorem 3.2).

The paper's operator on N = 2^k coordinates is R_D sqrt(N/D) H'' G H' B: random signs B, a
Walsh-Hadamard transform H' whose Kronecker factors have permuted rows, a Gaussian diagonal G, a
transform H'' whose factors have permuted columns, and R_D keeps the first D outputs. Three exact
rewritings make it cheap:

- H' = P' H with P' a Kronecker product of permutations, and G P' = P' G~ with G~ again iid
  Gaussian, so that P' is absorbed by the permutation of H'': one permutation remains.
- The first D rows of H_N read the index modulo D alone (D a power of two), so that H'' followed by
  R_D is: permute, fold modulo D, transform D points.
- That last transform is common to all blocks of coordinates, and to all tensors of a model: the
  folded blocks are added up first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsel_assets.sketching.blocks import block_sizes, factors, fold, next_power_of_two
from dsel_assets.sketching.fast import kernels
from dsel_assets.sketching.hadamard import hadamard
from dsel_assets.sketching.operator import Sketch, accumulation_dtype
from dsel_assets.sketching.philox import Device, normals, permutations, signs


class AFFD(Sketch):
    """Independent AFFD operators on blocks of 2^14 coordinates (or 4 D, if more), added up.

    If D is not a power of two, the last transform has the next power of two D' >= D points and the
    first D are kept. The last block has the least power of two, 4 D' at least, that holds the rest.
    On a spread x in blocks of n coordinates, D * Var(|Sx|^2) / |x|^4 = 2 (1 + 2 D'/n): 2.25 at
    n = 16 D' and never above 3, which is why no block is shorter than 4 D'. On the structured x
    that break other sketches it stays below 8.
    """

    kind = "affd"
    variance = 8.0

    def __init__(self, in_features: int, out_features: int, seed: int = 0, name: str = "") -> None:
        """See `Sketch`."""
        super().__init__(in_features, out_features, seed, name)
        self.points = next_power_of_two(out_features)
        self.sizes = block_sizes(in_features, 4 * self.points)

    def groups(self, coordinates: int) -> Iterator[tuple[int, int, int]]:
        """Blocks of one size together, about so many coordinates: first of them, size, count."""
        first = 0
        for size, blocks in Counter(self.sizes).items():
            most = max(1, coordinates // size)
            for done in range(0, blocks, most):
                count = min(most, blocks - done)
                yield first, size, count
                first += size * count

    def gains(self, first: int, size: int, count: int, device: Device = "cpu") -> Tensor:
        """The Gaussians of `count` blocks, over sqrt(size): H' becomes orthonormal. float32."""
        return (normals(self.key("gains"), first, size * count, device) * size**-0.5).float()

    def permutations(
        self, first: int, size: int, count: int, device: Device = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Of the two Kronecker factors of `count` blocks, [count, factor] each."""
        leading, trailing = factors(size, 2)
        return (
            permutations(self.key(f"leading/{size}"), first // size, count, leading, device),
            permutations(self.key(f"trailing/{size}"), first // size, count, trailing, device),
        )

    def _partial(self, x: Tensor) -> Tensor:
        if fast := kernels(x):
            return fast.affd(self, x)
        total = x.new_zeros(self.points, len(x), dtype=accumulation_dtype(x.dtype))
        for start, flips, gains, leading, trailing in self._blocks(x.device):
            tile = total.new_zeros(len(gains), len(x))
            part = x[:, start : start + len(flips)].T
            torch.mul(part, flips[:, None], out=tile[: len(flips)])
            tile = hadamard(tile).mul_(gains[:, None])
            tile = tile.unflatten(0, (len(leading), -1)).index_select(0, leading).flatten(0, 1)
            tile = fold(tile, max(self.points, len(trailing)))
            tile = tile.unflatten(0, (-1, len(trailing))).index_select(1, trailing)
            total += fold(tile.flatten(0, 1), self.points)
        return total.T

    def _partial_adjoint(self, total: Tensor) -> Tensor:
        if fast := kernels(total):
            return fast.affd_adjoint(self, total)
        x = total.new_empty(len(total), self.in_features)
        rows = total.T
        for start, flips, gains, leading, trailing in self._blocks(total.device):
            place = leading.argsort()[:, None] * len(trailing) + trailing.argsort()
            tile = rows.index_select(0, place.flatten() % self.points)
            tile = hadamard(tile.mul_(gains[:, None]))[: len(flips)]
            torch.mul(tile, flips[:, None], out=x[:, start : start + len(flips)].T)
        return x

    def _finish(self, total: Tensor) -> Tensor:
        kept = _hadamard_rows(total)[:, : self.out_features]
        return kept * self.out_features**-0.5

    def _finish_adjoint(self, y: Tensor) -> Tensor:
        padded = pad(y, (0, self.points - self.out_features))
        return _hadamard_rows(padded) * self.out_features**-0.5

    def _blocks(self, device: torch.device) -> Iterator[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
        """Of each block of n: start, signs [at most n], gains [n], permutations of its factors."""
        for start, size, _ in self.groups(1):
            filled = min(size, self.in_features - start)
            flips = signs(self.key("signs"), start, filled, device)
            leading, trailing = self.permutations(start, size, 1, device)
            yield start, flips, self.gains(start, size, 1, device), leading[0], trailing[0]


def _hadamard_rows(x: Tensor) -> Tensor:
    fast = kernels(x)
    return fast.hadamard(x) if fast else hadamard(x.T).T
