"""The sketches by name."""

from __future__ import annotations

import inspect
from typing import Any

from dsel_assets.sketching.affd import AFFD
from dsel_assets.sketching.countsketch import CountSketch
from dsel_assets.sketching.dense import Gaussian, Rademacher
from dsel_assets.sketching.ffd import FFD
from dsel_assets.sketching.logra import LoGra
from dsel_assets.sketching.operator import Sketch
from dsel_assets.sketching.qk import QK
from dsel_assets.sketching.sampled import AFJL, FJL, SRHT
from dsel_assets.sketching.sjlt import SJLT
from dsel_assets.sketching.tensorsketch import TensorSketch
from dsel_assets.sketching.whole_affd import WholeAFFD

_CLASSES: tuple[type[Sketch], ...] = (
    *(Gaussian, Rademacher),
    *(CountSketch, SJLT),
    *(AFFD, WholeAFFD, AFJL, FFD, FJL, SRHT, QK),
    *(TensorSketch, LoGra),
)
KINDS: dict[str, type[Sketch]] = {cls.kind: cls for cls in _CLASSES}


def make_sketch(
    kind: str,
    in_features: int,
    out_features: int,
    seed: int = 0,
    name: str = "",
    **options: Any,
) -> Sketch:
    """The sketch of this kind from R^in_features to R^out_features.

    seed, name: select the operator; tensors of different names get independent ones.
    options: what the kind's own constructor takes, such as nonzeros or columns.
    Raises ValueError for an unknown kind or option, or a feature count below 1.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown sketch kind {kind!r}; use one of {', '.join(KINDS)}")
    parameters = inspect.signature(KINDS[kind]).parameters.keys()
    known = parameters - inspect.signature(Sketch).parameters.keys()
    if unknown := sorted(options.keys() - known):
        raise ValueError(
            f"unknown option of {kind}: {', '.join(unknown)}; "
            f"it takes {', '.join(sorted(known)) or 'none'}"
        )
    make: Any = KINDS[kind]
    return make(in_features, out_features, seed, name, **options)
