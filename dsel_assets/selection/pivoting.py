"""Random pivoting: rows drawn by what is left of them outside the span of the rows before.

Y. Chen, E. Epperly, J. Tropp, R. Webber, "Randomly pivoted Cholesky: Practical approximation of a
kernel matrix with few entry evaluations", CPAM 2025, arXiv:2207.06503: a draw by the squared length
of what is left covers the energy of the pool nearly as well as its leading eigenvectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsel_assets.selection.moments import RANK_TOLERANCE
from dsel_assets.selection.passes import CHUNK, chunks, compiled, share_out
from dsel_assets.selection.strata import Strata

Array = NDArray[Any]

SAMPLERS = ("linear", "softmax", "greedy")
# What is left of the rows is computed afresh when it has fallen by this much, since differences
# lose as many digits.
FALL = 1e-4


class Urn:
    """Draws rows by their scores, none twice, and of each part no more than its count.

    Attributes:
        scores: [N] float64 >= 0, 0 for rows that can't be drawn.
        totals: [N / CHUNK] float64, sums of chunks of the scores.
        open: [N] bool, the rows that can be drawn.
    """

    def __init__(
        self,
        strata: Strata,
        rng: np.random.Generator,
        sampler: str = "linear",
        temperature: float = 1e-3,
    ) -> None:
        if sampler not in SAMPLERS:
            raise ValueError(f"unknown sampler {sampler!r}; there are {', '.join(SAMPLERS)}")
        if not temperature > 0:
            raise ValueError(f"temperature = {temperature} must be positive")
        self._sampler, self._temperature, self._rng = sampler, temperature, rng
        self._of, self._left = strata.of, strata.counts.copy()
        self.open = self._left[self._of] > 0
        self.scores = np.zeros(len(self.open))
        self.totals = np.zeros(-(-len(self.open) // CHUNK))

    @property
    def total(self) -> float:
        """The sum of the scores."""
        return float(self.totals.sum())

    def score(self, scores: Array) -> None:
        """Replace the scores; those of rows that can't be drawn become 0."""
        self.scores[:] = np.where(self.open, scores, 0.0)
        self.totals[:] = np.add.reduceat(self.scores, np.arange(0, len(self.scores), CHUNK))

    def take(self, rows: Array) -> None:
        """Count rows as drawn; the last one that a part may have closes the part."""
        self._left -= np.bincount(self._of[rows], minlength=len(self._left))
        self.open[rows] = False
        if (self._left[self._of[rows]] == 0).any():
            self.open &= self._left[self._of] > 0
            self.score(self.scores)
        self.scores[rows] = 0.0
        for chunk in np.unique(rows // CHUNK):
            self.totals[chunk] = self.scores[chunk * CHUNK : (chunk + 1) * CHUNK].sum()

    def put_back(self, row: int) -> None:
        """Let a drawn row be drawn again, once it has a score."""
        self._left[self._of[row]] += 1
        self.open[row] = True

    def draw(self, *, pivot: bool = False) -> int:
        """Draw by the sampler; by chance, or the first, if no score is above 0."""
        if not self.total > 0:
            candidates = np.flatnonzero(self.open)
            chance = 0 if self._sampler == "greedy" else self._rng.integers(len(candidates))
            row = int(candidates[chance])
        elif self._sampler == "greedy":
            row = int(np.argmax(self.scores))
        elif self._sampler == "linear" or pivot:
            passed = np.cumsum(self.totals)
            point = self._rng.random() * passed[-1]
            chunk = _first_beyond(passed, point)
            before, start = passed[chunk] - self.totals[chunk], chunk * CHUNK
            inside = np.cumsum(self.scores[start : start + CHUNK])
            row = start + _first_beyond(inside, max(point - before, 0.0))
        else:
            shares = (self.scores - self.scores.max()) / (self.total * self._temperature)
            passed = np.cumsum(np.where(self.open, np.exp(shares), 0.0))
            row = _first_beyond(passed, self._rng.random() * passed[-1])
        self.take(np.array([row]))
        return row


def _first_beyond(passed: Array, point: float) -> int:
    """Where a rising sum first exceeds the point; its last rise, should rounding lead beyond."""
    last = int(np.searchsorted(passed, passed[-1]))
    return min(int(np.searchsorted(passed, point, side="right")), last)


class Span:
    """The span of the chosen rows, and in the urn what is left of the others outside of it.

    Coordinates are those in the eigenvectors of the moment; directions with less energy than
    RANK_TOLERANCE of the leading one count as absent.

    Attributes:
        basis: [m, r] float64, the eigenvectors of the directions present.
        energies: [r] float64, their eigenvalues.
        inside: [r, d] float64, an orthonormal basis of the span.
    """

    def __init__(self, G: Array, moment: Array, urn: Urn) -> None:
        eigenvalues, vectors = np.linalg.eigh(moment)
        if not eigenvalues[-1] > 0:
            raise ValueError("the sketches are all zero: there is no moment to match")
        present = eigenvalues > RANK_TOLERANCE * eigenvalues[-1]
        self.basis, self.energies = vectors[:, present], eigenvalues[present]
        self.inside = np.empty((len(self.energies), 0))
        self._G, self._urn = G, urn
        self._refresh()

    @property
    def missing(self) -> int:
        """How many directions of the pool the span lacks."""
        return self.inside.shape[0] - self.inside.shape[1]

    @property
    def open(self) -> bool:
        """Whether any row that can be drawn would widen the span."""
        least = RANK_TOLERANCE * self.energies[-1] * len(self._G)
        return self.missing > 0 and self._urn.total > least

    @property
    def missed(self) -> float:
        """Share of tr Sigma outside the span."""
        inside = (self.inside**2).T @ self.energies
        return max(0.0, 1 - float(inside.sum() / self.energies.sum()))

    @property
    def directions(self) -> Array:
        """[m, d] float64, an orthonormal basis of the span."""
        found: Array = self.basis if self.missing == 0 else self.basis @ self.inside
        return found

    def white(self, rows: Array) -> Array:
        """Rows in coordinates in which Sigma is the identity: [., k, r] float64."""
        found: Array = self._G[rows].astype(np.float64) @ (self.basis / np.sqrt(self.energies))
        return found

    def cover(self, rows: Array) -> float:
        """Widen the span by chosen rows; the share of tr Sigma that they add to it."""
        coordinates = self._G[rows].reshape(-1, self._G.shape[2]) @ self.basis
        size = np.linalg.norm(coordinates)
        for _ in range(2):  # once leaves rounding errors of the size of what is taken off
            coordinates -= (coordinates @ self.inside) @ self.inside.T
        _, lengths, new = np.linalg.svd(coordinates, full_matrices=False)
        new = new[lengths > np.sqrt(RANK_TOLERANCE) * size][: self.missing]
        self.inside = np.hstack([self.inside, new.T])
        vectors = new @ self.basis.T
        G, urn = self._G, self._urn
        share_out(G, lambda a, b: _deflate(G, a, b, CHUNK, vectors, urn.scores, urn.totals))
        if urn.total < FALL * self._fresh:
            self._refresh()
        return float((new**2 @ self.energies).sum() / self.energies.sum())

    def _refresh(self) -> None:
        outside = np.linalg.qr(self.inside, mode="complete")[0][:, self.inside.shape[1] :]
        to_outside, left = self.basis @ outside, np.empty(len(self._G))
        for part, rows in chunks(self._G):
            coordinates = rows.reshape(-1, rows.shape[2]) @ to_outside
            left[part] = np.square(coordinates).sum(1).reshape(len(rows), -1).sum(1)
        self._urn.score(left)
        self._fresh = self._urn.total


@compiled
def _deflate(
    G: Array, start: int, stop: int, chunk: int, vectors: Array, scores: Array, totals: Array
) -> None:
    for first in range(start, stop, chunk):
        total = 0.0
        for i in range(first, min(first + chunk, stop)):
            left = scores[i]
            if left == 0.0:
                continue
            for r in range(G.shape[1]):
                for j in range(vectors.shape[0]):
                    inner = 0.0
                    for c in range(G.shape[2]):
                        inner += np.float64(G[i, r, c]) * vectors[j, c]
                    left -= inner * inner
            scores[i] = max(left, 0.0)
            total += scores[i]
        totals[first // chunk] = total
