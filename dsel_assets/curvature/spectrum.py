"""Spectra of symmetric operators known by their products alone, and what they advise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from dsel_assets.sketching.philox import normals, signs, stream_key

Matvec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Spectrum:
    """What `spectrum` learnt of a symmetric operator H on R^dim; all float64.

    eigenvalues [k] in descending order: the Ritz values of largest magnitude, the top and (k > 1)
                    the bottom one always among them; of a sketched operator, without its bias
    raw         [k] the same before the correction
    residuals   [k] |H u - raw u| of each: a true eigenvalue lies at most that far from raw
    trace       Hutchinson's estimate of tr H
    frobenius   estimate of the Frobenius norm of H (of a sketched operator, of what was sketched)
    nodes       [m] all Ritz values, ascending
    weights     [m] their weights, which sum to 1: sum_i weights_i f(nodes_i) ~ tr f(H) / dim
    dim         the dimension that H acts on
    """

    eigenvalues: NDArray[np.float64]
    raw: NDArray[np.float64]
    residuals: NDArray[np.float64]
    trace: float
    frobenius: float
    nodes: NDArray[np.float64]
    weights: NDArray[np.float64]
    dim: int


def spectrum(
    matvec: Matvec,
    dim: int,
    *,
    k: int,
    iterations: int | None = None,
    seed: int = 0,
    probes: int = 8,
    sketched: bool = False,
    device: torch.device | str = "cpu",
) -> Spectrum:
    """Extreme eigenvalues, trace, Frobenius norm and spectral measure of a symmetric operator.

    matvec: the product with H, from a float64 vector [dim] on `device` to a vector [dim] of any
    real dtype. It is called iterations + probes times.
    k: how many eigenvalues; iterations: Lanczos steps, by default 2k + 60; both at most dim. The
    residuals tell whether the steps were enough. Memory: iterations * dim * 8 bytes.
    probes: Rademacher vectors z that give both tr H = E z'Hz and |H|_F^2 = E |Hz|^2 (Hutchinson).
    sketched: H is v -> S(A(S'v)), seen through a sketch S: R^p -> R^dim. Its eigenvalues are those
    of A plus tr(the rest of A) / dim; with tr(S A S') ~ tr A, and k eigenvalues each too large by
    b, that is b = (trace - sum of raw) / (dim - k), which is subtracted. The squared Frobenius norm
    is freed of its bias in the same way: E|S A S'|^2 = |A|^2 (1 + 1/dim) + tr(A)^2 / dim.

    Lanczos with full, double re-orthogonalisation; where the Krylov space is invariant before the
    steps are done, it goes on in a random direction orthogonal to it. One start vector serves the
    spectral measure too (stochastic Lanczos quadrature, Ubaru et al. 2017).

    Raises ValueError for k or iterations out of range, and if a product is not finite.
    """
    steps = min(dim, 2 * k + 60) if iterations is None else iterations
    if not 1 <= k <= steps <= dim or probes < 1:
        raise ValueError(
            f"need 1 <= k <= iterations <= dim and probes >= 1, "
            f"got k={k}, iterations={steps}, dim={dim}, probes={probes}"
        )

    def product(v: Tensor) -> Tensor:
        result = matvec(v).to(v)
        if not result.isfinite().all():
            raise ValueError("the operator's product with a vector is not finite")
        return result

    def gaussian(stream: str) -> Tensor:
        return torch.from_numpy(normals(stream_key(seed, "lanczos", stream), 0, dim)).to(device)

    diagonal, beside, last = _lanczos(product, steps, gaussian)
    nodes, vectors = eigh_tridiagonal(diagonal, beside)
    trace, squares = _moments(product, dim, probes, seed, device)

    kept = np.argsort(-np.abs(nodes), kind="stable")[:k]
    for end in (0, steps - 1):
        if k > 1 and end not in kept:
            kept[-1] = end
    kept = np.sort(kept)[::-1]
    raw = nodes[kept]
    bias = 0.0
    if sketched:
        bias = (trace - raw.sum()) / max(dim - k, 1)
        squares = max(0.0, squares - trace**2 / dim) / (1 + 1 / dim)
    return Spectrum(
        eigenvalues=raw - bias,
        raw=raw,
        residuals=np.abs(last * vectors[-1, kept]),
        trace=trace,
        frobenius=squares**0.5,
        nodes=nodes,
        weights=vectors[0] ** 2,
        dim=dim,
    )


def _lanczos(
    product: Matvec, steps: int, gaussian: Callable[[str], Tensor]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """The tridiagonal matrix of H: diagonal [m], beside it [m-1], and the m-th, left-over norm."""
    start = _normalised(gaussian("start"))
    basis = start.new_empty(steps, len(start))
    basis[0] = start
    diagonal, beside = np.zeros(steps), np.zeros(steps)
    scale = 0.0
    for j in range(steps):
        w = product(basis[j])
        diagonal[j] = torch.dot(basis[j], w).item()
        w = _orthogonalised(w, basis[: j + 1])
        beside[j] = w.norm().item()
        scale = max(scale, abs(diagonal[j]), beside[j])
        if j + 1 == steps:
            break
        if beside[j] <= 1e-12 * scale:  # the space so far is invariant
            beside[j] = 0.0
            w = _orthogonalised(gaussian(f"restart {j}"), basis[: j + 1])
        basis[j + 1] = _normalised(w)
    return diagonal, beside[:-1], float(beside[-1])


def _orthogonalised(w: Tensor, basis: Tensor) -> Tensor:
    for _ in range(2):
        w = w - (basis @ w) @ basis
    return w


def _normalised(w: Tensor) -> Tensor:
    return w / w.norm()


def _moments(
    product: Matvec, dim: int, probes: int, seed: int, device: torch.device | str
) -> tuple[float, float]:
    """Estimates of tr H and |H|_F^2 from the same products."""
    first, second = [], []
    for i in range(probes):
        flips = signs(stream_key(seed, "hutchinson", f"probe {i}"), 0, dim)
        z = torch.from_numpy(flips).to(device, torch.float64)
        product_z = product(z)
        first.append(torch.dot(z, product_z).item())
        second.append(product_z.square().sum().item())
    return float(np.mean(first)), float(np.mean(second))


def density(spectrum: Spectrum, grid: ArrayLike, width: float) -> NDArray[np.float64]:
    """The spectral density at `grid`, smoothed by a Gaussian of standard deviation `width`.

    Integrates to 1. Units: 1 / eigenvalue. The nodes are those of the operator as it was given: a
    sketched one's are not corrected.
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

    At most the next power of two of the operator's dimension, where a sketch saves nothing; give
    the spectrum of the operator itself, as a sketched one's dimension is the sketch's.
    Raises ValueError if tolerance is not positive, or as `predicted_error`.
    """
    if tolerance <= 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    dimensions = [2**i for i in range((spectrum.dim - 1).bit_length() + 1)]
    enough = predicted_error(spectrum, dimensions, share) <= tolerance
    return dimensions[int(enough.argmax())] if enough.any() else dimensions[-1]
