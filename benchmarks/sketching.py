"""Sketches measured: speed against reading the input once, error on real gradients, spectra.

    python benchmarks/sketching.py [speed fidelity ...] [--write docs/sketching.md]

Without a section it runs all of them. --write puts each table between its marks in the page. Peers
are timed in the same process where they are installed: `pip install --no-deps -r
benchmarks/peers.txt`, without their dependencies, since some pull another torch.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import page
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from dsel_assets.gradients import gradient_blocks
from dsel_assets.sketching import ModelSketch, make_sketch
from dsel_assets.sketching.hadamard import hadamard
from dsel_assets.sketching.logra import LoGra
from dsel_assets.sketching.tensorsketch import TensorSketch

KINDS = ("gaussian", "countsketch", "sjlt", "srht", "affd", "afjl", "fjl", "qk", "ffd")
PAPER = {"affd": (10, 12, 13), "afjl": (12, 13, 15), "fjl": (10, 12, 13), "qk": (14, 16, 17)}
PAPER["ffd"] = (10, 12, 14)
# as the paper has them: one operator on the flat gradient
WHOLE: dict[str, dict[str, Any]] = {"afjl": {"block": 2**17}, "fjl": {}, "qk": {}, "ffd": {}}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("gaussian", {}),
    ("countsketch", {}),
    ("sjlt", {"nonzeros": 1}),
    ("sjlt", {"nonzeros": 4}),
    ("srht", {}),
    ("affd", {}),
    *(("affd_whole", {"preconditioner": name}) for name in ("hadamard", "fft", "orthogonal")),
    ("afjl", {}),
    ("fjl", {}),
    ("ffd", {}),
    ("qk", {"layout": "balanced"}),
    ("qk", {"layout": "listed"}),
]


def seconds(work: Callable[..., Any], *given: Any) -> float:
    started = time.perf_counter()
    work(*given)
    return time.perf_counter() - started


# speed


def speed() -> str:
    """256 gradients of a million entries into 4096 dimensions, two threads, single precision."""
    n, p, D = 256, 10**6, 4096
    torch.set_num_threads(2)
    X = torch.randn(n, p, generator=torch.Generator().manual_seed(0))
    exact = X[:64] @ X[:64].T
    rows = []
    for name, project, rounds in _contenders(X, D):
        seconds(project, X[:2])  # compiled or loaded
        pairs, extra = [], 0.0
        for _ in range(rounds):
            floor = seconds(X.sum)
            before = _memory(reset=True)
            started = time.perf_counter()
            Y = project(X)
            pairs.append((floor, time.perf_counter() - started))
            extra = max(extra, _memory() - before)
        took = float(np.median([own for _, own in pairs]))
        ratio = float(np.median([own / floor for floor, own in pairs]))
        rows.append(
            (name, f"{took:.3f}", f"{ratio:.1f}", f"{_error(exact, Y[:64]):.4f}", f"{extra:.0f}")
        )
        print(*rows[-1], f"(floor {np.median([floor for floor, _ in pairs]):.4f} s)", flush=True)
    header = ("contender", "seconds", "times one read", "error of inner products", "extra MiB")
    return page.markdown(header, rows)


def _contenders(X: Tensor, D: int) -> Iterable[tuple[str, Callable[[Tensor], Tensor], int]]:
    p = X.shape[1]
    for kind in ("countsketch", "affd"):
        yield f"**{kind}**", make_sketch(kind, p, D), 9
    yield "torch `index_add_`", _index_add(p, D), 3
    if find_spec("sklearn"):
        yield "scikit-learn `SparseRandomProjection`, transform", _sparse(p, D), 1
    if find_spec("dattri"):
        from dattri.func.projection import random_project

        for kind in ("normal", "rademacher"):

            def dattri(x: Tensor, kind: str = kind) -> Tensor:
                return random_project(x, len(x), D, 32, 0, kind, device="cpu")(x)

            yield f"dattri, {kind}", dattri, 1
    if find_spec("trak"):
        from trak.projectors import BasicProjector, ProjectionType

        for type_ in (ProjectionType.normal, ProjectionType.rademacher):
            projector = BasicProjector(p, D, 0, type_, torch.device("cpu"))

            def trak(x: Tensor, projector: Any = projector) -> Tensor:
                return projector.project(x, 0) / D**0.5  # it does not scale

            yield f"TRAK `BasicProjector`, {type_.value}", trak, 1


def _index_add(p: int, D: int) -> Callable[[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    buckets = torch.randint(D, (p,), generator=generator)
    flips = torch.randint(2, (p,), generator=generator).float() * 2 - 1

    def project(x: Tensor) -> Tensor:
        parts = [
            torch.zeros(len(part), D).index_add_(1, buckets, part * flips) for part in x.split(16)
        ]
        return torch.cat(parts)

    return project


def _sparse(p: int, D: int) -> Callable[[Tensor], Tensor]:
    from sklearn.random_projection import SparseRandomProjection

    fitted = SparseRandomProjection(D, dense_output=True, random_state=0).fit(np.zeros((1, p)))
    return lambda x: torch.from_numpy(np.asarray(fitted.transform(x.numpy())))


def _memory(reset: bool = False) -> float:
    """MiB of resident memory, now with `reset`, else at most since then (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[0]) / 1024


