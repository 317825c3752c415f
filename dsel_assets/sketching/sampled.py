"""Sketches that spread the coordinates, sample some of them and multiply: SRHT, FJL and AFJL."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dsel_assets.sketching.blocks import BLOCK, block_sizes, next_power_of_two
from dsel_assets.sketching.operator import Sketch, accumulation_dtype
from dsel_assets.sketching.philox import integers, normals, permutations, signs
from dsel_assets.sketching.preconditioners import (
    PRECONDITIONERS,
    Preconditioner,
    check_preconditioner,
)
from dsel_assets.sketching.scatter import add_rows


class Sampled(Sketch):
    """sqrt(n/D) M R H B on blocks of n coordinates, added up.

    B are random signs, H is an orthogonal preconditioner, R takes D of its first outputs, M is a
    diagonal of unit variance and symmetric sign. The last block is padded with zeros.
    """

    sizes: list[int]  # n of each block, powers of two
    preconditioner: str = "hadamard"

    def _outputs(self, size: int) -> int:
        """Among how many first outputs of H on `size` coordinates R samples, a power of two."""
        return size

    def _sample(self, block: int, outputs: int, device: torch.device) -> Tensor:
        """R of a block, D indices below `outputs`: without replacement."""
        order = permutations(self.key(f"rows/{outputs}"), block, 1, outputs, device)[0]
        return order[: self.out_features]

    def _multipliers(self, block: int, device: torch.device) -> Tensor:
        """M of a block: [D]."""
        return normals(self.key("gains"), block * self.out_features, self.out_features, device)

    def _partial(self, x: Tensor) -> Tensor:
        dtype = accumulation_dtype(x.dtype)
        total = x.new_zeros(self.out_features, len(x), dtype=dtype)
        for start, flips, spread, rows, gains in self._blocks(x.device):
            tile = total.new_zeros(spread.size, len(x))
            part = x[:, start : start + len(flips)].T
            torch.mul(part, flips[:, None], out=tile[: len(flips)])
            total += spread.forward(tile).index_select(0, rows) * gains[:, None]
        return total.T.contiguous()

    def _partial_adjoint(self, total: Tensor) -> Tensor:
        x = total.new_empty(len(total), self.in_features)
        for start, flips, spread, rows, gains in self._blocks(total.device):
            tile = total.new_zeros(spread.kept, len(total))
            add_rows(tile, rows, total.T * gains[:, None])
            tile = spread.adjoint(tile)[: len(flips)]
            torch.mul(tile, flips[:, None], out=x[:, start : start + len(flips)].T)
        return x

    def _blocks(
        self, device: torch.device
    ) -> Iterator[tuple[int, Tensor, Preconditioner, Tensor, Tensor]]:
        """Of each block: start, signs [at most n], H, R [D], the scaled M [D]."""
        make = PRECONDITIONERS[self.preconditioner]
        start = 0
        for block, size in enumerate(self.sizes):
            outputs = self._outputs(size)
            spread = make(size, outputs, self.key(f"haar/{block}"), device)
            count = min(size, self.in_features - start)
            flips = spread.signs(self.key("signs"), start, count, device)
            gains = self._multipliers(block, device).double() * (size / self.out_features) ** 0.5
            yield start, flips, spread, self._sample(block, outputs, device), gains.float()
            start += size


class SRHT(Sampled):
    """Subsampled randomised Hadamard transform on blocks of 2^14 coordinates (or D' >= D, if more).

    D' is the next power of two; the last block has the least power of two, D' at least, that holds
    the rest. Rows are sampled without replacement in each block; M are signs, without which the
    constant column of H would put the first coordinates of all blocks into one direction. With
    q_b the share of the energy in block b of n_b coordinates,
    D * Var(|Sx|^2) / |x|^4 = 2 (1 - sum q_b^2 + sum (n_b-D)/(n_b-1) (q_b^2 - sum_{i in b} x_i^4)).
    Time p log n per row.
    """

    kind = "srht"

    def __init__(self, in_features: int, out_features: int, seed: int = 0, name: str = "") -> None:
        """See `Sketch`."""
        super().__init__(in_features, out_features, seed, name)
        self.sizes = block_sizes(in_features, next_power_of_two(out_features))

    def _multipliers(self, block: int, device: torch.device) -> Tensor:
        return signs(self.key("gains"), block * self.out_features, self.out_features, device)


class FJL(Sampled):
    """Fast Johnson-Lindenstrauss with one Gaussian a row, on all N = 2^k >= p coordinates.

    The sampled indices are independent (with replacement), so that D may exceed N. With hadamard
    D * Var(|Sx|^2) / |x|^4 = 8 - 6 sum x_i^4; with fft it is 17 at most, and with orthogonal up to
    3^(K+1) - 1, reached on one coordinate, K the number of factors. Time p log p, memory N per row.
    """

    kind = "fjl"
    variance = 8.0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        seed: int = 0,
        name: str = "",
        *,
        preconditioner: str = "hadamard",
    ) -> None:
        """See `Sketch`; preconditioner: hadamard, fft or orthogonal."""
        super().__init__(in_features, out_features, seed, name)
        self.sizes = [next_power_of_two(in_features)]
        self.preconditioner = check_preconditioner(preconditioner)

    @property
    def options(self) -> dict[str, Any]:
        """The preconditioner."""
        return {"preconditioner": self.preconditioner}

    def _sample(self, block: int, outputs: int, device: torch.device) -> Tensor:
        return integers(self.key("rows"), 0, self.out_features, outputs, device)


class AFJL(Sampled):
    """The paper's AFJL, R_D sqrt(n/D) G H' B, on blocks of 2^14 coordinates (or D' >= D, if more).

    D' is the next power of two. H' has permuted rows in its Kronecker factors, here of n/D' and D'
    points. The first D rows have one row of the first factor, whose signs B absorbs, and D of the
    permuted rows of the second: H' comes down to folding modulo D', D' points and a sample. The
    outputs of fft are sampled without replacement, those of orthogonal cut after D'.

    There is no promise: D * Var(|Sx|^2) / |x|^4 is about 8 for an x that is spread over one block,
    less over several (2 + 6 sum q_b^2, q_b the share of the energy), but of the order of D if the
    energy lies on a stride of D', as in a column of a weight matrix with a multiple of D' columns,
    or, with orthogonal, on few coordinates, a row or a column.
    """

    kind = "afjl"
    variance = float("inf")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        seed: int = 0,
        name: str = "",
        *,
        preconditioner: str = "hadamard",
        block: int = BLOCK,
    ) -> None:
        """See `Sketch`; preconditioner: hadamard, fft or orthogonal; block: rounded up to 2^k.

        One block, as in the paper, if `block` is not below in_features. ValueError if it is not
        positive.
        """
        super().__init__(in_features, out_features, seed, name)
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        self.points = next_power_of_two(out_features)
        self.block = next_power_of_two(block)
        self.sizes = block_sizes(in_features, self.points, self.block)
        self.preconditioner = check_preconditioner(preconditioner)

    @property
    def options(self) -> dict[str, Any]:
        """The preconditioner and the block."""
        return {"preconditioner": self.preconditioner, "block": self.block}

    def _outputs(self, size: int) -> int:
        return size if self.preconditioner == "fft" else self.points
