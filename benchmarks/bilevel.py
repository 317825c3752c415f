"""Two bilevel peers of BADS, short and exact: each example's weight comes from a meta gradient.

What one look-ahead step does to the target's loss is linear in the weights, with coefficients
<gradient of the target's loss, gradient of the example's loss>. One forward-mode pass gives them
for the whole batch, exactly: neither method needs a second backward pass through the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call, jvp
from torch.nn import functional as F

from dsel_assets.finetuning import shuffled_batches

Data = tuple[Tensor, Tensor]
Params = Mapping[str, Tensor]


@dataclass
class Peer:
    """A model, its optimiser and the target; `step` takes a batch and returns its weights.

    include: factor of the target's mean loss in the model's own step (the papers have 0)
    """

    model: nn.Module
    target: Data
    lr: float = 1e-3
    include: float = 0.0

    def __post_init__(self) -> None:
        self.params = dict(self.model.named_parameters())
        self.optimiser = torch.optim.Adam(self.params.values(), lr=self.lr)

    def losses(self, params: Params, batch: Data) -> Tensor:
        found = functional_call(self.model, dict(params), (batch[0],))
        return F.cross_entropy(found, batch[1], reduction="none")

    def gradient(self, loss: Tensor, params: Params, again: bool = False) -> dict[str, Tensor]:
        found = grad(loss, list(params.values()), retain_graph=again)
        return dict(zip(params, found, strict=True))

    def target_gradient(self, params: Params) -> dict[str, Tensor]:
        return self.gradient(self.losses(params, self.target).mean(), params)

    def along(self, batch: Data, direction: Params) -> Tensor:
        """[B] slope of each loss in a direction of the parameters."""
        params = {name: p.detach() for name, p in self.params.items()}
        slope: Tensor = jvp(lambda at: self.losses(at, batch), (params,), (direction,))[1]
        return slope

    def descend(self, gradient: Params) -> None:
        for name, parameter in self.params.items():
            parameter.grad = gradient[name]
        self.optimiser.step()

    def step(self, batch: Data) -> Tensor:
        raise NotImplementedError


class LearningToReweight(Peer):
    """Ren et al., ICML 2018: the rectified, normalised coefficient itself is the weight."""

    def step(self, batch: Data) -> Tensor:
        meta = self.target_gradient(self.params)
        weights = self.along(batch, meta).clamp_min(0)
        weights /= weights.sum().clamp_min(1e-12)
        gradient = self.gradient(weights @ self.losses(self.params, batch), self.params)
        self.descend({name: g + self.include * meta[name] for name, g in gradient.items()})
        return weights * len(weights)


@dataclass
class MetaWeightNet(Peer):
    """Shu et al., NeurIPS 2019: a network 1-100-1 from a loss to its weight, learned a step ahead.

    ahead: size of the look-ahead step; normalise: weights of a batch are divided by their mean
    """

    net_lr: float = 1e-3
    ahead: float = 0.1
    normalise: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.net = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
        self.net_optimiser = torch.optim.Adam(self.net.parameters(), lr=self.net_lr)

    def weigh(self, losses: Tensor) -> Tensor:
        weights: Tensor = self.net(losses.detach()[:, None])[:, 0]
        return weights / weights.mean().clamp_min(1e-12) if self.normalise else weights

    def step(self, batch: Data) -> Tensor:
        losses = self.losses(self.params, batch)
        weights = self.weigh(losses)
        gradient = self.gradient((weights.detach() * losses).mean(), self.params, again=True)
        ahead = {
            name: (p - self.ahead * gradient[name]).detach().requires_grad_()
            for name, p in self.params.items()
        }
        slopes = self.along(batch, self.target_gradient(ahead))
        self.improve(-self.ahead * (slopes * weights).mean())
        with torch.no_grad():
            weights = self.weigh(losses)
        gradient = self.gradient((weights * losses).mean(), self.params)
        if self.include:
            meta = self.target_gradient(self.params)
            gradient = {name: g + self.include * meta[name] for name, g in gradient.items()}
        self.descend(gradient)
        return weights

    def improve(self, loss: Tensor) -> None:
        self.net_optimiser.zero_grad()
        loss.backward()
        self.net_optimiser.step()


class DoubleBackward(MetaWeightNet):
    """The same step by differentiating the look-ahead step, as it is usually written."""

    def step(self, batch: Data) -> Tensor:
        losses = self.losses(self.params, batch)
        loss = (self.weigh(losses) * losses).mean()
        found = grad(loss, list(self.params.values()), create_graph=True)
        ahead = {
            name: p - self.ahead * g
            for (name, p), g in zip(self.params.items(), found, strict=True)
        }
        self.improve(self.losses(ahead, self.target).mean())
        with torch.no_grad():
            weights = self.weigh(losses)
        self.descend(self.gradient((weights * self.losses(self.params, batch)).mean(), self.params))
        return weights


def run(peer: Peer, pool: Data, *, steps: int, batch_size: int, seed: int) -> Tensor:
    """[N] mean weight of each example over its visits in the second half."""
    total, visits = torch.zeros(len(pool[0])), torch.zeros(len(pool[0]))
    batches = shuffled_batches(len(pool[0]), batch_size, seed)
    for step in range(steps):
        rows = next(batches)
        weights = peer.step((pool[0][rows], pool[1][rows]))
        if step >= steps // 2:
            total.index_add_(0, rows, weights)
            visits.index_add_(0, rows, torch.ones(len(rows)))
    return total / visits.clamp_min(1)
