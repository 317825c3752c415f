"""Blockwise-circulant CountSketch: one read of the gradient, one addition an entry."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsel_assets.sketching.operator import Sketch, accumulation_dtype
from dsel_assets.sketching.philox import integers, signs


class CountSketch(Sketch):
    """Flip every coordinate's sign, shift every run of D coordinates cyclically, add the runs up.

    Coordinates of one run never collide, those of different runs with probability 1/D, so that
    Var<Sx, Sy> = 1/D * sum over pairs i<j of different runs of (x_i y_j + x_j y_i)^2: never more
    than that of Charikar et al.'s CountSketch, or of a dense Gaussian.
    """

    kind = "countsketch"
    signs: Tensor

    def __init__(self, in_features: int, out_features: int, seed: int = 0, name: str = "") -> None:
        """See `Sketch`; keeps p signs and one shift a run."""
        super().__init__(in_features, out_features, seed, name)
        flips = torch.from_numpy(signs(self._key("signs"), 0, in_features)).float()
        self.register_buffer("signs", flips, persistent=False)
        runs = -(-in_features // out_features)
        self.shifts: list[int] = integers(self._key("shifts"), 0, runs, out_features).tolist()

    def partial(self, x: Tensor) -> Tensor:
        """S x: [B, p] -> [B, D]."""
        D = self.out_features
        total = x.new_zeros(len(x), D, dtype=accumulation_dtype(x.dtype))
        for start, shift in zip(range(0, self.in_features, D), self.shifts, strict=True):
            run = x[:, start : start + D] * self.signs[start : start + D]
            total += pad(run, (0, D - run.shape[1])).roll(shift, dims=1)
        return total

    def partial_adjoint(self, total: Tensor) -> Tensor:
        """S^T y: [B, D] -> [B, p]."""
        runs = torch.cat([total.roll(-shift, dims=1) for shift in self.shifts], dim=1)
        return runs[:, : self.in_features] * self.signs
