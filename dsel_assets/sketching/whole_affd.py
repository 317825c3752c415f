"""AFFD as arXiv:2402.03994 writes it (Theorem 3.2), step by step on all coordinates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsel_assets.sketching.blocks import factors, next_power_of_two
from dsel_assets.sketching.operator import Sketch, accumulation_dtype
from dsel_assets.sketching.philox import normals, permutations
from dsel_assets.sketching.preconditioners import (
    PRECONDITIONERS,
    Preconditioner,
    check_preconditioner,
)


class WholeAFFD(Sketch):
    """R_D sqrt(N/D) H'' G H' B on N coordinates, the power of two that is not below p and D.

    B: random signs, G: a Gaussian diagonal, R_D keeps the first D outputs; x is padded with zeros.
    H' has permuted rows in its two Kronecker factors, H'' permuted columns. The fft has no factors:
    its outputs and inputs are permuted in the same way. The orthogonal maps, random themselves, go
    with neither permutations nor signs. `AFFD` does the same faster, block by block.

    With hadamard and fft, D * Var(|Sx|^2) / |x|^4 is 2 (1 + 2 D/N) on spread inputs; the promise
    does not hold for orthogonal on few coordinates, a row, a column or a rank-one x. Time p log p,
    memory N per row.
    """

    kind = "affd_whole"
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
        self.points = next_power_of_two(out_features)
        self.size = max(next_power_of_two(in_features), self.points)
        self.preconditioner = check_preconditioner(preconditioner)

    @property
    def options(self) -> dict[str, Any]:
        """The preconditioner."""
        return {"preconditioner": self.preconditioner}

    def _partial(self, x: Tensor) -> Tensor:
        first, second = self._transforms(x.device)
        flips, gains = self._diagonals(x.device)
        tile = x.new_zeros(self.size, len(x), dtype=accumulation_dtype(x.dtype))
        torch.mul(x.T, flips[:, None], out=tile[: self.in_features])
        tile = first.forward(tile).index_select(0, self._order("rows", x.device))
        tile *= gains[:, None]
        tile = torch.empty_like(tile).index_copy_(0, self._order("columns", x.device), tile)
        return second.forward(tile)[: self.out_features].T.contiguous()

    def _partial_adjoint(self, total: Tensor) -> Tensor:
        first, second = self._transforms(total.device)
        flips, gains = self._diagonals(total.device)
        tile = second.adjoint(pad(total.T, (0, 0, 0, self.points - self.out_features)))
        tile = tile.index_select(0, self._order("columns", total.device)) * gains[:, None]
        tile = torch.empty_like(tile).index_copy_(0, self._order("rows", total.device), tile)
        return (first.adjoint(tile)[: self.in_features] * flips[:, None]).T.contiguous()

    def _transforms(self, device: torch.device) -> tuple[Preconditioner, Preconditioner]:
        """H', and H'' with no more outputs than R_D needs."""
        make = PRECONDITIONERS[self.preconditioner]
        return (
            make(self.size, self.size, self.key("haar/first"), device),
            make(self.size, self.points, self.key("haar/second"), device),
        )

    def _diagonals(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """B [p], sqrt(N/D) G [N]."""
        flips = PRECONDITIONERS[self.preconditioner].signs(
            self.key("signs"), 0, self.in_features, device
        )
        gains = normals(self.key("gains"), 0, self.size, device)
        return flips, (gains * (self.size / self.out_features) ** 0.5).float()

    def _order(self, stream: str, device: torch.device) -> Tensor:
        """A Kronecker product of two permutations: [N]."""
        if not PRECONDITIONERS[self.preconditioner].fixed:
            return torch.arange(self.size, device=device)
        leading, trailing = (
            permutations(self.key(f"{stream}/{i}"), 0, 1, size, device)[0]
            for i, size in enumerate(factors(self.size, 2))
        )
        return (leading[:, None] * len(trailing) + trailing).flatten()
