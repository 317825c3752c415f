"""From weights to a subset: distinct examples drawn by their probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dsel_assets.selection.passes import compiled
from dsel_assets.selection.strata import Strata

Array = NDArray[Any]

ROUNDINGS = ("sample", "systematic", "pivotal")


def round_weights(
    weights: ArrayLike,
    n: int,
    *,
    rule: str = "sample",
    seed: int = 0,
    strata: Strata | None = None,
    order: ArrayLike | None = None,
    uniforms: ArrayLike | None = None,
) -> Array:
    """Draw n distinct examples according to their weights.

    Never the n largest: weights within a cluster tie, and the order of ties would decide.

    Args:
        weights: [N] s >= 0; only their proportions matter, with strata those within each part.
        n: how many.
        rule: "sample" draws one after the other without replacement, each with probability
            proportional to s (P. Efraimidis, P. Spirakis, IPL 2006); a smaller n is a prefix.
            "systematic" and "pivotal" (J.-C. Deville, Y. Tille, Biometrika 1998) include example i
            with probability n s_i exactly, which must not exceed 1. Both draw few examples that
            are neighbours in the order.
        seed: of the draw.
        strata: quotas; the counts of the parts are drawn from each, n in all.
        order: [N] permutation, for "systematic" and "pivotal"; none: a random one.
        uniforms: [N] in (0, 1), for "sample": an example's own share of chance. Where examples keep
            theirs, subsets of two pools or two sets of weights differ as little as those do.

    Returns:
        [n] int64; under "sample" in the order of the draw.

    Raises:
        ValueError: unknown rule, weights that are negative or not finite, too few of them positive,
            n s_i above 1 under the exact rules, or an argument of another size or rule.
    """
    if rule not in ROUNDINGS:
        raise ValueError(f"unknown rule {rule!r}; the rules are {', '.join(ROUNDINGS)}")
    s = np.asarray(weights, np.float64)
    if s.ndim != 1 or not (np.isfinite(s).all() and (s >= 0).all()):
        raise ValueError("weights must be a vector of finite numbers that are not negative")
    if not 0 <= n <= np.count_nonzero(s):
        raise ValueError(f"n = {n} of {np.count_nonzero(s)} examples with a positive weight")
    if (order if rule == "sample" else uniforms) is not None:
        raise ValueError(
            f"rule {rule!r} has no use for {'order' if rule == 'sample' else 'uniforms'}"
        )
    for name, given in (("order", order), ("uniforms", uniforms)):
        if given is not None and np.shape(given) != s.shape:
            raise ValueError(f"{name} has shape {np.shape(given)}; it must be [{len(s)}]")
    strata = Strata.whole(len(s), n) if strata is None else strata
    if strata.n != n or len(strata.of) != len(s):
        raise ValueError(f"strata of {strata.n} of {len(strata.of)} examples, not {n} of {len(s)}")
    positive = np.bincount(strata.of[s > 0], minlength=len(strata.counts))
    if (positive < strata.counts).any():
        part = int(np.argmax(positive < strata.counts))
        raise ValueError(
            f"part {part}: {strata.counts[part]} of {positive[part]} examples with positive weight"
        )
    rng = np.random.default_rng([seed, 1])
    if rule == "sample":
        given = 1 - rng.random(len(s)) if uniforms is None else np.asarray(uniforms, np.float64)
        return _sample(s, strata, given)
    inclusion = s * (strata.counts / np.bincount(strata.of, s))[strata.of] if n else s * 0
    if inclusion.max(initial=0) > 1 + 1e-9:
        raise ValueError(f"n s_i = {inclusion.max():.6g} > 1 is no probability of inclusion")
    way = rng.permutation(len(s)) if order is None else np.asarray(order, np.int64)
    way = way[np.argsort(strata.of[way], kind="stable")]  # part by part, each of a whole sum
    parts = np.split(way, np.cumsum(strata.sizes())[:-1])
    draw = _systematic if rule == "systematic" else _pivotal
    drawn = [
        draw(part, inclusion[part], int(count), rng)
        for part, count in zip(parts, strata.counts, strict=True)
    ]
    return np.concatenate(drawn)


def _sample(s: Array, strata: Strata, uniforms: Array) -> Array:
    """The first of independent exponentials with rates s, so many of each part."""
    rows = np.flatnonzero(s)
    waiting = -np.log(uniforms[rows]) / s[rows]
    by_time = rows[np.argsort(waiting, kind="stable")]
    if len(strata.counts) == 1:
        return by_time[: strata.n]
    of = strata.of[by_time]
    by_part = np.argsort(of, kind="stable")
    first = np.cumsum(np.bincount(of, minlength=len(strata.counts)))
    place = np.arange(len(of)) - np.concatenate([[0], first[:-1]])[of[by_part]]
    kept = np.sort(by_part[place < strata.counts[of[by_part]]])
    return by_time[kept]


def _systematic(way: Array, inclusion: Array, count: int, rng: np.random.Generator) -> Array:
    """Equally spaced points on the line of the summed probabilities."""
    if count == 0:
        return way[:0]
    passed = np.cumsum(inclusion)
    points = (rng.random() + np.arange(count)) * (passed[-1] / count)
    return way[np.searchsorted(passed, points, side="right")]


def _pivotal(way: Array, inclusion: Array, count: int, rng: np.random.Generator) -> Array:
    """Two by two: one of them gets what the other loses, until all but one are 0 or 1."""
    if count == 0:
        return way[:0]
    chance = np.clip(inclusion, 0, 1)
    _duels(chance, rng.random(len(way)))
    # But for rounding all are 0 or 1 now; the sum is the count.
    return way[np.sort(np.argsort(-chance, kind="stable")[:count])]


@compiled
def _duels(chance: Array, draws: Array) -> None:
    champion = 0
    for rival in range(1, len(chance)):
        a, b = chance[champion], chance[rival]
        both = a + b
        if both == 0.0:
            champion = rival
        elif both < 1.0:
            wins = draws[rival] * both < b
            chance[champion], chance[rival] = (0.0, both) if wins else (both, 0.0)
            champion = rival if wins else champion
        elif both >= 2.0:
            champion = rival
        else:
            settled = draws[rival] * (2.0 - both) < 1.0 - b
            chance[champion], chance[rival] = (1.0, both - 1.0) if settled else (both - 1.0, 1.0)
            champion = rival if settled else champion
