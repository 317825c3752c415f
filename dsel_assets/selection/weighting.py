"""How examples get their weights: a logit each, or a network that also weighs what it never saw.

The target, in per-example units: N times

    mean_i(w_i l_i) + (mean_i w_i - beta)^2 / (2 sigma^2)

is minus the logarithm of the weights' unnormalised density given the network (arXiv:2411.03768,
Eq. 7 and 8; the normaliser of p(theta | w), which depends on w, is left out there and here).
Eq. 8's sigma on the sum of the weights is sqrt(N) times ours; on the mean weight, beside a data
term of N times the mean, it is ours / sqrt(N), and those are the values that the paper's
experiments quote (1e-5 at 40,000 examples is our 2e-3).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsel_assets.selection.langevin import JITTER, Drive, langevin

RECENT = 10  # batches that stand for the pool (App. E.2)


def logit(beta: float) -> float:
    """The logit at which every weight begins."""
    return float(torch.logit(torch.tensor(beta, dtype=torch.float64)))


def mean_pull(mean_weight: Tensor | float, beta: float, sigma: float) -> Tensor | float:
    """The prior's force on a weight, in nats: what it adds to the example's loss."""
    return (mean_weight - beta) / sigma**2


def logit_step(
    logits: Tensor, losses: Tensor, mean_weight: Tensor | float, *, beta: float, sigma: float
) -> Tensor:
    """[..., b] gradient of the log-target in the logits of a batch, without the Jacobian.

    Averaged over random batches this is b/N of the full gradient, data and prior alike: the
    paper's Eq. 9 has it so for the data but weakens the prior by another b/N.
    """
    weights = logits.sigmoid()
    return -weights * (1 - weights) * (losses + mean_pull(mean_weight, beta, sigma))


def logit_gradient(
    logits: Tensor,
    losses: Tensor,
    batch: Tensor,
    *,
    beta: float,
    sigma: float,
    temperature: float = 1.0,
    jacobian: bool = True,
) -> Tensor:
    """[..., N] gradient of the log-target in all logits, unbiased over random batches.

    logits [..., N]; losses [..., b] of the rows `batch` [b] or [..., b]. Prior and Jacobian are
    exact on all coordinates; only the data term is estimated, as N/b times the batch's. The
    Jacobian log w(1 - w) belongs to the change of variables, so that the density in w is tempered
    and the Jacobian is not: divided by the temperature later, it is multiplied by it here.
    """
    rows, size = logits.shape[-1], losses.shape[-1]
    weights = logits.sigmoid()
    force = torch.zeros_like(logits)
    force.scatter_(-1, batch.expand(losses.shape), losses * (rows / size))
    force += mean_pull(weights.mean(-1, keepdim=True), beta, sigma)
    gradient = -weights * (1 - weights) * force
    return gradient + temperature * (1 - 2 * weights) if jacobian else gradient


class Weighting(Protocol):
    """What a chain asks of its weights."""

    reads_embeddings: bool

    def of(self, batch: Tensor, features: Tensor | None) -> Tensor:
        """[b] weights of these rows of the pool."""
        ...

    def move(
        self, batch: Tensor, features: Tensor | None, losses: Tensor, noise: torch.Generator
    ) -> None:
        """One step, given the losses [b] of the batch."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Everything that a later step depends on, in tensors."""
        ...

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a state."""
        ...


class Each:
    """One logit an example: logits [N] float32, and the exact sum of the weights as they move.

    temperature None: an optimiser's step on the rows of the batch with the paper's jitter, O(b).
    Otherwise Langevin dynamics at that temperature on all rows, O(N). step: in the posterior's
    units, the paper's eta for `langevin`, half of it without a temperature.
    """

    reads_embeddings = False

    def __init__(
        self, logits: Tensor, *, beta: float, sigma: float, step: float, temperature: float | None
    ) -> None:
        self.logits, self.beta, self.sigma = logits, beta, sigma
        self.step, self.temperature = step, temperature
        self.total = 0.0
        self.recount()

    def recount(self) -> None:
        """Sum all weights anew, as after the logits were set."""
        blocks = self.logits.split(1 << 16)
        self.total = sum(float(block.double().sigmoid().sum()) for block in blocks)

    def of(self, batch: Tensor, features: Tensor | None) -> Tensor:
        """[b] weights of these rows of the pool."""
        return self.logits[batch].sigmoid()

    def move(
        self, batch: Tensor, features: Tensor | None, losses: Tensor, noise: torch.Generator
    ) -> None:
        """One step, given the losses [b] of the batch."""
        if self.temperature is None:
            before = self.logits[batch]
            mean = self.total / len(self.logits)
            after = before + self.step * logit_step(
                before, losses, mean, beta=self.beta, sigma=self.sigma
            )
            after += JITTER * torch.randn(after.shape, generator=noise)
            self.logits[batch] = after
            moved = after.double().sigmoid() - before.double().sigmoid()
            self.total += float(moved.sum())
        else:
            T = self.temperature
            gradient = logit_gradient(
                self.logits, losses, batch, beta=self.beta, sigma=self.sigma, temperature=T
            )
            normal = torch.randn(self.logits.shape, generator=noise)
            self.logits.copy_(langevin(self.logits, gradient, self.step, T, normal))

    def state(self) -> dict[str, Tensor]:
        """The logits and the sum of the weights."""
        return {"logits": self.logits, "total": torch.tensor(self.total, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a state."""
        self.logits.copy_(state["logits"])
        self.total = float(state["total"])


