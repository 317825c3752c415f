"""Mean, spread and reliability of many weights at once, without keeping the samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Allocate = Callable[[str], Singles]
BLOCK = 1 << 16  # entries worked on at once: what is on disk stays there
EXACT = 1 << 20  # entries up to which ranks are exact
FEWEST_BATCHES = 8  # of all chains together, below which their variance says nothing


class Moments:
    """Running moments of [N] values, 16 bytes each: Welford, and once more over batch means.

    mean    [N] float32 of the samples so far
    squares [N] float32 sum of squared deviations from it
    batch   [N] float32 sum of the unfinished batch
    between [N] float32 sum of squared deviations of the finished batches' means

    A batch is `per_batch` samples in a row. allocate: makes each array of zeros by its name.
    """

    ARRAYS = ("mean", "squares", "batch", "between")

    def __init__(self, allocate: Allocate, per_batch: int = 1) -> None:
        self.mean, self.squares, self.batch, self.between = map(allocate, self.ARRAYS)
        self.count, self.per_batch = 0, per_batch

    @property
    def batches(self) -> int:
        """How many batches are finished."""
        return self.count // self.per_batch

    def reset(self, per_batch: int) -> None:
        """Forget every sample."""
        for name in self.ARRAYS:
            getattr(self, name)[:] = 0
        self.count, self.per_batch = 0, per_batch

    def add(self, blocks: Iterator[Singles]) -> None:
        """One sample, given in consecutive pieces that make up the [N] values."""
        self.count += 1
        start = 0
        for values in blocks:
            part = slice(start, start := start + len(values))
            mean, batch = self.mean[part], self.batch[part]
            delta = values - mean
            mean += delta / self.count
            self.squares[part] += delta * (values - mean)
            batch += values
            if self.count % self.per_batch == 0:
                found = batch / self.per_batch
                # over whole batches the mean of the samples is the mean of the batch means
                before = mean + (mean - found) / max(1, self.batches - 1)
                if self.batches > 1:
                    self.between[part] += (found - before) * (found - mean)
                batch[:] = 0


@dataclass(frozen=True)
class Posterior:
    """What several chains say together, [N] float32 each.

    mean, sd  over all samples
    ess       effective number of samples by batch means, at most the number of samples; None with
              fewer than 8 finished batches
    agreement R-hat, about 1 where chains agree; None for one chain or one sample each
    samples   how many
    """

    mean: Singles
    sd: Singles
    ess: Singles | None
    agreement: Singles | None
    samples: int


def merge(chains: Sequence[Moments]) -> Posterior:
    """Moments of all chains' samples together, by Chan, Golub and LeVeque's formula.

    The effective sample size is samples * s^2 / (per_batch * variance of batch means), each
    variance pooled over the chains: batches must be long against the autocorrelation, or it is too
    high. R-hat is that of Gelman and Rubin (1992), of means within and between chains.

    Takes over the arrays of the first chain, so that nothing is held twice: its moments are gone.
    """
    first, samples = chains[0], sum(chain.count for chain in chains)
    batched = [chain for chain in chains if chain.batches > 1]
    ess = first.between if sum(chain.batches for chain in batched) >= FEWEST_BATCHES else None
    several = len(chains) > 1 and min(chain.count for chain in chains) > 1
    agreement = first.batch if several else None
    for start in range(0, len(first.mean), BLOCK):
        part = slice(start, start + BLOCK)
        mean, sd = _together(chains, part)
        within = _pooled(chains, part)
        effective = None if ess is None else _effective(batched, within, samples, part)
        if agreement is not None:
            agreement[part] = _agreement(chains, within, part)
        if ess is not None:
            ess[part] = effective
        first.mean[part], first.squares[part] = mean, sd
    return Posterior(first.mean, first.squares, ess, agreement, samples)


def _together(chains: Sequence[Moments], part: slice) -> tuple[Floats, Floats]:
    """Mean and standard deviation of all samples."""
    count, mean = 0, np.zeros(len(chains[0].mean[part]))
    squares = np.zeros_like(mean)
    for chain in chains:
        both = count + chain.count
        delta = chain.mean[part] - mean
        mean += delta * (chain.count / both)
        squares += chain.squares[part] + delta**2 * (count * chain.count / both)
        count = both
    return mean, np.sqrt(squares / max(1, count - 1))


def _effective(chains: Sequence[Moments], within: Floats, samples: int, part: slice) -> Floats:
    between = sum(chain.per_batch * chain.between[part].astype(np.float64) for chain in chains)
    long_run = np.asarray(between) / (sum(chain.batches for chain in chains) - len(chains))
    still = long_run <= within  # also where nothing moved
    return samples * np.where(still, 1.0, within / np.where(still, 1.0, long_run))


def _agreement(chains: Sequence[Moments], within: Floats, part: slice) -> Floats:
    means = np.stack([chain.mean[part] for chain in chains]).astype(np.float64)
    samples = np.mean([chain.count for chain in chains])
    between = means.var(axis=0, ddof=1)
    ratio = np.full(len(within), np.inf)
    np.divide(between, within, out=ratio, where=within > 0)
    ratio[(between == 0) & (within == 0)] = 1 / samples
    return np.sqrt((samples - 1) / samples + ratio)


def _pooled(chains: Sequence[Moments], part: slice) -> Floats:
    squares = np.asarray(sum(chain.squares[part].astype(np.float64) for chain in chains))
    return squares / max(1, sum(chain.count - 1 for chain in chains))


def rank_correlation(a: NDArray, b: NDArray) -> float:
    """Spearman's correlation of two [N] vectors, ties at their mean rank.

    1.0 where both are constant, 0.0 where one is. Of more than 2^20 entries the ranks are places
    among 2^16 of them, evenly apart, so that no ranks are held.
    """
    from scipy.stats import rankdata

    if len(a) <= EXACT:
        first, second = (rankdata(x) - (len(x) + 1) / 2 for x in (a, b))
        aa, bb, ab = first @ first, second @ second, first @ second
    else:
        among = [np.sort(x[:: len(x) >> 16]) for x in (a, b)]
        sums = np.zeros(5)
        for start in range(0, len(a), BLOCK):
            part = slice(start, start + BLOCK)
            first, second = (
                _places(x[part], others) for x, others in zip((a, b), among, strict=True)
            )
            sums += first.sum(), second.sum(), first @ first, second @ second, first @ second
        of_a, of_b = sums[:2] / len(a)
        aa, bb, ab = sums[2:] - len(a) * np.array([of_a**2, of_b**2, of_a * of_b])
    spread = float(np.sqrt(aa * bb))
    if spread == 0.0:
        return float(aa == bb == 0)
    return float(ab) / spread


def _places(values: NDArray, others: NDArray) -> Floats:
    """Where values stand among sorted others, ties in their middle; 0 is the middle of all."""
    below, up_to = (np.searchsorted(others, values, side) for side in ("left", "right"))
    return (below + up_to) / 2 - len(others) / 2
