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

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from dsel_assets.sketching.hadamard import hadamard
from dsel_assets.sketching.operator import Sketch, accumulation_dtype
from dsel_assets.sketching.philox import normals, permutation, signs

_BLOCK = 2**14


class AFFD(Sketch):
    """Independent AFFD operators on blocks of 2^14 coordinates (or 4 D, if more), added up.

    If D is not a power of two, the last transform has the next power of two D' >= D points and the
    first D are kept. The last block has the least power of two, 4 D' at least, that holds the rest.
    On a spread x in blocks of n coordinates, D * Var(|Sx|^2) / |x|^4 = 2 (1 + 2 D'/n): 2.25 at
    n = 16 D' and never above 3, which is why no block is shorter than 4 D'. On the structured x
    that break other sketches it stays below 8.
    """

    kind = "affd"
    signs: Tensor
    gains: Tensor
    leading: Tensor
    trailing: Tensor

    def __init__(self, in_features: int, out_features: int, seed: int = 0, name: str = "") -> None:
        """See `Sketch`; keeps p signs, the Gaussians, and two small permutations a block."""
        super().__init__(in_features, out_features, seed, name)
        self.points = _next_power_of_two(out_features)
        block = max(_BLOCK, 4 * self.points)
        blocks, rest = divmod(in_features, block)
        self.sizes = [block] * blocks
        if rest:
            self.sizes.append(max(4 * self.points, _next_power_of_two(rest)))
        self.factors = [_factors(size) for size in self.sizes]

        scale = np.repeat(np.array(self.sizes) ** -0.5, self.sizes)  # makes H' orthonormal
        gains = normals(self._key("gains"), 0, sum(self.sizes)) * scale
        flips = signs(self._key("signs"), 0, in_features)
        self.register_buffer("gains", torch.from_numpy(gains).float(), persistent=False)
        self.register_buffer("signs", torch.from_numpy(flips).float(), persistent=False)
        for i, factor in enumerate(("leading", "trailing")):
            drawn = [
                permutation(self._key(f"{factor}/{block}"), sizes[i])
                for block, sizes in enumerate(self.factors)
            ]
            indices = torch.from_numpy(np.concatenate(drawn))
            self.register_buffer(factor, indices, persistent=False)

    def partial(self, x: Tensor) -> Tensor:
        """All but the last transform: [B, p] -> [B, D']."""
        total = x.new_zeros(self.points, len(x), dtype=accumulation_dtype(x.dtype))
        start = 0
        for size, gains, leading, trailing in self._blocks():
            part = x[:, start : start + size].T
            tile = total.new_zeros(size, len(x))
            torch.mul(part, self.signs[start : start + size, None], out=tile[: len(part)])
            tile = hadamard(tile).mul_(gains[:, None])
            tile = tile.unflatten(0, (len(leading), -1)).index_select(0, leading).flatten(0, 1)
            tile = _fold(tile, max(self.points, len(trailing)))
            tile = tile.unflatten(0, (-1, len(trailing))).index_select(1, trailing)
            total += _fold(tile.flatten(0, 1), self.points)
            start += size
        return total.T

    def partial_adjoint(self, total: Tensor) -> Tensor:
        """Adjoint of `partial`: [B, D'] -> [B, p]."""
        rows = total.T
        parts = []
        start = 0
        for size, gains, leading, trailing in self._blocks():
            place = leading.argsort()[:, None] * len(trailing) + trailing.argsort()
            tile = rows.index_select(0, place.flatten() % self.points)
            tile = hadamard(tile.mul_(gains[:, None]))
            flips = self.signs[start : start + size, None]
            parts.append(tile[: len(flips)] * flips)
            start += size
        return torch.cat(parts).T.contiguous()

    def finish(self, total: Tensor) -> Tensor:
        """The D'-point transform, cut to D: [B, D'] -> [B, D]."""
        kept = hadamard(total.T)[: self.out_features]
        return (kept * self.out_features**-0.5).T.contiguous()

    def finish_adjoint(self, y: Tensor) -> Tensor:
        """Adjoint of `finish`: [B, D] -> [B, D']."""
        padded = pad(super().finish_adjoint(y), (0, self.points - self.out_features))
        return (hadamard(padded.T) * self.out_features**-0.5).T

    def _blocks(self) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Of each block: size n, gains [n], permutations of the two factors of n."""
        leading, trailing = ([f[i] for f in self.factors] for i in (0, 1))
        return zip(
            self.sizes,
            self.gains.split(self.sizes),
            self.leading.split(leading),
            self.trailing.split(trailing),
            strict=True,
        )


def whole_affd(
    x: Tensor,
    signs: Tensor,
    gaussians: Tensor,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    out_features: int,
) -> Tensor:
    """AFFD as the paper writes it, on all N coordinates with dense N x N matrices: [N] -> [D].

    The reference that the tests hold `AFFD` against. rows, columns: a permutation for each
    Kronecker factor of H' and of H''; their lengths multiply to N.
    """
    first = torch.ones(1, 1, dtype=x.dtype)
    second = torch.ones(1, 1, dtype=x.dtype)
    for row, column in zip(rows, columns, strict=True):
        factor = hadamard(torch.eye(len(row), dtype=x.dtype)) / len(row) ** 0.5
        first = torch.kron(first, factor[row])
        second = torch.kron(second, factor[:, column])
    y = second @ (gaussians * (first @ (signs * x)))
    return (len(x) / out_features) ** 0.5 * y[:out_features]


def _next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _factors(size: int) -> tuple[int, int]:
    """A power of two as a product of two, the leading one not the larger."""
    leading = 1 << (size.bit_length() - 1) // 2
    return leading, size // leading


def _fold(x: Tensor, size: int) -> Tensor:
    """Add the rows whose indices agree modulo `size`: [n, B] -> [size, B], powers of two."""
    while len(x) > size:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x
