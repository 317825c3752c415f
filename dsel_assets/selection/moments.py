"""Second moments of sketches: their dimension, reduction, and how well a subset keeps them.

Sections, equations and symbols are those of Y. Dong, H. Phan, X. Pan, Q. Lei, "Sketchy Moment
Matching", NeurIPS 2024, arXiv:2407.06120. Sketches are [N, m], or [N, k, m] where an example has
k rows (the gradients of k outputs), whose moments add up.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsel_assets.selection.arrays import as_blocks, chunks
from dsel_assets.sketching.philox import normals, stream_key

Array = NDArray[Any]

# Directions whose eigenvalue is below this fraction of the largest count as absent.
RANK_TOLERANCE = 1e-12


def second_moment(sketches: ArrayLike) -> Array:
    """Sigma [m, m] float64, the mean over examples of the outer products of their rows.

    One pass in chunks: sketches may lie on disk.
    """
    blocks = as_blocks(sketches, "sketches")
    total = np.zeros((blocks.shape[-1],) * 2)
    for part in chunks(blocks):
        rows = part.reshape(-1, part.shape[-1]).astype(np.float64)
        total += rows.T @ rows
    return total / len(blocks)


def intrinsic_dimension(eigenvalues: ArrayLike, size: int) -> int:
    """r_bar of a moment: how many leading eigenvalues leave at most 1/size of the trace (1.3).

    Args:
        eigenvalues: of the moment of `size` examples, in any order; rounding below 0 is ignored.
        size: number of examples N.
    """
    descending = np.sort(np.clip(np.asarray(eigenvalues, np.float64), 0, None))[::-1]
    left = np.append(np.cumsum(descending[::-1])[::-1], 0.0)
    return int(np.argmax(left <= left[0] / size))


def reduce_sketches(sketches: ArrayLike, n: int, dimension: int | None = None) -> Array:
    """Reduce sketches to the few dimensions in which n examples can match a moment.

    One fixed Gaussian map with entries N(0, 1/m), the same for every pool, to
    m = min(4 r_bar, n / 1.5) dimensions; sketches that have no more are left as they are.

    Args:
        sketches: [N, D] or [N, k, D], numpy (may be memory-mapped) or torch.
        n: size of the subset to be selected, at least 1.
        dimension: m, in place of the rule. The same m for every n makes subsets of several sizes
            comparable, but needs m < n for the smallest.

    Returns:
        [N, m] or [N, k, m], 1 <= m <= D, in the dtype of the sketches (float32 at least).

    Raises:
        ValueError: n or dimension below 1, or sketches that are not finite.
    """
    blocks = as_blocks(sketches, "sketches")
    if n < 1 or (dimension is not None and dimension < 1):
        raise ValueError(f"n = {n}, dimension = {dimension}: both must be at least 1")
    m = dimension
    if m is None:
        spectrum = np.linalg.eigvalsh(second_moment(blocks))
        m = max(1, min(4 * intrinsic_dimension(spectrum, len(blocks)), int(n / 1.5)))
    shape = (len(blocks), m) if np.ndim(sketches) == 2 else (*blocks.shape[:2], m)
    if m >= blocks.shape[-1]:
        return blocks.reshape(*shape[:-1], -1)
    gamma = _gaussian(m, blocks.shape[-1])
    reduced = np.empty((*blocks.shape[:2], m), blocks.dtype)
    done = 0
    for part in chunks(blocks):
        reduced[done : done + len(part)] = part.astype(np.float64) @ gamma
        done += len(part)
    return reduced.reshape(shape)


@lru_cache(maxsize=2)
def _gaussian(m: int, D: int) -> Array:
    """[D, m] float64, the same for every pool."""
    entries = normals(stream_key(0, "skmm", "reduction"), 0, m * D)
    return (entries.double().numpy().reshape(m, -1) / np.sqrt(m)).T


def moment_diagnostics(sketches: ArrayLike, indices: ArrayLike) -> dict[str, float]:
    """How well the moment of the chosen rows covers that of all rows: see `compare_moments`.

    Args:
        sketches: [N, m] or [N, k, m] of the pool.
        indices: [n] of the chosen examples.

    Raises:
        ValueError: no indices, or sketches that are not finite or all zero.
    """
    blocks = as_blocks(sketches, "sketches")
    chosen = blocks[np.asarray(indices, np.int64)]
    return compare_moments(chosen, second_moment(blocks), len(blocks))


def compare_moments(chosen: Array, moment: Array, examples: int) -> dict[str, float]:
    """How well the moment of a subset covers that of its pool.

    Args:
        chosen: [n, k, m] sketches of the subset.
        moment: [m, m] Sigma of the pool.
        examples: N, how many the pool has.

    Returns:
        n: how many were chosen.
        pool_rank, rank: directions that the pool and the chosen rows span.
        missed: fraction of tr(Sigma) outside the span of the chosen rows.
        c_s: the smallest c with Sigma <= c Sigma_S; infinite if a direction of the pool is missing.
        eigen_score, trace_score: largest eigenvalue and trace of Sigma Sigma_S^+, which see only
            the span of the chosen rows; without a missing direction eigen_score = c_s.
        least_c_s: what no subset with this trace and size can beat: max(n/N, tr Sigma/tr Sigma_S).
        bound_variance, bound_sketch, bound_bias: the terms of the bound on the excess risk (1.4),
            but for constants, at a noise variance of 1 and parameters of norm 1:
            trace_score / n, eigen_score tr(Sigma) / (n m gamma_S), eigen_score tr(Sigma) / n, with
            gamma_S the eigenvalue of Sigma_S of number ceil(1.1 r_bar).

    Raises:
        ValueError: nothing chosen, or a moment of zero.
    """
    n, m = len(chosen), chosen.shape[-1]
    if n == 0:
        raise ValueError("no indices: an empty subset has no moment")
    spectrum = np.linalg.eigvalsh(moment)
    if not spectrum[-1] > 0:
        raise ValueError("the sketches are all zero: they have no moment")
    absent = RANK_TOLERANCE * spectrum[-1]
    rows = chosen.reshape(-1, m).astype(np.float64) / np.sqrt(n)
    _, singular, Q = np.linalg.svd(rows, full_matrices=False)
    own = singular**2
    spanned = own > absent
    Q = Q[spanned]
    seen = Q @ moment @ Q.T
    scores = np.linalg.eigvalsh(seen / np.outer(singular[spanned], singular[spanned]))
    largest = float(scores[-1]) if len(scores) else 0.0
    trace, own_trace = float(np.trace(moment)), float(own.sum())
    rank, pool_rank = int(spanned.sum()), int((spectrum > absent).sum())
    last = ceil(1.1 * intrinsic_dimension(spectrum, examples))
    gamma = float(own[last - 1]) if 0 < last <= rank else 0.0
    return {
        "n": n,
        "pool_rank": pool_rank,
        "rank": rank,
        "missed": max(0.0, 1 - float(np.trace(seen)) / trace),
        "c_s": largest if rank == pool_rank else np.inf,
        "eigen_score": largest,
        "trace_score": float(scores.sum()),
        "least_c_s": max(n / examples, trace / own_trace) if own_trace else np.inf,
        "bound_variance": float(scores.sum()) / n,
        "bound_sketch": largest * trace / (n * m * gamma) if gamma else np.inf,
        "bound_bias": largest * trace / n,
    }


def energies(G: Array) -> tuple[Array, Array]:
    """P [N, r] with the squared coordinates in the moment's eigenbasis, and its eigenvalues [r]."""
    eigenvalues, V = np.linalg.eigh(G.T @ G / len(G))
    if not eigenvalues[-1] > 0:
        raise ValueError("the sketches are all zero: there is no moment to match")
    present = eigenvalues > RANK_TOLERANCE * eigenvalues[-1]
    P = (G @ V[:, present]) ** 2
    return P, P.mean(0)