def weight_network(features: int, hidden: int, beta: float) -> nn.Sequential:
    """Features [b, F] to logits [b, 1], at first logit(beta) everywhere; hidden 0: linear.

    A linear head is additive in embedding and label, so it cannot see that the two don't fit: it
    tells no noisy label from a clean one. One hidden layer can.
    """
    body = [nn.Linear(features, hidden), nn.ReLU()] if hidden else []
    head = nn.Linear(hidden or features, 1)
    nn.init.zeros_(head.weight)
    nn.init.constant_(head.bias, logit(beta))
    return nn.Sequential(*body, head)


def rebuilt(state: dict[str, Tensor]) -> nn.Sequential:
    """The weight network with these weights."""
    hidden, features = state["0.weight"].shape
    net = weight_network(features, hidden if "2.weight" in state else 0, 0.5)
    net.load_state_dict(state)
    return net


def label_features(embeddings: Tensor, labels: Tensor, classes: int) -> Tensor:
    """[b, F + C] embeddings beside the one-hot label."""
    flat = embeddings.detach().flatten(1).float()
    return torch.cat([flat, F.one_hot(labels, classes).to(flat)], dim=1)


class Network:
    """A network from (embedding, label) to the weight.

    Its mean over the pool is estimated on the last ten batches (App. E.2), weighed anew by the
    network as it is: the paper keeps their old weights, and the lag and noise of ten batch means
    then drown what the losses say. The prior's gradient is rescaled by N/b, as the data term's is,
    so that the batch size does not set how strong the prior is. drive: moves the parameters by
    their gradients of the target / -N.
    """

    reads_embeddings = True

    def __init__(self, net: nn.Sequential, drive: Drive, *, beta: float, sigma: float) -> None:
        self.net, self.drive = net, drive
        self.beta, self.sigma = beta, sigma
        self.recent: list[Tensor] = []

    def of(self, batch: Tensor, features: Tensor | None) -> Tensor:
        """[b] weights of these rows; features as from `label_features`."""
        return self._weigh(features).detach()

    def move(
        self, batch: Tensor, features: Tensor | None, losses: Tensor, noise: torch.Generator
    ) -> None:
        """One step, given the losses [b] of the batch."""
        assert features is not None
        self.recent = [*self.recent, features][-RECENT:]
        with torch.no_grad():
            mean = self._weigh(torch.cat(self.recent)).mean()
        force = losses + mean_pull(mean, self.beta, self.sigma)
        self.drive((self._weigh(features) * force).mean(), noise)

    def _weigh(self, features: Tensor | None) -> Tensor:
        weights: Tensor = self.net(features)[:, 0].sigmoid()
        return weights

    def state(self) -> dict[str, Tensor]:
        """Parameters, optimiser and the features of the recent batches."""
        held = {f"net.{name}": value for name, value in self.net.state_dict().items()}
        held |= {f"recent.{i}": features for i, features in enumerate(self.recent)}
        return held | self.drive.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a state."""
        device = next(self.net.parameters()).device
        count = sum(name.startswith("recent.") for name in state)
        self.recent = [state[f"recent.{i}"].to(device) for i in range(count)]
        self.net.load_state_dict(
            {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")}
        )
        self.drive.restore(state)
