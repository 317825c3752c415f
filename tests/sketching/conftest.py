"""Every kind of sketch, with every option that makes another operator of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from dsel_assets.sketching import KINDS, Sketch, make_sketch


@dataclass(frozen=True)
class Variant:
    kind: str
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, p: int, D: int, seed: int = 0, name: str = "") -> Sketch:
        return make_sketch(self.kind, p, D, seed, name, **self.options)

    def __str__(self) -> str:
        return "-".join(str(part) for part in (self.kind, *self.options.values()))

    def affordable(self, p: int, D: int) -> int:
        """p, or less where a column costs D."""
        dense = self.kind in ("gaussian", "rademacher")
        return min(p, max(1, 300_000 // D)) if dense else p


PRECONDITIONED = [
    Variant(kind, {"preconditioner": name})
    for kind in ("affd_whole", "afjl", "fjl")
    for name in ("fft", "orthogonal")
]
VARIANTS = [
    *(Variant(kind) for kind in KINDS),
    *PRECONDITIONED,
    Variant("afjl", {"block": 2**16}),
    Variant("sjlt", {"nonzeros": 1}),
    Variant("qk", {"layout": "listed"}),
]


@pytest.fixture(params=VARIANTS, ids=str)
def make(request: pytest.FixtureRequest) -> Variant:
    return request.param
