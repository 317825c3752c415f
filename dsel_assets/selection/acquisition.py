"""The rules: what makes a candidate worth observing, given the processes that follow it.

Each keeps its scores by what one observation changes, `Step`; all but the last column of the table
in arXiv:2402.15898, section 3 and appendix C, closed form by closed form. v is the variance of f
at a candidate, v_A what it would be had the targets been observed, c_t the covariance with target
t, v_t the variance there, s the noise.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsel_assets.selection.passes import compiled, share_out
from dsel_assets.selection.posterior_trackers import Posterior, Step

Array = NDArray[Any]

LEAST = 1e-12  # variances below this share of the prior's are rounding errors


class Rule:
    """What each candidate would be worth if it were observed next.

    Attributes:
        informed: needs v_A at every candidate.
        directed: needs targets.
    """

    informed = False
    directed = True

    def __init__(self, posterior: Posterior, noise: float, form: str, scale: float) -> None:
        """scale: mean variance of f at the candidates before anything was observed."""
        self.posterior, self.noise = posterior, noise
        self.added = noise if form == "paper" else 0.0
        self.least = max(LEAST * scale, np.finfo(float).tiny)

    def scores(self) -> Array:
        """[N], a new array."""
        raise NotImplementedError

    def worth(self, scores: Array) -> Array:
        """The scores in the unit in which they are reported: nats where it is an information."""
        return scores

    def weights(self, target_fall: Array) -> Array | None:
        """Of the targets, [m], for the sum of covariances that the next update needs."""
        return None

    def update(self, step: Step) -> None:
        """Follow an observation."""


class Itl(Rule):
    """I(y_A; y_x) = 1/2 log (v + s)/(v_A + s) (eq. 44); the library's form has no s in it."""

    informed = True

    def scores(self) -> Array:
        """The ratio: the logarithm changes no order."""
        return np.asarray(_ratio(*self.posterior.variances, self.added, self.least))

    def worth(self, scores: Array) -> Array:
        """Nats."""
        return np.asarray(np.log(scores) / 2)


class Vtl(Rule):
    """The fall of the summed variance of the targets: sum_t c_t^2 / (v + s)."""

    def __init__(self, posterior: Posterior, noise: float, form: str, scale: float) -> None:
        super().__init__(posterior, noise, form, scale)
        self._squares = np.concatenate([np.square(part).sum(1) for part in posterior.cross()])

    def scores(self) -> Array:
        """In the unit of a variance."""
        return np.asarray(self._squares / (self.posterior.variances[0] + self.noise))

    def weights(self, target_fall: Array) -> Array:
        """c_t has fallen by f g_t: for its square, sum_t c_t g_t is needed."""
        return target_fall

    def update(self, step: Step) -> None:
        """Sum of the squares of c_t - f g_t."""
        f, g = step.fall, step.target_fall
        assert step.toward is not None
        self._squares += f * (f * (g @ g) - 2 * step.toward)
        np.maximum(self._squares, 0.0, out=self._squares)


class Ctl(Rule):
    """The summed correlation with the targets, signed: sum_t c_t / sqrt(v v_t)."""

    def __init__(self, posterior: Posterior, noise: float, form: str, scale: float) -> None:
        super().__init__(posterior, noise, form, scale)
        weights = self._weights(posterior.target_variance)
        self._sums = np.concatenate([part @ weights for part in posterior.cross()])

    def _weights(self, target_variance: Array) -> Array:
        return np.asarray(1 / np.sqrt(np.maximum(target_variance, self.least)))

    def scores(self) -> Array:
        """Between -m and m."""
        return np.asarray(self._sums / np.sqrt(np.maximum(self.posterior.variances[0], self.least)))

    def weights(self, target_fall: Array) -> Array:
        """The standard deviations as they will be."""
        return self._weights(self.posterior.target_variance - target_fall**2)

    def update(self, step: Step) -> None:
        """The sum with the weights that `weights` foretold."""
        assert step.toward is not None
        fall = step.target_fall @ self._weights(self.posterior.target_variance)
        self._sums = step.toward - fall * step.fall


class MmItl(Rule):
    """The information about each target on its own: -1/2 sum_t log(1 - c_t^2/((v + s) v_t)).

    The library's form has no s in it. Keeps c, [N, m].
    """

    def __init__(self, posterior: Posterior, noise: float, form: str, scale: float) -> None:
        super().__init__(posterior, noise, form, scale)
        self._cross = np.concatenate(list(posterior.cross()))

    def scores(self) -> Array:
        """Nats."""
        variance = np.maximum(self.posterior.variances[0], self.least) + self.added
        targets = np.maximum(self.posterior.target_variance, self.least)
        cross, found = self._cross, np.empty(len(self._cross))
        share_out(cross, lambda *part: _information(cross, variance, targets, found, *part))
        return found

    def update(self, step: Step) -> None:
        """c_t falls by f g_t."""
        cross, f, g = self._cross, step.fall, step.target_fall
        share_out(cross, lambda *part: _lower(cross, f, g, *part))


class UndirectedItl(Rule):
    """v: what is most uncertain itself, whatever the targets are (greedy MaxDet)."""

    directed = False

    def scores(self) -> Array:
        """A variance."""
        return self.posterior.variances[0].copy()


RULES: dict[str, type[Rule]] = {
    "itl": Itl,
    "vtl": Vtl,
    "ctl": Ctl,
    "mm_itl": MmItl,
    "undirected_itl": UndirectedItl,
}


@compiled
def _ratio(before: Array, after: Array, added: float, least: float) -> Array:
    found = np.empty_like(before)
    for i in range(len(found)):
        low = max(after[i], least) + added
        found[i] = max(before[i] + added, low) / low
    return found


@compiled
def _information(
    cross: Array, variance: Array, targets: Array, found: Array, start: int, stop: int
) -> None:
    for i in range(start, stop):
        total, product = 0.0, 1.0
        for t in range(targets.shape[0]):
            left = 1.0 - cross[i, t] * cross[i, t] / (variance[i] * targets[t])
            product *= max(left, 1e-12)
            if product < 1e-100:  # one logarithm for many factors
                total += np.log(product)
                product = 1.0
        found[i] = (total + np.log(product)) / -2


@compiled
def _lower(cross: Array, f: Array, g: Array, start: int, stop: int) -> None:
    for i in range(start, stop):
        for t in range(g.shape[0]):
            cross[i, t] -= f[i] * g[t]
