"""BADS: data point selection as inference over per-example weights (Xu et al., arXiv:2411.03768).

The network and one weight per pool example are inferred together. A weight sees only the loss of
its own example: low under a network that the target set has pulled to the right place, and the
weight goes up. The prior holds the mean weight at beta, the believed useful fraction of the pool.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from dsel_assets.data.examples import Examples
from dsel_assets.finetuning import shuffled_batches
from dsel_assets.selection.interface import Choice, Needs, Selector, State

META_FACTOR = 1.0  # of the target's mean loss against the pool's weighted mean loss
STEP = 1.0  # of a logit, in units of 1 / nat: a visit moves it by STEP * w(1-w) * force
JITTER = 1e-5  # the paper's fixed noise (App. E.2)
LEARNING_RATE = 1e-3


@dataclass(frozen=True)
class Weights:
    """mean, sd: [N] float64 of each weight over the chain's second half; diagnostics: scalars."""

    mean: NDArray[np.float64]
    sd: NDArray[np.float64]
    diagnostics: dict[str, Any]


def infer_weights(
    model: nn.Module,
    train: tuple[Tensor, Tensor],
    target: tuple[Tensor, Tensor],
    *,
    beta: float = 0.5,
    sigma: float = 0.05,
    mode: Literal["paper"] = "paper",
    chains: int = 1,
    seed: int = 0,
    steps: int = 1000,
    batch_size: int = 100,
) -> Weights:
    """Posterior mean and sd of one weight in [0, 1] per pool example.

    model is trained in place (pass a copy). train and target are inputs [N, ...] float32 and labels
    [N] int64. In per-example units, with l_i the loss of example i:

        network   mean_B(w_i l_i) + mean_T(l_j)                      (Eq. 5, rho_theta^m = N_t/N_m)
        weights   mean_i(w_i l_i) + (mean_i w_i - beta)^2 / (2 sigma^2)            (Eq. 7 and 8)

    The gradient of the prior is rescaled by N/|B|, so that mini-batches are unbiased (the paper's
    Eq. 9 is not), and the mean weight is exact, not a running average. Mode `paper` is the
    optimiser's step plus a fixed small noise: a MAP estimate with jitter, and the sd says how much
    the weight still moved, no more. ValueError for an empty train or target set or another mode.
    """
    inputs, labels = train
    target_inputs, target_labels = target
    if len(inputs) == 0 or len(target_inputs) == 0:
        raise ValueError("infer_weights needs at least one pool and one target example")
    if mode != "paper" or chains != 1:
        raise ValueError("infer_weights: only mode='paper' with one chain is there so far")
    rows = len(inputs)
    logits = torch.full((rows,), float(torch.logit(torch.tensor(beta, dtype=torch.float64))))
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE
    )
    batches = shuffled_batches(rows, batch_size, seed)
    total, squares, kept = torch.zeros(rows).double(), torch.zeros(rows).double(), 0
    every = max(1, rows // batch_size)  # one sample a pass over the pool, the last step among them
    # where a batch is much of the pool, a full step would overshoot the prior's narrow valley
    step_size = min(STEP, 16 * sigma**2 * max(1.0, rows / batch_size))
    torch.manual_seed(seed)  # dropout, where a model has it
    model.train()
    for step in range(steps):
        batch = next(batches)
        losses = F.cross_entropy(model(inputs[batch]), labels[batch], reduction="none")
        meta = F.cross_entropy(model(target_inputs), target_labels)
        weights = logits.sigmoid()
        optimiser.zero_grad(set_to_none=True)
        ((weights[batch] * losses).mean() + META_FACTOR * meta).backward()
        optimiser.step()
        force = losses.detach() + (weights.mean() - beta) / sigma**2
        here = weights[batch]
        noise = JITTER * torch.randn(len(batch), generator=generator)
        # a batch at the seam of two passes may hold a row twice, and both count
        logits.index_add_(0, batch, noise - step_size * here * (1 - here) * force)
        if step >= steps // 2 and (steps - 1 - step) % every == 0:
            weights = logits.sigmoid().double()
            total += weights
            squares += weights.square()
            kept += 1
    model.eval()
    mean = total / kept
    sd = (squares / kept - mean.square()).clamp_min(0).sqrt()
    return Weights(
        mean.numpy(),
        sd.numpy(),
        {"mean_weight": float(mean.mean()), "beta": beta, "steps": steps, "samples": kept},
    )


class Bads(Selector):
    """Chooses by the inferred weights; one chain a seed serves all budgets."""

    name = "bads"
    needs = Needs.TARGET | Needs.LABELS | Needs.MODEL

    def __init__(
        self,
        *,
        model: Callable[[], nn.Module],
        trainable: Sequence[str] | None = None,
        beta: float = 0.5,
        sigma: float = 0.05,
        steps: int = 1000,
        batch_size: int = 100,
        pick: Literal["sample", "top"] = "sample",
    ) -> None:
        self.model, self.trainable = model, trainable
        self.beta, self.sigma = beta, sigma
        self.steps, self.batch_size, self.pick = steps, batch_size, pick
        self._chain: _Chain | None = None

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """The first n of the ranking, which depends on the seed and not on the budget."""
        assert target is not None
        key = (seed, *(_digest(part) for e in (pool, target) for part in (e.inputs, e.labels)))
        known = self._chain is not None and self._chain.key == key
        if not known:
            self._chain = self._run(key, pool, target, seed)
        assert self._chain is not None
        weights, rows = self._chain.weights, self._chain.ranking[:n]
        return Choice(
            rows,
            {"weight_mean": weights.mean[rows], "weight_sd": weights.sd[rows]},
            {**weights.diagnostics, "mean_weight_chosen": float(weights.mean[rows].mean())},
            spent=self._chain.seconds if known else 0.0,
        )

    def _run(self, key: tuple[Any, ...], pool: Examples, target: Examples, seed: int) -> _Chain:
        assert pool.inputs is not None and target.inputs is not None
        started = time.perf_counter()
        model = self.model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trainable is None or name in self.trainable)
        weights = infer_weights(
            model,
            (torch.from_numpy(pool.inputs), torch.from_numpy(pool.labels)),
            (torch.from_numpy(target.inputs), torch.from_numpy(target.labels)),
            beta=self.beta,
            sigma=self.sigma,
            steps=self.steps,
            batch_size=self.batch_size,
            seed=seed,
        )
        score = np.log(np.maximum(weights.mean, 1e-12))
        if self.pick == "sample":  # Gumbel-top-k: sampling without replacement, nested in n
            score = score + np.random.default_rng(seed).gumbel(size=len(score))
        ranking = np.argsort(-score, kind="stable")
        return _Chain(key, weights, ranking, time.perf_counter() - started)


@dataclass(frozen=True)
class _Chain:
    key: tuple[Any, ...]
    weights: Weights
    ranking: NDArray[np.int64]
    seconds: float


def _digest(values: NDArray | None) -> bytes:
    assert values is not None
    return blake2b(np.ascontiguousarray(values).data).digest()
