"""One chain of BADS: the network and the weights of its pool move together, step by step.

Every random number is a function of (seed, chain, step), so that a chain that was killed and goes
on from its last checkpoint ends with the same bits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dsel_assets.models.tap import BLOCK, Tap
from dsel_assets.selection.langevin import Drive
from dsel_assets.selection.posterior import Moments, Singles, rank_correlation
from dsel_assets.selection.weighting import (
    Each,
    Network,
    Weighting,
    label_features,
    logit,
    rebuilt,
    weight_network,
)
from dsel_assets.sketching.philox import stream_key

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """What a chain is made of besides model and data; `infer_weights` says what each means."""

    beta: float
    sigma: float
    mode: Literal["paper", "sgld"]
    weighting: Literal["each", "network"]
    hidden: int
    seed: int
    steps: int
    batch_size: int
    target_batch: int
    meta: float
    temperature: float
    precision: float
    rate: float
    step: float
    thin: int
    tolerance: float | None


@dataclass(frozen=True)
class Member:
    """Where a chain ended: the model's weights by name, and the logits [N] or the weight network.

    logits: float32, None for a network; network: the weight network's weights by name, or None
    """

    joint: dict[str, Tensor]
    logits: Tensor | None
    network: dict[str, Tensor] | None


class Chain:
    """A chain, taken up from its checkpoint in `folder` if there is one.

    model is trained in place; train and target are inputs and labels. Weights and moments lie in
    memory, or with a folder on its disk. ValueError if the checkpoint is damaged or of other
    settings, model or data (named).
    """

    def __init__(
        self,
        model: nn.Module,
        train: Data,
        target: Data,
        settings: Settings,
        *,
        number: int = 0,
        folder: Path | None = None,
        made_of: dict[str, Any] | None = None,
        start: Member | None = None,
    ) -> None:
        self.model, self.train, self.target = model, train, target
        self.settings, self.number, self.folder = settings, number, folder
        self.made_of = {"version": 1, "chain": number} | asdict(settings) | (made_of or {})
        self.rows, self.size = len(train[0]), min(settings.batch_size, len(train[0]))
        self.done, self.stopped = 0, False
        self.stability: float | None = None
        self.tap = Tap(model)
        if start is not None:
            model.load_state_dict(start.joint)
        temperature = None if settings.mode == "paper" else settings.temperature
        self.drive = Drive(
            model.parameters(), self.rows,
            rate=settings.rate, temperature=temperature, precision=settings.precision,
        )  # fmt: skip
        self.weighting = self._weighting(temperature, start)
        self.ends = _segments(settings)
        self.moments = Moments(self._allocate, self._per_batch(0))
        self.before: Singles | None = None
        self._orders: dict[str, tuple[int, NDArray]] = {}
        if self.path is not None and self.path.is_file():
            self._load(self.path)

    @property
    def path(self) -> Path | None:
        """The checkpoint."""
        return None if self.folder is None else self.folder / f"chain-{self.number}.safetensors"

    @property
    def finished(self) -> bool:
        """Whether no step is left to do."""
        return self.stopped or self.done >= self.settings.steps

    def run(self, *, save_every: int = 500, tick: Callable[[], object] = lambda: None) -> None:
        """All steps that are left; a checkpoint every so many, and at the end."""
        self.model.train()
        while not self.finished:
            self._step()
            self._observe()
            tick()
            if self.finished or self.done % save_every == 0:
                self.save()
        self.model.eval()
        self._orders.clear()
        self.before = None  # nothing of it is asked any more

    def _step(self) -> None:
        """One step of both; the order of the lines is that of note 2.2."""
        batch = self._batch("train", self.rows, self.size)
        meant = self._batch("target", len(self.target[0]), self.settings.target_batch)
        # dropout, where the model has it
        torch.manual_seed(self._key("model"))
        noise = torch.Generator().manual_seed(self._key("noise"))
        inputs, labels = rows_of(self.train, batch, self.model)
        logits = self.model(inputs)
        features = None
        if self.weighting.reads_embeddings:
            features = label_features(self.tap.value, labels, logits.shape[-1])
        losses = F.cross_entropy(logits, labels, reduction="none")
        weights = self.weighting.of(batch, features)
        loss = (weights.to(losses) * losses).mean()
        if self.settings.meta:
            inputs, labels = rows_of(self.target, meant, self.model)
            loss = loss + self.settings.meta * F.cross_entropy(self.model(inputs), labels)
        self.drive(loss, noise)
        self.weighting.move(batch, features, losses.detach().to(weights), noise)
        self.done += 1

    def _observe(self) -> None:
        """Record a sample where one is due, and stop where the ranks have settled.

        Samples are those of the steps between two halvings (T/4 to T/2, T/2 to T): what was before
        is burn-in. Two such segments in a row whose means rank the pool alike end the chain.
        """
        end = next(end for end in self.ends if self.done <= end)
        if self.done <= self.ends[0] // 2 or (end - self.done) % self.settings.thin:
            return
        self.moments.add(self.weights())
        if self.done < end:
            return
        if self.before is not None:
            self.stability = rank_correlation(self.before, self.moments.mean)
            tolerance = self.settings.tolerance
            self.stopped = tolerance is not None and self.stability >= 1 - tolerance
        if not self.finished:
            if self.before is None:
                self.before = self._allocate("before")
            self.before[:] = self.moments.mean
            self.moments.reset(self._per_batch(self.ends.index(end) + 1))

    def weights(self) -> Iterator[Singles]:
        """All weights now, block by block, in the order of the pool."""
        if isinstance(self.weighting, Each):
            for logits in self.weighting.logits.split(1 << 16):
                yield logits.sigmoid().numpy()
        else:
            for block in self.examine(self.train):
                assert block.weights is not None
                yield block.weights.numpy()

    def examine(self, data: Data) -> Iterator[Block]:
        """The rows of `data` under the model and the weight network as they are now."""
        net = self.weighting.net if isinstance(self.weighting, Network) else None
        return examine(self.model, self.tap, data, net)

    def member(self) -> Member:
        """Where the chain is: copies, but for the logits, which are its own."""
        joint = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        if isinstance(self.weighting, Each):
            return Member(joint, self.weighting.logits, None)
        assert isinstance(self.weighting, Network)
        state = self.weighting.net.state_dict()
        return Member(joint, None, {name: value.clone() for name, value in state.items()})

    def save(self) -> None:
        """Write the checkpoint, if there is a folder; a reader sees the old one or the new."""
        if self.path is None:
            return
        part = self.path.with_name(f"{self.path.name}.part")
        state = {"made_of": self.made_of, "done": self.done, "stopped": self.stopped,
                 "stability": self.stability, "count": self.moments.count,
                 "per_batch": self.moments.per_batch}  # fmt: skip
        tensors = {name: value.contiguous() for name, value in self._tensors().items()}
        save_file(tensors, part, metadata={"state": json.dumps(state)})
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.rename(self.path)

    def _tensors(self) -> dict[str, Tensor]:
        held = {f"moments.{n}": torch.from_numpy(getattr(self.moments, n)) for n in Moments.ARRAYS}
        if self.before is not None:
            held["before"] = torch.from_numpy(self.before)
        parts = {
            "model": self.model.state_dict(),
            "drive": self.drive.state(),
            "weighting": self.weighting.state(),
        }
        return held | {f"{part}.{n}": v for part, state in parts.items() for n, v in state.items()}

    def _load(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                state = json.loads(file.metadata()["state"])
                _refuse_other(path, state["made_of"], self.made_of)
                names: list[str] = list(file.keys())

                def part(prefix: str) -> dict[str, Tensor]:
                    chosen = [name for name in names if name.startswith(f"{prefix}.")]
                    return {n.removeprefix(f"{prefix}."): file.get_tensor(n) for n in chosen}

                self.model.load_state_dict(part("model"))
                self.drive.restore(part("drive"))
                self.weighting.restore(part("weighting"))
                for name, value in part("moments").items():
                    getattr(self.moments, name)[:] = value.numpy()
                if "before" in names:
                    self.before = self._allocate("before")
                    self.before[:] = file.get_tensor("before").numpy()
        except (SafetensorError, KeyError, TypeError, OSError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be read ({error}); delete it to start anew") from error
        self.done, self.stopped = state["done"], state["stopped"]
        self.stability = state["stability"]
        self.moments.count, self.moments.per_batch = state["count"], state["per_batch"]

    def _weighting(self, temperature: float | None, start: Member | None) -> Weighting:
        made, prior = self.settings, {"beta": self.settings.beta, "sigma": self.settings.sigma}
        if made.weighting == "each":
            logits = torch.from_numpy(self._allocate("logits"))
            given = logit(made.beta) if start is None or start.logits is None else start.logits
            logits[:] = given
            return Each(logits, step=made.step, temperature=temperature, **prior)
        first = self.train[0][:1], self.train[1][:1]
        [features] = (block.features for block in examine(self.model, self.tap, first))
        torch.manual_seed(self._key("network"))
        net = weight_network(features.shape[1], made.hidden, made.beta)
        net.to(_device(self.model))
        if start is not None and start.network is not None:
            net.load_state_dict(start.network)
        drive = Drive(
            net.parameters(), self.rows,
            rate=made.step, temperature=temperature, precision=made.precision,
        )  # fmt: skip
        return Network(net, drive, **prior)

    def _per_batch(self, segment: int) -> int:
        """Samples in a batch of batch means: the root of those in the segment."""
        first = self.ends[segment - 1] if segment else self.ends[0] // 2
        return max(1, int(((self.ends[segment] - first) / self.settings.thin) ** 0.5))

    def _batch(self, what: str, rows: int, size: int) -> Tensor:
        """The step's rows: one permutation a pass, of which less than a batch is left out."""
        size = min(size, rows)
        passed, place = divmod(self.done, rows // size)
        if self._orders.get(what, (-1, None))[0] != passed:
            self._orders.pop(what, None)  # not two at a time
            generator = np.random.default_rng([self._key(what, passed)])
            order = np.arange(rows, dtype=np.int32 if rows < 2**31 else np.int64)
            generator.shuffle(order)
            self._orders[what] = passed, order
        order = self._orders[what][1]
        return torch.from_numpy(order[place * size : (place + 1) * size].astype(np.int64))

    def _key(self, what: str, step: int | None = None) -> int:
        """63 bits for one step (or pass, or nothing at all) of this chain."""
        step = self.done if step is None else step
        low, high = stream_key(self.settings.seed, f"chain {self.number}", f"{what} {step}")
        return low | (high & 0x7FFFFFFF) << 32

    def _allocate(self, name: str) -> Singles:
        """[N] zeros; with a folder on its disk, in a file without a name that no kill can leave."""
        if self.folder is None:
            return np.zeros(self.rows, np.float32)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"chain-{self.number}.{name}.{os.getpid()}"
        made = np.memmap(path, np.float32, mode="w+", shape=(self.rows,))
        path.unlink()
        return made


@dataclass(frozen=True)
class Block:
    """Consecutive rows under a model: losses [b], embeddings [b, F] that its last layer reads,
    features of a weight network [b, F + C] and the weights [b] that it gives, if there is one.
    """

    losses: Tensor
    labels: Tensor
    embeddings: Tensor
    features: Tensor
    weights: Tensor | None


@torch.no_grad()
def examine(
    model: nn.Module, tap: Tap, data: Data, net: nn.Module | None = None
) -> Iterator[Block]:
    """All rows, a block at a time, in eval mode and on the CPU; the model's own mode comes back."""
    training = model.training
    model.eval()
    for start in range(0, len(data[0]), BLOCK):
        inputs, labels = rows_of(data, slice(start, start + BLOCK), model)
        logits = model(inputs)
        losses = F.cross_entropy(logits, labels, reduction="none")
        features = label_features(tap.value, labels, logits.shape[-1])
        weights = None if net is None else net(features)[:, 0].sigmoid().cpu()
        embeddings = tap.value.flatten(1).cpu()
        yield Block(losses.cpu(), labels.cpu(), embeddings, features.cpu(), weights)
    model.train(training)


def network_scores(model: nn.Module, members: Sequence[Member], data: Data) -> NDArray[np.float64]:
    """[n] weights of any rows by the members' weight networks, mean over them.

    Each reads what its own joint model makes of the rows; model: one of that architecture.
    ValueError where the members have a logit an example.
    """
    model = deepcopy(model)
    tap, total = Tap(model), np.zeros(len(data[0]))
    for member in members:
        if member.network is None:
            raise ValueError("a logit an example weighs its own pool alone: weighting='network'")
        model.load_state_dict(member.joint)
        net = rebuilt(member.network).to(_device(model))
        found = [block.weights for block in examine(model, tap, data, net)]
        total += torch.cat([weights for weights in found if weights is not None]).numpy()
    return total / len(members)


def rows_of(data: Data, rows: Tensor | slice, model: nn.Module) -> Data:
    """These rows, where the model is."""
    device = _device(model)
    return data[0][rows].to(device), data[1][rows].to(device)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _segments(settings: Settings) -> list[int]:
    """Ends of the segments: the steps, half of them, and so on; more where it may stop early."""
    halvings = 1 if settings.tolerance is None else 3
    ends = {settings.steps >> k for k in range(halvings + 1)}
    return sorted(end for end in ends if end > 0)


def _refuse_other(path: Path, known: dict[str, Any], made_of: dict[str, Any]) -> None:
    if known != made_of:
        both = known.keys() | made_of.keys()
        differs = sorted(name for name in both if known.get(name) != made_of.get(name))
        raise ValueError(
            f"{path} is of another chain, which differs in {', '.join(differs)}; delete it to "
            "start anew"
        )
