"""SIFT: for each query the candidates that say most about it, to finetune on before answering.

J. Hübotter, S. Bongni, I. Hakimi, A. Krause, "Efficiently Learning at Test-Time: Active Fine-Tuning
of LLMs", ICLR 2025, arXiv:2410.08020: VTL with one target, over the query's nearest candidates.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from dsel_assets.selection.arrays import as_rows
from dsel_assets.selection.itl import Informative, Until, select_informative
from dsel_assets.selection.kernels import Kernel, make_kernel
from dsel_assets.selection.nearest import nearest


def select_for_each(
    candidates: ArrayLike,
    queries: ArrayLike,
    n: int,
    *,
    neighbours: int = 200,
    noise: float = 0.01,
    alpha: float | None = None,
    kernel: str | Kernel = "linear",
) -> list[Informative]:
    """Choose at most n candidates for each query on its own.

    Little noise spends picks on what those before have not said; much noise takes the nearest
    neighbours. The paper's rows are text embeddings of unit norm; here they are used as given.
    The neighbours are all queries' in one pass; `select_informative` with `preselect` reports what
    the restriction to them cost.

    Args:
        candidates: [N, d], as in `select_informative`.
        queries: [q, d].
        n: most picks a query.
        neighbours: candidates that a query chooses from, by correlation with it.
        noise: variance of the observation noise.
        alpha: stop at the first pick i after which the query's standard deviation is still above
            1/(alpha i); none: n picks.
        kernel: as in `select_informative`.

    Returns:
        For each query the choice; its indices are rows of the candidates, its state is empty.

    Raises:
        ValueError: as `select_informative`; n above the number of neighbours.
    """
    X, Q = as_rows(candidates, "candidates"), as_rows(queries, "queries")
    if X.shape[1] != Q.shape[1]:
        raise ValueError(f"candidates have {X.shape[1]} features but queries {Q.shape[1]}")
    kernel = make_kernel(kernel)
    found = []
    for query, near in zip(Q, np.sort(nearest(X, Q, neighbours, kernel)), strict=True):
        until = None if alpha is None else Until(alpha=alpha)
        chosen = select_informative(
            X[near], query[None], n, rule="vtl", noise=noise, kernel=kernel, until=until
        )
        found.append(replace(chosen, indices=near[chosen.indices], state={}))
    return found
