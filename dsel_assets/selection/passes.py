"""Passes over the rows of a pool: read once, summed in double precision, by several threads.

Each row is summed in the same order whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]

CHUNK = 4096  # examples whose scores have one sum
CONVERTED = 2**19  # numbers that are in double precision at a time: what the cache holds
WORK = 2**18  # numbers worth a thread of their own


def chunks(G: Array) -> Iterator[tuple[slice, Array]]:
    """Slices of the examples, and theirs of G [N, k, m] in double precision: [c, k, m]."""
    size = max(1, CONVERTED // G[0].size)
    for start in range(0, len(G), size):
        part = slice(start, start + size)
        yield part, G[part].astype(np.float64)


def products(G: Array, vectors: Array) -> Array:
    """Inner products [N, k, q] float64 of the rows of G [N, k, m] with the vectors [q, m]."""
    found = np.empty((*G.shape[:2], len(vectors)))
    share_out(G, lambda start, stop: _products(G[start:stop], vectors, found[start:stop]))
    return found


def share_out(G: Array, run: Callable[[int, int], object]) -> None:
    """Call run(start, stop) on slices of the examples, whole chunks, in torch's threads."""
    pieces = -(-len(G) // CHUNK)
    threads = max(1, min(torch.get_num_threads(), pieces, G.size // WORK))
    bounds = [min(len(G), CHUNK * (pieces * i // threads)) for i in range(threads + 1)]
    if threads == 1:
        run(0, len(G))
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, bounds, bounds[1:]))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Machine code that releases the GIL and may add up in any fixed order; kept on disk."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    options["fastmath"] = {"reassoc", "contract", "nsz"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return njit(**options)(function)


@compiled
def _products(G: Array, vectors: Array, found: Array) -> None:
    for i in range(G.shape[0]):
        for r in range(G.shape[1]):
            for j in range(vectors.shape[0]):
                total = 0.0
                for c in range(G.shape[2]):
                    total += np.float64(G[i, r, c]) * vectors[j, c]
                found[i, r, j] = total
