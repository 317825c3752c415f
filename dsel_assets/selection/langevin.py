"""Steps of parameters: Langevin dynamics, or an optimiser's with a small fixed noise."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

JITTER = 1e-5  # the paper's fixed noise (arXiv:2411.03768, App. E.2)


def langevin(
    value: Tensor, gradient: Tensor, step: float, temperature: float, noise: Tensor
) -> Tensor:
    """One step of Langevin dynamics (Eq. 5 to 7): value + step/2 gradient + sqrt(step T) noise.

    gradient: of the log-target at temperature 1, all shapes alike; noise: standard normal.
    """
    return value + 0.5 * step * gradient + (step * temperature) ** 0.5 * noise


class Drive:
    """Moves parameters by their gradients: Adam with the paper's jitter, or Langevin dynamics.

    rows: N, by which the log-target was divided. temperature None: Adam and jitter; otherwise step
    `rate` on the target / N, that is eta = 2 rate / N of the paper's, at that temperature.
    precision: of a Gaussian prior on the parameters (Eq. 4), in the posterior's units.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        rows: int,
        *,
        rate: float,
        temperature: float | None,
        precision: float,
    ) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.rows, self.rate, self.temperature = rows, rate, temperature
        self.decay = precision / rows
        self.adam = None
        if temperature is None:
            self.adam = torch.optim.Adam(self.parameters, lr=rate, weight_decay=self.decay)

    def __call__(self, loss: Tensor, noise: torch.Generator) -> None:
        """One step down the loss, the log-target / -N but for the Gaussian prior."""
        for parameter in self.parameters:
            parameter.grad = None
        loss.backward()
        if self.adam is not None:
            self.adam.step()
        with torch.no_grad():
            for parameter in self.parameters:
                normal = torch.randn(parameter.shape, generator=noise).to(parameter)
                if self.temperature is None:
                    parameter.add_(normal, alpha=JITTER)
                elif parameter.grad is not None:
                    gradient = -self.rows * (parameter.grad + self.decay * parameter)
                    step = 2 * self.rate / self.rows
                    parameter.copy_(langevin(parameter, gradient, step, self.temperature, normal))

    def state(self) -> dict[str, Tensor]:
        """Adam's moments and counts; nothing for Langevin dynamics."""
        if self.adam is None:
            return {}
        state = self.adam.state_dict()["state"]
        return {f"adam.{i}.{name}": v for i, held in state.items() for name, v in held.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take up a state."""
        if self.adam is None:
            return
        held: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key.startswith("adam."):
                _, index, name = key.split(".")
                held.setdefault(int(index), {})[name] = value
        self.adam.load_state_dict(self.adam.state_dict() | {"state": held})
