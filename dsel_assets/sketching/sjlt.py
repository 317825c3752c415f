"""The sparse Johnson-Lindenstrauss transform of Kane and Nelson (2014): hashed buckets."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dsel_assets.sketching.blocks import BLOCK
from dsel_assets.sketching.operator import Sketch, accumulation_dtype
from dsel_assets.sketching.philox import signs, words
from dsel_assets.sketching.scatter import add_rows


class SJLT(Sketch):
    """Every coordinate is added to c of the D outputs, with independent signs, over sqrt(c).

    The first output is uniform; the others lie, one each, in c - 1 equal parts of the D - 1 that
    follow it cyclically. So they are distinct, each pair of coordinates meets in c^2/D outputs on
    average, and Var<Sx, Sy> = (|x|^2 |y|^2 + <x,y>^2 - 2 sum x_i^2 y_i^2) / D whatever c is. c = 1
    is the CountSketch of Charikar et al. (2002). Needs no padding. Time c p per row.
    """

    kind = "sjlt"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        seed: int = 0,
        name: str = "",
        *,
        nonzeros: int = 4,
    ) -> None:
        """See `Sketch`; nonzeros: c, cut to D. ValueError if it is not positive."""
        super().__init__(in_features, out_features, seed, name)
        if nonzeros < 1:
            raise ValueError(f"nonzeros must be at least 1, got {nonzeros}")
        self.nonzeros = min(nonzeros, out_features)

    @property
    def options(self) -> dict[str, Any]:
        """The nonzeros of a column."""
        return {"nonzeros": self.nonzeros}

    def _partial(self, x: Tensor) -> Tensor:
        dtype = accumulation_dtype(x.dtype)
        total = x.new_zeros(self.out_features, len(x), dtype=dtype)
        for start, buckets, flips in self._chunks(x.device):
            part = x[:, start : start + flips.shape[1]].T.to(dtype)
            for places, flip in zip(buckets, flips, strict=True):
                add_rows(total, places, part * flip[:, None])
        return (total * self.nonzeros**-0.5).T.contiguous()

    def _partial_adjoint(self, total: Tensor) -> Tensor:
        x = total.new_zeros(len(total), self.in_features)
        rows = total.T * self.nonzeros**-0.5
        for start, buckets, flips in self._chunks(total.device):
            part = x[:, start : start + flips.shape[1]].T
            for places, flip in zip(buckets, flips, strict=True):
                part += rows.index_select(0, places) * flip[:, None]
        return x

    def _chunks(self, device: torch.device) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of each chunk of coordinates: start, buckets and signs [c, at most 2^14]."""
        c, D = self.nonzeros, self.out_features
        edges = [0] + [1 + (D - 1) * k // max(c - 1, 1) for k in range(c)]
        starts = torch.tensor(edges[:-1], device=device)
        bounds = torch.tensor([D, *(b - a for a, b in pairwise(edges[1:]))], device=device)
        for start in range(0, self.in_features, BLOCK):
            first, count = start * c, min(BLOCK, self.in_features - start) * c
            drawn = words(self.key("buckets"), first, count, device).view(-1, c)
            buckets = (drawn * bounds >> 32) + starts
            buckets[:, 1:] += buckets[:, :1]
            flips = signs(self.key("signs"), first, count, device).view(-1, c)
            yield start, (buckets % D).T.contiguous(), flips.T