def _error(exact: Tensor, Y: Tensor) -> float:
    """Root mean square error of the pairs' inner products, over the product of the norms."""
    norms = exact.diagonal().sqrt()
    error = (Y @ Y.T - exact) / (norms[:, None] * norms)
    return float(error.square().mean().sqrt())


# fidelity


def digits_network() -> tuple[nn.Module, Tensor, Tensor]:
    """The note's MLP 64-256-256-10 (p = 85,002) after 100 steps on UCI's digits, and the data."""
    data = load_digits()
    x, y = torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(100):
        rows = slice(step * 32 % 1500, step * 32 % 1500 + 32)
        optimiser.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimiser.step()
    return model, x, y


def fidelity(seeds: int = 10) -> str:
    """Correlation of sketched with exact inner products of 300 normalised gradients."""
    model, x, y = digits_network()
    names = [name for name, _ in model.named_parameters()]
    blocks = list(gradient_blocks(model, x[:300], y[:300], names, block=300))
    gradients = {
        name: g / blocks[0].norms.reshape(-1, *[1] * (g.ndim - 1))
        for name, g in blocks[0].gradients.items()
    }
    flat = torch.cat([g.flatten(1) for g in gradients.values()], 1)
    exact = flat @ flat.T
    shapes = {name: g.shape[1:] for name, g in gradients.items()}
    pairs = torch.triu_indices(300, 300, 1)
    wanted = exact[pairs[0], pairs[1]].numpy()
    dimensions = [2**k for k in range(6, 15)]
    found: dict[str, list[float]] = {}
    errors: dict[str, list[float]] = {}
    for kind in KINDS:
        for D in dimensions:
            if kind == "gaussian" and D > 2**10:
                break
            scores, misses = [], []
            for seed in range(seeds if kind != "gaussian" else 2):
                if kind in WHOLE:
                    Y = make_sketch(kind, flat.shape[1], D, seed, **WHOLE[kind])(flat)
                else:
                    Y = ModelSketch(shapes, kind, D, seed)(gradients)
                got = (Y @ Y.T)[pairs[0], pairs[1]].numpy()
                scores.append(np.corrcoef(wanted, got)[0, 1])
                misses.append(np.sqrt(np.mean((wanted - got) ** 2)))
            found.setdefault(kind, []).append(float(np.mean(scores)))
            errors.setdefault(kind, []).append(float(np.mean(misses)))
        print(kind, [f"{r:.4f}" for r in found[kind]], flush=True)
    rows = []
    for kind in KINDS:
        cells = [f"{r:.4f} / {e:.3f}" for r, e in zip(found[kind], errors[kind], strict=True)][2::2]
        needed = [_needed(dimensions, found[kind], level) for level in (0.95, 0.98, 0.99)]
        paper = "/".join(map(str, PAPER[kind])) if kind in PAPER else ""
        rows.append((kind, *cells, *[""] * (5 - 2 - len(cells) + 1), "/".join(needed), paper))
    header = ("kind", "D = 2^8", "2^10", "2^12", "2^14", "log2 D for r > .95/.98/.99", "paper")
    alone = []
    for name, gradient in gradients.items():
        own = gradient.flatten(1) @ gradient.flatten(1).T
        alone.append((name, f"{np.corrcoef(wanted, own[pairs[0], pairs[1]].numpy())[0, 1]:.2f}"))
    layers = ", ".join(f"`{name}` {r}" for name, r in alone if name.endswith("weight"))
    return (
        page.markdown(header, rows)
        + f"\n\nOne layer's exact gradient alone: r = {layers} (the paper's Table 5: .16 to .91)."
    )


def _needed(dimensions: list[int], scores: list[float], level: float) -> str:
    enough = [D for D, r in zip(dimensions, scores, strict=False) if r > level]
    if enough:
        return str(enough[0].bit_length() - 1)
    return f">{dimensions[len(scores) - 1].bit_length() - 1}"


# variance


