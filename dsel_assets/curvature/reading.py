"""What a spectrum says: its density, its outliers, and how many dimensions a sketch needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dsel_assets.curvature.spectrum import Spectrum


def density(spectrum: Spectrum, grid: ArrayLike, width: float) -> NDArray[np.float64]:
    """The spectral density at `grid`, smoothed by a Gaussian of standard deviation `width`.

    Integrates to 1. Units: 1 / eigenvalue. Of a sketched operator it is the density of S H S'.
    """
    if width <= 0:
        raise ValueError(f"width must be positive, got {width}")
    distance = (np.asarray(grid, dtype=np.float64)[..., None] - spectrum.nodes) / width
    return np.exp(-0.5 * distance**2) @ spectrum.weights / (width * (2 * np.pi) ** 0.5)


def negative_ratio(eigenvalues: ArrayLike) -> float:
    """RNEG of arXiv:2402.03994: |most negative| / top positive eigenvalue.

    0 without a negative eigenvalue, infinity with negative ones alone.
    """
    values = np.asarray(eigenvalues, dtype=np.float64)
    negative, positive = max(0.0, -values.min()), max(0.0, values.max())
    if negative == 0:
        return 0.0
    return float(negative / positive) if positive else float("inf")


def outliers(eigenvalues: ArrayLike, share: float = 0.2) -> int:
    """How many eigenvalues exceed `share` of the top one; arXiv:2402.03994 takes 20 %."""
    values = np.asarray(eigenvalues, dtype=np.float64)
    return int((values > max(0.0, share * values.max())).sum())


def alignment(gradient: Tensor, vectors: Tensor) -> Tensor:
    """The gradient's share of energy in a subspace: |P g|^2 / |g|^2, P the projection onto it.

    gradient [..., dim]; vectors [n, dim] orthonormal, for the outlier space
    `found.vectors[: outliers(found.eigenvalues)]`. Gives [...] float64 in 0 .. 1, and 0 for the
    zero gradient. arXiv:2402.03994 prints no formula; this is the usual one. Sketched vectors take
    the sketched gradient, and the n/D that any direction has in common with n of D by chance is not
    subtracted. Raises ValueError if the last dimensions differ.
    """
    if gradient.ndim == 0 or vectors.ndim != 2 or gradient.shape[-1] != vectors.shape[1]:
        raise ValueError(
            f"gradient [..., dim] and vectors [n, dim] do not fit: "
            f"{tuple(gradient.shape)} and {tuple(vectors.shape)}"
        )
    g = gradient.to(vectors.device).double()
    inside = (g @ vectors.double().T).square().sum(-1)
    whole = g.square().sum(-1)
    return (inside / whole.where(whole > 0, 1.0)).clamp(max=1.0)


def predicted_error(
    spectrum: Spectrum, dimension: int | Sequence[int] | NDArray[np.int64], share: float = 0.2
) -> NDArray[np.float64]:
    """Expected relative error, through a sketch into D dimensions, of the smallest outlier.

    (|tr(H) - sum of the outliers| / D + |H|_F / sqrt(D)) / smallest outlier: the bias by the bulk's
    trace plus the noise. Same shape as `dimension`. Raises ValueError without a positive
    eigenvalue.
    """
    count = outliers(spectrum.eigenvalues, share)
    if count == 0:
        raise ValueError("no eigenvalue is positive: there is no outlier whose error to predict")
    D = np.asarray(dimension, dtype=np.float64)
    top = spectrum.eigenvalues[:count]
    return (abs(spectrum.trace - top.sum()) / D + spectrum.frobenius / np.sqrt(D)) / top[-1]


def suggest_dimension(spectrum: Spectrum, tolerance: float, share: float = 0.2) -> int:
    """The smallest power of two D with predicted_error(spectrum, D) <= tolerance.

    At most the next power of two of the operator's dimension, where a sketch saves nothing.
    Raises ValueError if tolerance is not positive, or as `predicted_error`.
    """
    if tolerance <= 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    dimensions = [2**i for i in range((spectrum.dim - 1).bit_length() + 1)]
    enough = predicted_error(spectrum, dimensions, share) <= tolerance
    return dimensions[int(enough.argmax())] if enough.any() else dimensions[-1]
