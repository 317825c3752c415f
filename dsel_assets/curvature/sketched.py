"""An operator on parameter space, seen through a sketch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from dsel_assets.sketching import ModelSketch, Sketch


def sketched_operator(
    matvec: Callable[[Any], Any], sketch: Sketch | ModelSketch
) -> Callable[[Tensor], Tensor]:
    """The map v -> S(A(S'v)) on R^D, for A on R^p (arXiv:2402.03994, the explicit mode).

    matvec: v -> A v, on flat vectors [p] for a `Sketch`, on {name: [*shape]} for a `ModelSketch`
    (the products of this package take both); it is given v's dtype. The returned map takes and
    gives [D].
    """
    if isinstance(sketch, ModelSketch):

        def product(v: Tensor) -> Tensor:
            lifted = {name: rows[0] for name, rows in sketch.adjoint(v[None]).items()}
            return sketch({name: part[None] for name, part in matvec(lifted).items()})[0]

        return product
    return lambda v: sketch(matvec(sketch.adjoint(v)))


def parameters_of(sketch: Sketch | ModelSketch) -> int:
    """p, the number of coordinates that a sketch reads."""
    if isinstance(sketch, ModelSketch):
        return sum(math.prod(shape) for shape in sketch.shapes.values())
    return sketch.in_features
