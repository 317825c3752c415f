"""The curvature of a loss: its spectrum, what it asks of a sketch, and its intrinsic dimension.

hvp = hessian_vector_product(loss, parameters)
found = spectrum(hvp, p, k=10)                             # exact
found = spectrum(hvp, k=10, sketch=ModelSketch(...))       # through a sketch, bias removed
"""

from dsel_assets.curvature.intrinsic import (
    IntrinsicDimension,
    NotReachedError,
    Round,
    search_intrinsic_dimension,
)
from dsel_assets.curvature.lanczos import StateError
from dsel_assets.curvature.products import (
    averaged,
    gauss_newton_vector_product,
    hessian_vector_product,
)
from dsel_assets.curvature.reading import (
    alignment,
    density,
    negative_ratio,
    outliers,
    predicted_error,
    suggest_dimension,
)
from dsel_assets.curvature.sketched import sketched_operator
from dsel_assets.curvature.spectrum import Spectrum, spectrum

__all__ = [
    "IntrinsicDimension",
    "NotReachedError",
    "Round",
    "Spectrum",
    "StateError",
    "alignment",
    "averaged",
    "density",
    "gauss_newton_vector_product",
    "hessian_vector_product",
    "negative_ratio",
    "outliers",
    "predicted_error",
    "search_intrinsic_dimension",
    "sketched_operator",
    "spectrum",
    "suggest_dimension",
]
