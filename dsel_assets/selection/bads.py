"""BADS: data point selection as inference over per-example weights (Xu et al., arXiv:2411.03768).

The network and one weight per pool example are inferred together. A weight sees only the loss of
its own example: low under a network that the target set has pulled to the right place, and the
weight goes up. The prior holds the mean weight at beta, the believed useful fraction of the pool.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit
from torch import Tensor, nn
from tqdm import tqdm

from dsel_assets.data.examples import Examples
from dsel_assets.models.tap import Tap
from dsel_assets.selection.chain import Chain, Data, Member, Settings, examine, network_scores
from dsel_assets.selection.guards import Neighbourhood, guards
from dsel_assets.selection.interface import Choice, Selection, Selector, State
from dsel_assets.selection.posterior import Floats, Singles, merge, rank_correlation
from dsel_assets.selection.scored import first_of_each
from dsel_assets.selection.strata import Strata
from dsel_assets.selection.strategies import STRATEGIES
from dsel_assets.selection.weighting import logit

Ints = NDArray[np.int64]
ADAM_RATE = 1e-3
SGLD_RATE = 1e-2
CONTINUED = 4  # a warm chain has one in so many of a fresh chain's steps


@dataclass(frozen=True)
class Weights:
    """What the chains found; [N] in the order of the pool.

    mean, sd    [N] float32 of each weight over the samples; a mode's sd is as honest as the mode
    ess         [N] float32 effective number of samples, by batch means; None with too few samples
    agreement   [N] float32 R-hat between chains, about 1 where they agree; None for one chain
    losses      [N] float32 nats under the joint model of the last chain, in eval mode
    outside     [N] bool: farther from the target than the target is from itself (`Neighbourhood`),
                as the model saw it at first
    model       the caller's, as the last chain left it
    members     where each chain ended: for `start`, and to score new rows
    diagnostics scalars
    """

    mean: Singles
    sd: Singles
    ess: Singles | None
    agreement: Singles | None
    losses: NDArray[np.float32]
    outside: NDArray[np.bool_]
    model: nn.Module
    members: Sequence[Member]
    diagnostics: dict[str, Any]

    def score(self, inputs: Tensor, labels: Tensor) -> Floats:
        """[n] weights of rows that no chain has seen, by the weight networks, mean over chains."""
        return network_scores(self.model, self.members, (inputs, labels))


def infer_weights(
    model: nn.Module,
    train: Data,
    target: Data,
    *,
    beta: float = 0.5,
    sigma: float = 0.05,
    mode: Literal["paper", "sgld"] = "paper",
    weighting: Literal["each", "network"] = "each",
    chains: int = 1,
    seed: int = 0,
    steps: int = 1000,
    batch_size: int = 100,
    target_batch: int = 256,
    meta: float = 1.0,
    temperature: float = 1.0,
    precision: float = 1.0,
    hidden: int = 100,
    rate: float | None = None,
    step: float | None = None,
    thin: int | None = None,
    tolerance: float | None = None,
    start: Sequence[Member] | None = None,
    folder: str | Path | None = None,
    save_every: int = 500,
    progress: bool = False,
) -> Weights:
    """Posterior mean and sd of one weight in [0, 1] per pool example.

    model is trained in place (pass a copy) and ends as the last chain's joint model. train and
    target are inputs [N, ...] and labels [N] int64. In per-example units, with l_i the cross
    entropy of example i in nats, N times

        mean_i(w_i l_i) + meta mean_T(l_j) + (mean_i w_i - beta)^2 / (2 sigma^2)

    plus the Gaussian prior of the network is minus the logarithm of what is sampled (Eq. 5 to 8;
    `weighting` maps the paper's sigma to ours). It is the *unnormalised* joint: p(theta | w) has a
    normaliser that depends on w and that the paper leaves out, so that this is not the posterior of
    the hierarchy that the paper writes down, but of one with another prior on w. meta = 1 is the
    paper's rho = N_t / N_m; literal Bayes is meta = N_m / N_t.

    mode      `paper`: Adam, or a plain step on a logit, plus a fixed noise of 1e-5: a MAP estimate
              with jitter, whose sd says how much a weight still moved and no more; O(batch) a step.
              `sgld`: Langevin dynamics on all coordinates, with the Jacobian of the logits; its
              noise costs O(N) a step, which above some 10^6 examples outweighs the network
    weighting `each`: a logit an example. `network`: one hidden layer on the detached input of the
              model's last layer and the label; scores rows that it has never seen. hidden = 0 gives
              a linear head, which can't tell noisy labels from clean ones
    steps     of each chain. The samples are those of the second half, one every `thin` steps (None:
              one a pass over the pool)
    tolerance stop once the posterior means of steps T/4 to T/2 and T/2 to T have a rank correlation
              of 1 - tolerance, looked at where T is an eighth, a quarter or half of `steps`
    temperature of sgld; 1 is the posterior. precision: of the network's zero-mean Gaussian prior
    rate      of the network: Adam's (None: 1e-3), or the Langevin step on the target / N (1e-2)
    step      of a logit, in the posterior's units: `paper` moves it by step * gradient, `sgld` by
              step/2 * gradient; of a weight network as `rate`. None: as large as the prior's valley
              allows, at most 1
    target_batch target rows a step, all of them if there are no more
    start     where earlier chains over the same rows ended; they go on from there
    folder    holds a checkpoint a chain, written every `save_every` steps, and the disk behind
              logits and moments. A killed call that is repeated ends with the same bits on a CPU

    ValueError for an empty train or target set, a setting out of range, and for a folder that holds
    another call's chains, which names what differs.
    """
    rows = len(train[0])
    if rows == 0 or len(target[0]) == 0:
        raise ValueError("infer_weights needs at least one pool and one target example")
    size = min(batch_size, rows)
    # in a full step an overshoot of the prior's narrow valley would not die out
    valley = sigma**2 * max(1.0, rows / size)
    if weighting == "each":
        fitting = min(1.0, 16 * valley) if mode == "paper" else min(0.5 * size / rows, 4 * sigma**2)
    else:
        fitting = ADAM_RATE if mode == "paper" else sigma**2 / 25
    settings = Settings(
        beta=beta, sigma=sigma, mode=mode, weighting=weighting, hidden=hidden, seed=seed,
        steps=steps, batch_size=batch_size, target_batch=target_batch, meta=meta,
        temperature=temperature, precision=precision,
        rate=(ADAM_RATE if mode == "paper" else SGLD_RATE) if rate is None else rate,
        step=fitting if step is None else step,
        thin=max(1, rows // size) if thin is None else thin,
        tolerance=tolerance,
    )  # fmt: skip
    _check(settings, chains, start, rows)
    folder = None if folder is None else Path(folder)
    made_of = {} if folder is None else _fingerprints(model, train, target, start)
    initial = deepcopy(model.state_dict())
    found, members = [], []
    with torch.random.fork_rng(), tqdm(total=chains * steps, disable=not progress) as bar:
        for number in range(chains):
            model.load_state_dict(initial)
            chain = Chain(
                model, train, target, settings,
                number=number, folder=folder, made_of=made_of,
                start=None if start is None else start[number],
            )  # fmt: skip
            try:
                bar.update(chain.done)
                chain.run(save_every=save_every, tick=bar.update)
                if number == chains - 1:
                    losses = np.concatenate([b.losses.numpy() for b in chain.examine(train)])
            finally:
                chain.tap.remove()
            found.append(chain)
            members.append(chain.member())
    means = [chain.moments.mean for chain in found]
    alike = [rank_correlation(a, b) for i, a in enumerate(means) for b in means[:i]]
    posterior = merge([chain.moments for chain in found])
    outside = _outside(model, initial, train, target)
    settled = [chain.stability for chain in found if chain.stability is not None]
    each = [member.logits for member in members if member.logits is not None]
    diagnostics = guards(posterior.mean, losses, outside, beta, each) | {
        "steps": sum(chain.done for chain in found),
        "samples": posterior.samples,
        "step_of_a_weight": settings.step,
        "rank_stability": min(settled, default=None),
        "chain_correlation": min(alike, default=None),
        "median_ess": None if posterior.ess is None else float(np.median(posterior.ess)),
        "median_r_hat": None
        if posterior.agreement is None
        else float(np.median(posterior.agreement)),
    }

    return Weights(
        posterior.mean, posterior.sd, posterior.ess, posterior.agreement,
        losses, outside, model, members, diagnostics,
    )  # fmt: skip


def _check(settings: Settings, chains: int, start: Sequence[Member] | None, rows: int) -> None:
    s = settings
    allowed = {
        "beta in (0, 1)": 0 < s.beta < 1,
        "sigma > 0": s.sigma > 0,
        "mode 'paper' or 'sgld'": s.mode in ("paper", "sgld"),
        "weighting 'each' or 'network'": s.weighting in ("each", "network"),
        "at least one chain": chains >= 1,
        "at least one step": s.steps >= 1,
        "at least one row a batch": min(s.batch_size, s.target_batch) >= 1,
        "thin >= 1": s.thin >= 1,
        "meta, temperature, precision and hidden >= 0": min(
            s.meta, s.temperature, s.precision, s.hidden
        ) >= 0,
        "rate and step >= 0": min(s.rate, s.step) >= 0,
        "as many starts as chains": start is None or len(start) == chains,
        "a start of as many rows": start is None
        or all(member.logits is None or len(member.logits) == rows for member in start),
    }  # fmt: skip
    for what, holds in allowed.items():
        if not holds:
            raise ValueError(f"infer_weights needs {what}")


def _fingerprints(
    model: nn.Module, train: Data, target: Data, start: Sequence[Member] | None
) -> dict[str, str]:
    """What a checkpoint must agree in, beside the settings."""
    parts: dict[str, Iterable[Tensor]] = {
        "model": model.state_dict().values(),
        "train": train,
        "target": target,
        "start": [t for m in start or () for t in (*m.joint.values(), *_own(m))],
    }
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    return {name: _digest(tensors) for name, tensors in parts.items()} | {"trained": str(trained)}


def _own(member: Member) -> list[Tensor]:
    return [*(() if member.logits is None else [member.logits]), *(member.network or {}).values()]


def _digest(tensors: Iterable[Tensor]) -> str:
    found = blake2b(digest_size=16)
    for tensor in tensors:
        found.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()


def _outside(
    model: nn.Module, initial: dict[str, Tensor], train: Data, target: Data
) -> NDArray[np.bool_]:
    """[N] rows of the pool that lie outside the target, as the model saw them before the chains.

    A chain that learned some junk by heart would put it next to the target.
    """
    before = deepcopy(model)
    before.load_state_dict(initial)
    tap = Tap(before)
    near = Neighbourhood(
        torch.cat([block.embeddings for block in examine(before, tap, target)]), target[1].cpu()
    )
    blocks = examine(before, tap, train)
    return np.concatenate([near.outside(b.embeddings, b.labels).numpy() for b in blocks])


class Bads(Selector):
    """Chooses by the inferred weights; the chains of a seed serve all budgets and quotas.

    pick: `sample` draws without replacement in proportion to the mean weight (Gumbel-top-k); `top`
    takes the largest means; `lower` the largest mean - sd; `bernoulli` is sequential Poisson
    sampling, where each row's chance is its mean weight times budget / sum of the weights, as far
    as that is below 1. All are nested.

    The state holds ids, logits or weight networks, and joint models. A warm start goes on from it
    for a quarter of the steps; rows that it does not know begin at their score by the weight
    network, or at beta. With `compare_cold` fresh chains run too, and the diagnostics say how far
    they are: rank correlation of the means, and the share of the choice that they share.

    The other settings are those of `infer_weights`. With a `scratch` folder, chains that were
    killed go on from their last checkpoint.
    """

    traits = STRATEGIES["bads"]

    def __init__(
        self,
        *,
        model: Callable[[], nn.Module],
        trainable: Sequence[str] | None = None,
        pick: Literal["sample", "top", "lower", "bernoulli"] = "sample",
        compare_cold: bool = False,
        **settings: Any,
    ) -> None:
        self.model, self.trainable = model, trainable
        self.pick, self.compare_cold, self.settings = pick, compare_cold, settings
        self._runs: dict[bool, _Run] = {}  # the last warm one and the last cold one

    def choose(
        self, pool: Examples, target: Examples | None, n: int, *, seed: int, warm: State | None
    ) -> Choice:
        """The first n of the ranking, which depends on the seed and not on the budget."""
        strata = Strata.whole(len(pool), n)
        return self.choose_within(pool, target, strata, seed=seed, warm=warm)

    def choose_within(
        self,
        pool: Examples,
        target: Examples | None,
        strata: Strata,
        *,
        seed: int,
        warm: State | None,
    ) -> Choice:
        """The first of each part, as many as its quota, in the order of the whole ranking."""
        assert target is not None
        run, seconds = self._run(pool, target, seed, warm)
        weights, rows = run.weights, first_of_each(run.order, strata)
        scores: dict[str, NDArray] = {
            "weight_mean": weights.mean,
            "weight_sd": weights.sd,
            "loss": weights.losses,
        }
        diagnostics = weights.diagnostics | {
            "mean_weight_chosen": float(weights.mean[rows].mean()),
            "outside_share_chosen": float(weights.outside[rows].mean()),
        }
        if warm and self.compare_cold:
            cold, more = self._run(pool, target, seed, None)
            seconds += more
            shared = np.intersect1d(rows, first_of_each(cold.order, strata))
            diagnostics |= {
                "cold_rank_correlation": rank_correlation(weights.mean, cold.weights.mean),
                "cold_overlap": len(shared) / len(rows),
            }
        return Choice(
            rows,
            {name: column[rows] for name, column in scores.items()},
            diagnostics,
            _state(pool.ids, weights.members),
            spent=seconds,
        )

    def objective(self, chosen: Examples, target: Examples | None, own: Selection) -> float | None:
        """Mean weight of these examples as the chains ended; a weight network keeps none."""
        known = np.isin(own.state["ids"], chosen.ids)
        logits = [value[known] for name, value in own.state.items() if name.endswith(".logits")]
        return float(expit(np.array(logits, np.float64)).mean()) if logits else None

    def _run(
        self, pool: Examples, target: Examples, seed: int, warm: State | None
    ) -> tuple[_Run, float]:
        """The chains of this seed and data, and the seconds that an earlier call spent on them."""
        key = _key(pool, target, seed, warm)
        known = self._runs.get(bool(warm))
        if known is not None and known.key == key:
            return known, known.seconds
        started = time.perf_counter()
        assert pool.inputs is not None and target.inputs is not None
        model, settings = self.model(), dict(self.settings)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self.trainable is None or name in self.trainable)
        if warm:
            start = _members(warm, pool.ids, settings.get("beta", 0.5))
            steps = -(-settings.get("steps", 1000) // CONTINUED)
            settings |= {"start": start, "chains": len(start), "steps": steps}
        weights = infer_weights(
            model,
            (torch.from_numpy(pool.inputs), torch.from_numpy(pool.labels)),
            (torch.from_numpy(target.inputs), torch.from_numpy(target.labels)),
            seed=seed,
            folder=None if self.scratch is None else self.scratch / key.hex()[:20],
            **settings,
        )
        order = ranking(weights, self.pick, seed)
        run = self._runs[bool(warm)] = _Run(key, weights, order, time.perf_counter() - started)
        return run, 0.0


class BadsJoint(Bads):
    """The paper's own protocol: nothing is chosen, the model of the run itself is the result.

    All of the pool, each example weighted by its posterior mean, and the last chain's joint model
    in the place of a finetuned one. It had the steps of the chain, not those of the finetuning.
    """

    traits = STRATEGIES["bads_joint"]

    def size(self, limit: int, rows: int) -> int:
        """All of them."""
        return rows

    def choose_within(
        self,
        pool: Examples,
        target: Examples | None,
        strata: Strata,
        *,
        seed: int,
        warm: State | None,
    ) -> Choice:
        """All rows by falling weight."""
        assert target is not None
        run, seconds = self._run(pool, target, seed, warm)
        order, members = ranking(run.weights, "top", seed), run.weights.members
        mean = run.weights.mean[order].astype(np.float64)
        return Choice(
            order,
            {"weight_mean": mean, "weight_sd": run.weights.sd[order]},
            run.weights.diagnostics,
            _state(pool.ids, members),
            spent=seconds,
            weights=mean / mean.mean(),
            model=members[-1].joint,
        )


@dataclass(frozen=True)
class _Run:
    key: bytes
    weights: Weights
    order: Ints
    seconds: float


def ranking(weights: Weights, pick: str, seed: int) -> Ints:
    """[N] rows of the pool, first choice first, by a rule that `Bads` names."""
    rng = np.random.default_rng(seed)
    score = weights.mean.astype(np.float64)
    if pick == "sample":
        score = np.log(np.maximum(score, 1e-12)) + rng.gumbel(size=len(score))
    elif pick == "lower":
        score = score - weights.sd
    elif pick == "bernoulli":
        score = score / rng.random(len(score))
    elif pick != "top":
        raise ValueError(f"pick is sample, top, lower or bernoulli, not {pick!r}")
    return np.argsort(-score, kind="stable")


def _state(ids: NDArray[np.str_], members: Sequence[Member]) -> State:
    state: dict[str, NDArray] = {"ids": ids}
    for i, member in enumerate(members):
        if member.logits is not None:
            state[f"{i}.logits"] = member.logits.numpy()
        for part, held in (("joint", member.joint), ("network", member.network or {})):
            for name, value in held.items():
                state[f"{i}.{part}.{name}"] = value.cpu().numpy()
    return state


def _members(state: State, ids: NDArray[np.str_], beta: float) -> list[Member]:
    """Where the chains of an earlier pool ended, with logits for the rows of this one."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {
            name.removeprefix(prefix): torch.tensor(value)
            for name, value in state.items()
            if name.startswith(prefix)
        }

    _, here, there = np.intersect1d(ids, state["ids"], return_indices=True)
    members, number = [], 0
    while joint := part(f"{number}.joint."):
        logits = None
        if f"{number}.logits" in state:
            logits = torch.full((len(ids),), logit(beta))
            logits[here] = torch.tensor(state[f"{number}.logits"][there])
        members.append(Member(joint, logits, part(f"{number}.network.") or None))
        number += 1
    return members


def _key(pool: Examples, target: Examples, seed: int, warm: State | None) -> bytes:
    found = blake2b(str(seed).encode())
    for array in (pool.inputs, pool.labels, target.inputs, target.labels):
        assert array is not None
        found.update(np.ascontiguousarray(array).data)
    if warm:
        for name, array in [("ids", pool.ids), *sorted(warm.items())]:
            found.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return found.digest()
