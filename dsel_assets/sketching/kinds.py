"""The sketches by name."""

from __future__ import annotations

from dsel_assets.sketching.affd import AFFD
from dsel_assets.sketching.countsketch import CountSketch
from dsel_assets.sketching.gaussian import Gaussian
from dsel_assets.sketching.operator import Sketch

KINDS: dict[str, type[Sketch]] = {cls.kind: cls for cls in (Gaussian, CountSketch, AFFD)}


def make_sketch(
    kind: str, in_features: int, out_features: int, seed: int = 0, name: str = ""
) -> Sketch:
    """The sketch of this kind from R^in_features to R^out_features.

    seed, name: select the operator; tensors of different names get independent ones.
    Raises ValueError for an unknown kind or a feature count below 1.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown sketch kind {kind!r}; use one of {', '.join(KINDS)}")
    return KINDS[kind](in_features, out_features, seed, name)