def variance(seeds: int = 400) -> str:
    """D * Var(|Sx|^2) of unit vectors of the kinds that break sketches."""
    N, D, side = 2**14, 2**8, 128
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = {
        "dense": randn(N),
        "one coordinate": torch.eye(1, N)[0],
        "column, stride D": torch.zeros(N).index_add_(0, torch.arange(0, N, D), randn(N // D)),
        "row": torch.zeros(N).index_add_(0, torch.arange(5 * D, 5 * D + side), randn(side)),
        "rank one": torch.outer(randn(side), randn(side)).flatten(),
        "FFD's worst": torch.cat([hadamard(torch.eye(1, D)[0]), torch.zeros(N - D)]),
        "heavy tail": randn(N) ** 9,
    }
    X = torch.stack([x / x.norm() for x in inputs.values()])
    rows = []
    for kind, options in VARIANTS:
        count = seeds // 4 if kind in ("gaussian", "rademacher") else seeds
        squares = torch.stack(
            [
                make_sketch(kind, N, D, s, **options)(X).double().square().sum(1)
                for s in range(count)
            ]
        )
        mean, spread = squares.mean(0), D * squares.var(0)
        name = " ".join([kind, *map(str, options.values())])
        rows.append(
            (
                name,
                *(
                    f"{m:.2f} / {v:.0f}" if v > 20 else f"{m:.2f} / {v:.1f}"
                    for m, v in zip(mean, spread, strict=True)
                ),
            )
        )
        print(*rows[-1], flush=True)
    return page.markdown(("mean / V", *inputs), rows)


# linear layers


Factors = tuple[Tensor, Tensor]


def linear(rounds: int = 25, seeds: int = 5) -> str:
    """RMS error of inner products relative to the mean squared norm, and time, by contender."""
    n, T, side, D = 128, 32, 1000, 4096
    torch.set_num_threads(2)
    inputs = {
        "iid tokens": _factors(n, T, side),
        "massive activation": _factors(n, T, side, massive=100.0),
        "single token": _factors(n, 1, side),
    }
    p = side * side
    kinds: dict[str, Callable[[int], Callable[[Tensor, Tensor], Tensor]]] = {
        "`logra`, 64 x 64": lambda s: LoGra(p, D, s, columns=side).of_factors,
        "`logra`, 16 x 256": lambda s: LoGra(p, D, s, columns=side, kept_rows=16).of_factors,
        "**`tensorsketch`**": lambda s: TensorSketch(p, D, s, columns=side).of_factors,
        "formed, then `countsketch`": lambda s: _formed(make_sketch("countsketch", p, D, s)),
    }
    contenders = {name: make(0) for name, make in kinds.items()}
    x, d = inputs["iid tokens"]
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name, sketch in contenders.items():
            if turn < 3 or not name.startswith("formed"):
                took[name].append(seconds(sketch, x, d))
    base = min(took["`logra`, 64 x 64"])
    exact = {name: _inner_products(*factors) for name, factors in inputs.items()}
    rows = []
    for name, make in kinds.items():
        errors: dict[str, list[float]] = {what: [] for what in inputs}
        deviations: list[float] = []
        for seed in range(seeds if not name.startswith("formed") else 1):
            sketch = make(seed)
            for what, factors in inputs.items():
                Y = sketch(*factors)
                truth = exact[what]
                squares = truth.diagonal()
                error = ((Y @ Y.T) - truth).square().mean().sqrt() / squares.mean()
                errors[what].append(float(error))
                if what == "single token":
                    deviations.append(
                        float((Y.square().sum(1) / squares - 1).square().mean().sqrt())
                    )
        median = float(np.median(took[name]))
        row = [name, *(_range(errors[what]) for what in inputs), _range(deviations)]
        # of |S g| itself: half of that of its square
        row += [_range([v / 2 for v in deviations]), f"{min(took[name]):.4f}", f"{median:.4f}"]
        rows.append((*row, f"{min(took[name]) / base:.2f}"))
        print(*rows[-1], flush=True)
    header = ("sketch", *inputs, "sd of |Sg|²/|g|², one token", "of |Sg|/|g|", "s, best")
    return page.markdown((*header, "s, median", "times `logra`, 64 x 64"), rows)


def _factors(n: int, T: int, side: int, massive: float = 1.0) -> Factors:
    generator = torch.Generator().manual_seed(0)
    x, d = torch.randn(2, n, T, side, generator=generator)
    x[..., 7] *= massive
    return x, d


def _inner_products(x: Tensor, d: Tensor) -> Tensor:
    """<G_a, G_b> of all pairs, without any G."""
    n, T = x.shape[:2]
    x, d = x.flatten(0, 1), d.flatten(0, 1)
    return ((x @ x.T) * (d @ d.T)).view(n, T, n, T).sum((1, 3))


def _formed(sketch: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def apply(x: Tensor, d: Tensor) -> Tensor:
        parts = zip(x.split(16), d.split(16), strict=True)
        return torch.cat([sketch((right.mT @ left).flatten(1)) for left, right in parts])

    return apply


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.3f}" if f"{low:.3f}" == f"{high:.3f}" else f"{low:.3f}-{high:.3f}"


SECTIONS = {"speed": speed, "fidelity": fidelity, "variance": variance, "linear": linear}


if __name__ == "__main__":
    page.main(SECTIONS, __doc__)
