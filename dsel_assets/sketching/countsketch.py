"""Blockwise-circulant CountSketch: one read of the gradient, one addition an entry."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsel_assets.sketching.fast import kernels
from dsel_assets.sketching.operator import Sketch, accumulation_dtype
from dsel_assets.sketching.philox import integers, signs


class CountSketch(Sketch):
    """Flip every coordinate's sign, shift every run of D coordinates cyclically, add the runs up.

    Coordinates of one run never collide, those of different runs with probability 1/D, so that
    Var<Sx, Sy> = 1/D * sum over pairs i<j of different runs of (x_i y_j + x_j y_i)^2: never more
    than that of Charikar et al.'s CountSketch, or of a dense Gaussian. A shorter last run needs no
    padding.
    """

    kind = "countsketch"

    def __init__(self, in_features: int, out_features: int, seed: int = 0, name: str = "") -> None:
        """See `Sketch`; keeps one shift a run."""
        super().__init__(in_features, out_features, seed, name)
        runs = -(-in_features // out_features)
        self.shifts = integers(self.key("shifts"), 0, runs, out_features)

    def _partial(self, x: Tensor) -> Tensor:
        if fast := kernels(x):
            return fast.countsketch(x, self.shifts, self.out_features, self.key("signs"))
        total = x.new_zeros(len(x), self.out_features, dtype=accumulation_dtype(x.dtype))
        for start, shift, flips in self._runs(x.device):
            run = x[:, start : start + len(flips)] * flips
            total += pad(run, (0, self.out_features - len(flips))).roll(shift, dims=1)
        return total

    def _partial_adjoint(self, total: Tensor) -> Tensor:
        if fast := kernels(total):
            return fast.countsketch_adjoint(total, self.shifts, self.in_features, self.key("signs"))
        x = total.new_empty(len(total), self.in_features)
        for start, shift, flips in self._runs(total.device):
            run = total.roll(-shift, dims=1)[:, : len(flips)]
            torch.mul(run, flips, out=x[:, start : start + len(flips)])
        return x

    def _runs(self, device: torch.device) -> Iterator[tuple[int, int, Tensor]]:
        """Of each run: where it starts, its shift, its signs."""
        D = self.out_features
        for start, shift in zip(range(0, self.in_features, D), self.shifts.tolist(), strict=True):
            size = min(D, self.in_features - start)
            yield start, shift, signs(self.key("signs"), start, size, device)
