"""The Hessian's spectrum, and how many dimensions a gradient sketch needs to keep it."""

from dsel_assets.curvature.hvp import hessian_vector_product
from dsel_assets.curvature.spectrum import (
    Spectrum,
    density,
    negative_ratio,
    outliers,
    predicted_error,
    spectrum,
    suggest_dimension,
)

__all__ = [
    "Spectrum",
    "density",
    "hessian_vector_product",
    "negative_ratio",
    "outliers",
    "predicted_error",
    "spectrum",
    "suggest_dimension",
]
