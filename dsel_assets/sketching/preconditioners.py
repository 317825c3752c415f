"""Orthogonal maps that spread a vector over its coordinates: the variants of arXiv:2402.03994."""

from __future__ import annotations

from math import prod
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsel_assets.sketching.blocks import factors, fold
from dsel_assets.sketching.hadamard import hadamard
from dsel_assets.sketching.kronecker import haar, kronecker
from dsel_assets.sketching.philox import Key, signs

_EXPONENT = 7  # of two: the largest factor of the orthogonal variant


class Preconditioner:
    """The first m outputs of an orthogonal map of n coordinates, both powers of two."""

    fixed: ClassVar[bool] = True  # else random in itself, with neither signs nor permutations

    def __init__(self, size: int, kept: int, key: Key, device: torch.device) -> None:
        """size, kept: n and m <= n; key: of what is random in it."""
        self.size = size
        self.kept = kept

    @classmethod
    def signs(cls, key: Key, start: int, count: int, device: torch.device) -> Tensor:
        """The diagonal that has to stand before it: [count] int8."""
        if cls.fixed:
            return signs(key, start, count, device)
        return torch.ones(count, dtype=torch.int8, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """The map on columns: [n, B] -> [m, B]."""
        raise NotImplementedError

    def adjoint(self, y: Tensor) -> Tensor:
        """Its transpose: [m, B] -> [n, B]."""
        raise NotImplementedError


class Hadamard(Preconditioner):
    """Walsh-Hadamard: its first m rows are those of m points on the coordinates modulo m."""

    def forward(self, x: Tensor) -> Tensor:
        """Folded first, then a transform of m points."""
        return hadamard(fold(x, self.kept)) * self.size**-0.5

    def adjoint(self, y: Tensor) -> Tensor:
        """A transform of m points, then copies."""
        return (hadamard(y) * self.size**-0.5).repeat(self.size // self.kept, 1)


class Fourier(Preconditioner):
    """The real Fourier transform: constant, alternating, then cosine and sine by frequency.

    Its entries differ in size, so that a sketch has to sample its outputs, or permute its inputs.
    """

    def forward(self, x: Tensor) -> Tensor:
        """By torch.fft."""
        if self.size == 1:
            return x
        z = torch.view_as_real(torch.fft.rfft(_paired(x), dim=0, norm="ortho")).movedim(2, 1)
        ends = z[[0, -1], 0]
        waves = z[1:-1].flatten(0, 1) * 2**0.5
        return torch.cat((ends, waves))[: self.kept, : x.shape[1]]

    def adjoint(self, y: Tensor) -> Tensor:
        """By torch.fft, the inverse transform."""
        if self.size == 1:
            return y
        padded = pad(_paired(y), (0, 0, 0, self.size - self.kept))
        ends = pad(padded[:2, None], (0, 0, 0, 1))
        waves = padded[2:].unflatten(0, (-1, 2)) * 2**-0.5
        z = torch.cat((ends[:1], waves, ends[1:])).movedim(1, 2).contiguous()
        x = torch.fft.irfft(torch.view_as_complex(z), n=self.size, dim=0, norm="ortho")
        return x[:, : y.shape[1]]


class Orthogonal(Preconditioner):
    """A Kronecker product of independent Haar matrices of at most 128 points."""

    fixed = False

    def __init__(self, size: int, kept: int, key: Key, device: torch.device) -> None:
        """Draws of each matrix the rows that the first m outputs need."""
        super().__init__(size, kept, key, device)
        count = max(1, -(-(size.bit_length() - 1) // _EXPONENT))
        columns = factors(size, count)
        self.matrices = haar(key, rows_kept(columns, kept), columns, device)

    def forward(self, x: Tensor) -> Tensor:
        """Factor by factor."""
        return kronecker(self.matrices, x)[: self.kept]

    def adjoint(self, y: Tensor) -> Tensor:
        """Factor by factor, transposed."""
        rows = prod(len(matrix) for matrix in self.matrices)
        return kronecker([m.T for m in self.matrices], pad(y, (0, 0, 0, rows - self.kept)))


PRECONDITIONERS: dict[str, type[Preconditioner]] = {
    "hadamard": Hadamard,
    "fft": Fourier,
    "orthogonal": Orthogonal,
}


def check_preconditioner(name: str) -> str:
    """The name itself; ValueError if no preconditioner is called so."""
    if name not in PRECONDITIONERS:
        raise ValueError(
            f"preconditioner must be one of {', '.join(PRECONDITIONERS)}, got {name!r}"
        )
    return name


def rows_kept(columns: tuple[int, ...], count: int) -> tuple[int, ...]:
    """How many rows of each square Kronecker factor its product's first `count` rows need."""
    kept = []
    for size in reversed(columns):
        kept.append(min(size, count))
        count = -(-count // size)
    return tuple(reversed(kept))


def _paired(x: Tensor) -> Tensor:
    """Two columns at least: a lone transform takes another path, with other bits."""
    return pad(x, (0, max(0, 2 - x.shape[1])))
