"""Whether sketches keep the inner products that they promise to keep, measured."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def gram(rows: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Inner products of n rows, [n, ...] or {name: [n, ...]}: [n, n] float64."""
    parts = rows.values() if isinstance(rows, Mapping) else [rows]
    flat = (part.flatten(1).double() for part in parts)
    first, *others = [part @ part.T for part in flat]
    return sum(others, start=first)


def gram_error(
    exact: Tensor, sketched: Tensor, out_features: int, variance: float
) -> dict[str, float]:
    """How far the inner products of n sketches are from those of what was sketched.

    exact, sketched: [n, n] (`gram`); out_features: D; variance: V, the promise of the sketch's kind
    (`Sketch.variance`). Over the pairs i < j:

    rms          root mean square of (<Sx, Sy> - <x, y>) / (|x| |y|)
    dense        what rms is expected of a dense Gaussian S, sqrt of the mean of (1 + cos^2) / D
    correlation  Pearson's r of sketched and exact inner products, the fidelity of arXiv:2402.03994;
                 NaN if either do not vary
    within       share of pairs with |<Sx, Sy> - <x, y>| at most three standard deviations,
                 3 sqrt(V / (2 D) * (|x|^2 |y|^2 + <x, y>^2)); the pairs share one S, so it scatters
                 more than as many independent draws would

    A pair with a zero row has error 0 where its sketch is zero too. NaN in sketches makes `rms` and
    `correlation` NaN and counts as outside. Raises ValueError for shapes that do not fit, n < 2, or
    D or V not positive.
    """
    n = len(exact)
    if exact.shape != (n, n) or sketched.shape != (n, n) or n < 2:
        raise ValueError(
            "exact and sketched must be [n, n] with n >= 2, "
            f"got {tuple(exact.shape)} and {tuple(sketched.shape)}"
        )
    if out_features < 1 or not variance > 0:
        raise ValueError(
            f"out_features and variance must be positive, got {out_features} and {variance}"
        )
    i, j = torch.triu_indices(n, n, offset=1, device=exact.device)
    squares = exact.double().diagonal()
    truth, found = exact.double()[i, j], sketched.to(exact.device).double()[i, j]
    error, norms = found - truth, squares[i] * squares[j]
    relative = torch.where(error == 0, error, error / norms.sqrt())
    bound = 3 * (variance / (2 * out_features) * (norms + truth**2)).sqrt()
    a, b = truth - truth.mean(), found - found.mean()
    cosine = torch.where(norms > 0, truth**2 / norms, 0)
    return {
        "rms": relative.square().mean().sqrt().item(),
        "dense": ((1 + cosine.mean()) / out_features).sqrt().item(),
        "correlation": ((a @ b) / (a.norm() * b.norm())).item(),
        "within": ((error.abs() <= bound) | (error == 0)).double().mean().item(),
    }
