"""Diversity: examples that are spread over a pool, typical of it or stand for it.

k-means++, BADGE, TypiClust, ProbCover and facility location. `geometry.k_center` is CoreSet. What
compares all pairs does so in blocks of float64 of BLOCK numbers: no N x N matrix is held.
ValueError for rows that are not finite (named), and unless n is from 1 to N.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from dsel_assets.data.examples import Examples
from dsel_assets.models import Builder
from dsel_assets.models.tap import Tap, last_layer
from dsel_assets.selection.arrays import as_rows
from dsel_assets.selection.coverage import clusters
from dsel_assets.selection.interface import Choice, Selector, State
from dsel_assets.selection.kernels import Kernel, Linear, LossGradient, make_kernel
from dsel_assets.selection.pivoting import Urn
from dsel_assets.selection.similarity import centred
from dsel_assets.selection.strata import Strata
from dsel_assets.selection.strategies import STRATEGIES, Needs

Array = NDArray[Any]

BLOCK = 2**22  # similarities in memory at a time, each 8 bytes, up to four times over
FORWARD = 1024  # rows of the pool in one forward pass
LAZY = 64  # gains that are brought up to date at a time
TIE = 1e-12  # relative: what differs by less is equal
ZERO = 1e-13  # squared distance, relative to the norms: rounding


def kmeans_plusplus(
    rows: ArrayLike, n: int, *, kernel: str | Kernel = "linear", seed: int = 0
) -> tuple[Array, float]:
    """k-means++ seeding: each drawn by its squared distance to the nearest of those before.

    D. Arthur, S. Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007. The
    distances are those of a kernel's features, |x - y|^2 = k(x, x) + k(y, y) - 2 k(x, y), which
    need not be formed. No row is drawn twice; once all that are left equal drawn ones, they are
    drawn uniformly. A smaller n is a prefix.

    Args:
        rows: [N, d]; read once a pick.
        n: how many, at most N.
        kernel: a name or an object of `selection.kernels`.
        seed: of the draws.

    Returns:
        indices [n] in the order of choice, and the mean [float] squared distance of all rows to the
        nearest pick.
    """
    X, kernel = _rows(rows, n), make_kernel(kernel)
    urn = Urn(Strata.whole(len(X), n), np.random.default_rng(seed))
    norms, nearest = kernel.diagonal(X), np.full(len(X), np.inf)
    picks = np.empty(n, np.int64)
    for i in range(n):
        picks[i] = p = urn.draw()
        both = norms + norms[p]
        squares = both - 2 * kernel.matrix(X, X[p : p + 1])[:, 0]
        nearest = np.minimum(nearest, np.where(squares > ZERO * both, squares, 0.0))
        urn.score(nearest)
    return picks, float(nearest.mean())


@torch.no_grad()
def loss_gradients(model: nn.Module, inputs: Tensor) -> tuple[Array, LossGradient]:
    """Factors [p - onehot(argmax p), h] of the gradients that the predicted labels would give.

    inputs [N, ...] float32. p [N, C] is the prediction and h [N, d] what the last linear layer
    reads, so that the gradient by its weights is their outer product (BADGE's embedding, of C d
    numbers, or C (d + 1) with a bias). Returns float32 [N, C + d] and the kernel whose inner
    products are those of the gradients. ValueError unless the model ends in a linear layer.
    """
    model.eval()
    layer = last_layer(model)
    if not isinstance(layer, nn.Linear):
        raise ValueError("the model does not end in a linear layer: there is no BADGE embedding")
    tap, found = Tap(model), []
    for part in inputs.split(FORWARD):
        p = model(part).double().softmax(1)
        p.scatter_add_(1, p.argmax(1, keepdim=True), -torch.ones(len(p), 1, dtype=p.dtype))
        found.append(torch.cat([p.float(), tap.value.flatten(1)], dim=1))
    tap.remove()
    C, d = layer.out_features, layer.in_features
    if found[0].shape[1] != C + d or p.shape[1] != C:
        raise ValueError("the model's last linear layer does not give its outputs")
    return torch.cat(found).numpy(), LossGradient(C, layer.bias is not None)


def typiclust(
    rows: ArrayLike,
    n: int,
    *,
    neighbours: int = 20,
    most_clusters: int = 500,
    small: int = 5,
    seed: int = 0,
) -> Array:
    """TypiClust: of each cluster in turn, the largest first, the most typical row that is left.

    G. Hacohen, A. Dekel, D. Weinshall, "Active Learning on a Budget: Opposite Strategies Suit High
    and Low Budgets", ICML 2022, arXiv:2202.02794. Typical is a small mean distance to the nearest
    `neighbours` of the same cluster, or to half the cluster where it is small. As in the authors'
    code k-means is by mini-batches from 50 clusters on.

    Args:
        rows: [N, d]; the paper's have unit norm.
        n: how many, at most N; also how many clusters there are, up to `most_clusters`.
        neighbours: that typicality looks at.
        most_clusters: see n.
        small: clusters of so many rows or fewer come when the others are used up.
        seed: of k-means.

    Returns:
        [n] indices in the order of choice. The distances inside a cluster are compared by
        scikit-learn in blocks: time is the sum of the clusters' squared sizes, N^2 for n = 1.
    """
    from sklearn.cluster import KMeans, MiniBatchKMeans

    X = _rows(rows, n)
    count = min(n, most_clusters)
    if count <= 50:
        means = KMeans(count, n_init=3, random_state=seed)
    else:
        means = MiniBatchKMeans(count, n_init=3, batch_size=5000, random_state=seed)
    of = means.fit_predict(X)
    sizes = np.bincount(of, minlength=count)
    order = np.argsort(-sizes, kind="stable")
    picks: list[int] = []
    for part in (order[sizes[order] > small], order[sizes[order] <= small]):
        left = [np.flatnonzero(of == cluster) for cluster in part]
        while len(picks) < n and any(map(len, left)):
            left = [members for members in left if len(members)]
            for i, members in enumerate(left[: n - len(picks)]):
                best = _most_typical(X[members], min(neighbours, len(members) // 2))
                picks.append(int(members[best]))
                left[i] = np.delete(members, best)
    return np.array(picks, np.int64)


def _most_typical(rows: Array, k: int) -> int:
    from sklearn.neighbors import NearestNeighbors

    if k == 0:
        return 0
    distances = NearestNeighbors(n_neighbors=k).fit(rows).kneighbors()[0]
    return int(np.argmin(distances.mean(1)))


def probcover(rows: ArrayLike, n: int, *, delta: float) -> tuple[Array, Array]:
    """ProbCover: greedily the row whose ball of radius delta covers most that is not covered yet.

    O. Yehuda, A. Dekel, G. Hacohen, D. Weinshall, "Active Learning Through a Covering Lens",
    NeurIPS 2022, arXiv:2205.11320. Once everything is covered, rows with most neighbours come
    first. Equal counts go to the lowest index, and a smaller n is a prefix. All pairs are compared
    at most twice, whatever n is, and no graph is stored: time N^2 d, memory O(N) and the blocks.

    Args:
        rows: [N, d]; the paper's have unit norm.
        n: how many, at most N.
        delta: what is nearer than that is covered, and the picks themselves.

    Returns:
        indices [n] in the order of choice, and the share [n] of the rows covered after each.
    """
    if not delta >= 0:
        raise ValueError(f"delta = {delta}: it must not be negative")
    X = _rows(rows, n)
    norms = Linear().diagonal(X)

    def inside(part: Array) -> Array:
        """[N, b] which rows lie in the balls around these."""
        return _squares(X, norms, part) < delta**2

    counts = np.concatenate([inside(part).sum(0) for part in _blocks(np.arange(len(X)), len(X))])
    gains, free, bare = counts.copy(), np.ones(len(X), bool), np.ones(len(X), bool)
    picks, shares = np.empty(n, np.int64), np.ones(n)
    for i in range(n):
        picks[i] = p = int(np.argmax(np.where(free, gains if bare.any() else counts, -1)))
        free[p] = False
        new = np.flatnonzero(bare & (inside(np.array([p]))[:, 0] | (np.arange(len(X)) == p)))
        bare[new] = False
        for part in _blocks(new, len(X)):
            gains -= inside(part).sum(1)
        shares[i] = 1 - bare.mean()
    return picks, shares


def pure_radius(rows: ArrayLike, parts: ArrayLike, *, purity: float = 0.95) -> float:
    """ProbCover's rule for delta: the largest radius at which a share `purity` of balls is pure.

    A ball is pure if all rows in it are of its centre's part. The paper's parts are clusters of
    k-means, as many as there are classes. rows [N, d], parts [N]; where there is one part, twice
    the largest norm. Time N^2 d. ValueError for a purity outside (0, 1].
    """
    if not 0 < purity <= 1:
        raise ValueError(f"purity = {purity}: it must be above 0 and at most 1")
    X, of = as_rows(rows, "rows"), np.asarray(parts)
    norms = Linear().diagonal(X)
    nearest = np.full(len(X), 4 * norms.max())
    for part in _blocks(np.arange(len(X)), len(X)):
        squares = np.where(of[:, None] == of[part], np.inf, _squares(X, norms, part))
        nearest[part] = np.minimum(nearest[part], squares.min(0))
    return float(np.sqrt(max(np.sort(nearest)[int((1 - purity) * len(X))], 0.0)))


def facility_location(
    candidates: ArrayLike, n: int, *, clients: ArrayLike | None = None
) -> tuple[Array, Array]:
    """Greedily the n rows S that make sum_i max_{j in S} <x_i, x_j> largest.

    i runs over the candidates, or over the clients; for rows of unit norm it is what k-medoids
    minimises. Gains never rise, so only candidates whose earlier gain could still win are looked at
    again (M. Minoux, "Accelerated Greedy Algorithms", 1978), and the choice is that of looking at
    all. Where no pick gains anything, as once each client has its nearest, it starts anew among
    those left. Equal gains go to the lowest index, and a smaller n is a prefix.

    Args:
        candidates: [N, d], used as given.
        n: how many, at most N.
        clients: [m, d], or None for the candidates.

    Returns:
        indices [n] in the order of choice, and by how much [n] each raises the sum; the first from
        the lowest that the norms allow, -m for unit ones. Time: N m d, and m d for each later look;
        memory O(N + m) and the blocks.
    """
    X = _rows(candidates, n)
    C = X if clients is None else as_rows(clients, "clients")
    if X.shape[1] != C.shape[1]:
        raise ValueError(f"candidates have {X.shape[1]} features but clients {C.shape[1]}")
    kernel = Linear()
    lowest = -np.sqrt(kernel.diagonal(C) * kernel.diagonal(X).max())
    nothing = -TIE * lowest.sum()
    served, bounds, free = lowest.copy(), np.full(len(X), np.inf), np.ones(len(X), bool)

    def largest() -> float:
        """Look at candidates until no other can have a larger gain."""
        fresh = bounds <= 0
        while True:
            top = float(bounds[free & fresh].max(initial=0.0))
            stale = np.flatnonzero(free & ~fresh & (bounds >= (1 - TIE) * top))
            if len(stale) == 0:
                return top
            size = LAZY if np.isfinite(bounds[stale]).all() else len(stale)
            first = stale[np.argsort(-bounds[stale], kind="stable")[:size]]
            for part in _blocks(first, len(C)):
                rise = np.maximum(kernel.matrix(C, X[part]) - served[:, None], 0).sum(0)
                bounds[part] = np.where(rise > nothing, rise, 0.0)
            fresh[first] = True

    picks, gains = np.empty(n, np.int64), np.empty(n)
    for i in range(n):
        if (top := largest()) == 0:
            served[:], bounds[:] = lowest, np.inf
            top = largest()
        picks[i] = p = int(np.argmax(free & (bounds >= (1 - TIE) * top)))
        gains[i], free[p] = bounds[p], False
        np.maximum(served, kernel.matrix(C, X[p : p + 1])[:, 0], out=served)
    return picks, gains


def _rows(rows: ArrayLike, n: int) -> Array:
    X = as_rows(rows, "rows")
    if not 0 < n <= len(X):
        raise ValueError(f"{n} of {len(X)} rows can't be chosen")
    return X


def _blocks(rows: Array, others: int) -> Iterator[Array]:
    """Consecutive rows, as many at a time as can be compared with all others in memory."""
    size = max(1, BLOCK // others)
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _squares(X: Array, norms: Array, part: Array) -> Array:
    """[N, b] squared distances of all rows to these."""
    found: Array = norms[:, None] + norms[part] - 2 * Linear().matrix(X, X[part])
    return found


class KMeansPlusPlus(Selector):
    """k-means++ seeding on gradient sketches."""

    traits = STRATEGIES["kmeanspp"]

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """The n draws in order."""
        assert pool.sketches is not None
        rows, potential = kmeans_plusplus(pool.sketches, n, seed=seed)
        return Choice(rows, diagnostics={"mean_squared_distance": potential})


class Badge(Selector):
    """BADGE: k-means++ seeding on the loss gradients of the predicted labels, which it never forms.

    J. Ash, C. Zhang, A. Krishnamurthy, J. Langford, A. Agarwal, "Deep Batch Active Learning by
    Diverse, Uncertain Gradient Lower Bounds", ICLR 2020, arXiv:1906.03671. As in the paper the
    first draw is uniform; the authors' code takes the longest gradient. Nothing is trained, so that
    `trainable` is not read.
    """

    traits = STRATEGIES["badge"]

    def __init__(self, *, model: Builder, trainable: Sequence[str] | None = None) -> None:
        self.model = model

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """The n draws in order, with the lengths of their gradients."""
        assert pool.inputs is not None
        factors, kernel = loss_gradients(self.model(), torch.from_numpy(pool.inputs))
        rows, potential = kmeans_plusplus(factors, n, kernel=kernel, seed=seed)
        norms = np.sqrt(kernel.diagonal(factors[rows]))
        return Choice(rows, {"gradient_norm": norms}, {"mean_squared_distance": potential})


class TypiClust(Selector):
    """TypiClust on gradient sketches, centred on the pool and of unit norm."""

    traits = STRATEGIES["typiclust"]

    def __init__(self, *, neighbours: int = 20, most_clusters: int = 500, small: int = 5) -> None:
        self.neighbours, self.most_clusters, self.small = neighbours, most_clusters, small

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """The n picks in order."""
        [sketches] = centred(pool)
        rows = typiclust(
            sketches,
            n,
            neighbours=self.neighbours,
            most_clusters=self.most_clusters,
            small=self.small,
            seed=seed,
        )
        return Choice(rows)


class ProbCover(Selector):
    """ProbCover on gradient sketches, centred on the pool and of unit norm.

    delta, between 0 and 2, or the paper's rule: the largest at which 95 % of the balls are pure in
    k-means clusters, as many as the pool has labels.
    """

    traits = STRATEGIES["probcover"]

    def __init__(self, *, delta: float | None = None) -> None:
        self.delta = delta

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """The n picks in order, with the share of the pool that is covered after each."""
        [rows], delta = centred(pool), self.delta
        if delta is None:
            delta = pure_radius(rows, clusters(rows, max(2, len(np.unique(pool.labels)))))
        picks, shares = probcover(rows, n, delta=delta)
        return Choice(picks, {"covered": shares}, {"delta": delta, "covered": float(shares[-1])})


class Facility(Selector):
    """Facility location over the pool, by gradient sketches, centred and of unit norm."""

    traits = STRATEGIES["facility"]

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """The n picks in order, with what each gains."""
        if Needs.TARGET in self.traits.needs:
            assert target is not None
            rows, clients = centred(pool, target)
        else:
            [rows], clients = centred(pool), None
        picks, gains = facility_location(rows, n, clients=clients)
        return Choice(picks, {"gain": gains})


class FacilityTarget(Facility):
    """Facility location over the targets: each is to have a pick that is like it."""

    traits = STRATEGIES["facility_target"]
