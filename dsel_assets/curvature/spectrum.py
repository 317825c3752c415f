"""Spectra of symmetric operators known by their products alone, through a sketch or without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from dsel_assets.curvature.lanczos import Coefficients, Matvec, lanczos
from dsel_assets.curvature.sketched import parameters_of, sketched_operator
from dsel_assets.sketching import ModelSketch, Sketch
from dsel_assets.sketching.philox import signs, stream_key


@dataclass(frozen=True)
class Spectrum:
    """What `spectrum` learnt of a symmetric operator H on R^dim; float64 throughout.

    eigenvalues [k] in descending order: the Ritz values of largest magnitude, the top and (k > 1)
                    the bottom one always among them; seen through a sketch, without its bias
    raw         [k] the same before the correction
    residuals   [k] |H u - raw u| of each, H as it was seen: one of its eigenvalues lies at most
                    that far from raw
    trace       Hutchinson's estimate of tr H
    frobenius   estimate of the Frobenius norm of H
    nodes       [m] all Ritz values of H as it was seen, ascending, not corrected
    weights     [m] their weights, which sum to 1: sum_i weights_i f(nodes_i) ~ tr f(H) / its size
    dim         the dimension that H acts on
    vectors     [k, dim] orthonormal Ritz vectors u, of a sketched H [k, D]; None unless asked for
    """

    eigenvalues: NDArray[np.float64]
    raw: NDArray[np.float64]
    residuals: NDArray[np.float64]
    trace: float
    frobenius: float
    nodes: NDArray[np.float64]
    weights: NDArray[np.float64]
    dim: int
    vectors: Tensor | None = None


def spectrum(
    matvec: Callable[[Any], Any],
    dim: int | None = None,
    *,
    k: int,
    sketch: Sketch | ModelSketch | None = None,
    iterations: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    probes: int = 8,
    vectors: bool = False,
    state: str | Path | None = None,
    every: int = 20,
    device: torch.device | str = "cpu",
) -> Spectrum:
    """Extreme eigenvalues, trace, Frobenius norm and spectral measure of a symmetric operator.

    matvec: the product with H, from a float64 vector [dim] on `device` to a vector [dim] of any
    real dtype; with a `ModelSketch` both are {name: [*shape]}. It is called iterations + probes
    times, and once more when resumed.
    dim: may be left out with a sketch, which knows it.
    k: how many eigenvalues; iterations: Lanczos steps, by default 2k + 60; both at most the size of
    the Krylov space's vectors, D with a sketch, else dim. The residuals tell whether the steps were
    enough. Memory: iterations * size * 8 bytes.
    tolerance: stop as soon as no residual exceeds this share of the largest eigenvalue; an
    eigenvalue's own error is about the residual's square over the gap to the next. A multiple
    eigenvalue may be counted once.
    probes: Rademacher vectors z that give both tr H = E z'Hz and |H|_F^2 = E |Hz|^2 (Hutchinson).
    vectors: give the eigenvectors too.
    state, every: a file to go on from after a kill (`lanczos`).

    sketch: look at S H S' on R^D instead (arXiv:2402.03994). With p = dim its eigenvalues are those
    of H plus tr(the rest of H) / D, give or take |H|_F / sqrt(D), which smaller eigenvalues do not
    stand out from. As tr(S H S') ~ tr H and k eigenvalues are too large by b each, the bias is
    b = (trace - sum of raw) / (D - k), and raw - b is reported; the k are those farthest from b,
    at most D/2, since the rest tells b. The squared Frobenius norm is freed of its bias likewise:
    E|S H S'|^2 = |H|^2 (1 + 1/D) + tr(H)^2 / D. One number corrects all eigenvalues only if S
    treats all directions alike, which `afjl` does not.

    One start vector serves the spectral measure too (stochastic Lanczos quadrature, Ubaru et al.
    2017).

    Raises ValueError for numbers out of range, if a product is not finite or of another shape, and
    for a state of another run (`StateError`).
    """
    if sketch is None:
        size = dim
        seen = matvec
    else:
        size = sketch.out_features
        seen = sketched_operator(matvec, sketch)
        if dim not in (None, parameters_of(sketch)):
            raise ValueError(f"the sketch reads {parameters_of(sketch)} parameters, dim is {dim}")
        dim = parameters_of(sketch)
    if size is None or dim is None:
        raise ValueError("without a sketch, dim must be given")
    steps = min(size, 2 * k + 60) if iterations is None else iterations
    if not 1 <= k <= steps <= size or probes < 1 or every < 1:
        raise ValueError(
            f"need 1 <= k <= iterations <= {size}, probes >= 1 and every >= 1, "
            f"got k={k}, iterations={steps}, probes={probes}, every={every}"
        )
    if sketch is not None and 2 * k > size:
        raise ValueError(f"through a sketch of {size} dimensions, k must be at most half, got {k}")

    def product(v: Tensor) -> Tensor:
        result = seen(v).to(v)
        if result.shape != v.shape:
            raise ValueError(f"the product with {tuple(v.shape)} has shape {tuple(result.shape)}")
        if not result.isfinite().all():
            raise ValueError("the operator's product with a vector is not finite")
        return result

    trace, squares = _moments(product, size, probes, seed, device)
    bulk = 0.0 if sketch is None else trace / size

    def enough(diagonal: Coefficients, beside: Coefficients) -> bool:
        if len(diagonal) < k:
            return False
        nodes, ritz = eigh_tridiagonal(diagonal, beside[:-1])
        residuals = np.abs(beside[-1] * ritz[-1, _kept(nodes - bulk, k)])
        return bool(residuals.max() <= (tolerance or 0.0) * np.abs(nodes).max())

    krylov = lanczos(
        product,
        size,
        steps,
        seed=seed,
        enough=enough if tolerance is not None else None,
        state=state,
        every=every,
        settings={"sketch": sketch.identity if sketch is not None else None},
        device=device,
    )
    nodes, ritz = eigh_tridiagonal(krylov.diagonal, krylov.beside[:-1])
    kept = _kept(nodes - bulk, k)
    raw = nodes[kept]
    bias = 0.0
    if sketch is not None:
        bias = (trace - raw.sum()) / (size - k)
        squares = max(0.0, squares - trace**2 / size) / (1 + 1 / size)
    return Spectrum(
        eigenvalues=raw - bias,
        raw=raw,
        residuals=np.abs(krylov.beside[-1] * ritz[-1, kept]),
        trace=trace,
        frobenius=squares**0.5,
        nodes=nodes,
        weights=ritz[0] ** 2,
        dim=dim,
        vectors=torch.from_numpy(ritz.T[kept]).to(device) @ krylov.basis if vectors else None,
    )


def _kept(values: NDArray[np.float64], k: int) -> NDArray[np.intp]:
    """Indices of the k largest magnitudes and of both ends, from the top; values ascending."""
    kept = np.argsort(-np.abs(values), kind="stable")[:k]
    for end in (0, len(values) - 1):
        if k > 1 and end not in kept:
            kept[-1] = end
    return np.sort(kept)[::-1]


def _moments(
    product: Matvec, dim: int, probes: int, seed: int, device: torch.device | str
) -> tuple[float, float]:
    """Estimates of tr H and |H|_F^2 from the same products."""
    first, second = [], []
    for i in range(probes):
        z = signs(stream_key(seed, "hutchinson", f"probe {i}"), 0, dim, device).double()
        product_z = product(z)
        first.append(torch.dot(z, product_z).item())
        second.append(product_z.square().sum().item())
    return float(np.mean(first)), float(np.mean(second))
