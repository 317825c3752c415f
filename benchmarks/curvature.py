"""Spectra measured: the bias of a sketched one, and the top five by tool; and a task's own.

    python benchmarks/curvature.py [bias spectrum intrinsic] [--write docs/sketching.md]

Peers are timed in the same process where they are installed (benchmarks/peers.txt). `intrinsic`
takes the default task's spectra along finetuning too, and writes both pictures into docs/pictures.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import page
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from sketching import digits_network
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from dsel_assets.curvature import hessian_vector_product, spectrum
from dsel_assets.evaluation import plots
from dsel_assets.sketching import make_sketch
from dsel_assets.sketching.hadamard import hadamard
from dsel_assets.steps.arrivals import landed, register
from dsel_assets.steps.intrinsic import HISTORY, intrinsic_dimension
from dsel_assets.steps.path import spectrum_steps
from dsel_assets.steps.spectrum import spectra_so_far, spectrum_on_the_way
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import load_task

ROOT = Path(__file__).parent.parent
TOP = 5
PAPER = {"affd": "9/10/10", "afjl": "12/12/12", "qk": "13/13/13"}  # Table 7
Counter = Callable[[Any], Any]
Tool = Callable[[nn.Module, Tensor, Tensor, Counter], Any]


def bias(seeds: int = 6) -> str:
    """Top-10 error of a quadratic's sketched spectrum before and after the correction."""
    rows = []
    dimensions = [2**k for k in range(7, 15)]
    for kind in ("affd", "countsketch", "afjl", "qk"):
        errors = np.array(
            [np.mean([_errors(kind, D, seed) for seed in range(seeds)], 0) for D in dimensions]
        )
        cells = [f"{raw:.3f}, {own:.3f}" for raw, own in errors[[1, 3, 5]]]
        needed = [
            next(
                (
                    str(D.bit_length() - 1)
                    for D, e in zip(dimensions, errors, strict=True)
                    if e[1] < most
                ),
                ">14",
            )
            for most in (0.2, 0.1, 0.05)
        ]
        rows.append((kind, *cells, "/".join(needed), PAPER.get(kind, "")))
        print(*rows[-1], flush=True)
    header = ("kind", "D = 2^8", "2^10", "2^12", "log2 D for an error < .2/.1/.05", "paper")
    return page.markdown(header, rows)


def _errors(kind: str, D: int, seed: int) -> list[float]:
    """Raw and corrected."""
    N = 2**16
    top = np.array([100.0, 70, 50, 40, 30, 25, 20, 18, 15, 13])
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(N, generator=generator, dtype=torch.float64) * 0.4
    values[:10] = torch.as_tensor(top)
    values[10:13] = torch.tensor([-30.0, -12.0, -8.0])
    values = values[torch.randperm(N, generator=generator)]
    flips = (torch.randint(2, (N,), generator=generator) * 2 - 1).double()

    def product(v: Tensor) -> Tensor:
        return flips * hadamard(values * hadamard(flips * v)) / N

    options: dict[str, Any] = {"block": N} if kind == "afjl" else {}  # as the paper has it
    found = spectrum(product, k=13, sketch=make_sketch(kind, N, D, seed, **options), iterations=80)
    return [float(np.mean(np.abs(v[:10] / top - 1))) for v in (found.raw, found.eigenvalues)]


def top_five(rounds: int = 3) -> str:
    """Seconds, products and worst relative error of the five largest eigenvalues, by tool."""
    torch.set_num_threads(1)
    model, x, y = digits_network()
    x, y = x[:512], y[:512]
    exact = _eigsh(model.double(), x.double(), y, lambda f: f, 0)
    model.float()
    tools: dict[str, Tool] = {
        "dsel": partial(_own, tolerance=1e-2),
        "dsel, `affd` D = 4096, 40 steps": partial(
            _own, iterations=40, sketch=make_sketch("affd", _size(model), 4096)
        ),
        **_peers(),
    }
    times: dict[str, list[float]] = {name: [] for name in tools}
    last = {}
    for _ in range(rounds):
        for name, tool in tools.items():
            calls: list[int] = []

            def counted(f: Callable[..., Any], calls: list[int] = calls) -> Callable[..., Any]:
                def call(*given: Any) -> Any:
                    calls.append(1)
                    return f(*given)

                return call

            started = time.perf_counter()
            values = np.sort(np.asarray(tool(model, x, y, counted), dtype=float))[::-1]
            times[name].append(time.perf_counter() - started)
            last[name] = len(calls), values
    rows = []
    for name in tools:
        products, values = last[name]
        error = np.abs(values / exact - 1).max()
        shown = ", ".join(f"{value:.3f}" for value in values)
        rows.append((name, f"{np.median(times[name]):.2f}", products, f"{error:.0e}", shown))
        print(*rows[-1], flush=True)
    return page.markdown(("tool", "seconds", "products", "worst error", "eigenvalues"), rows)


def _own(model: nn.Module, x: Tensor, y: Tensor, counted: Counter, **options: Any) -> Any:
    product = _product(model, x, y)
    dim = None if "sketch" in options else _size(model)
    # the bottom eigenvalue is always among the k
    return spectrum(counted(product), dim, k=TOP + 1, probes=1, **options).eigenvalues[:TOP]


def _product(model: nn.Module, x: Tensor, y: Tensor) -> Any:
    def loss(weights: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (x,)), y)

    return hessian_vector_product(loss, dict(model.named_parameters()))


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _eigsh(model: nn.Module, x: Tensor, y: Tensor, counted: Counter, tol: float) -> Any:
    product = counted(_product(model, x, y))
    H = LinearOperator(
        (_size(model), _size(model)),
        lambda v: product(torch.from_numpy(v.ravel())).numpy(),
        dtype=x.numpy().dtype,
    )
    return np.sort(eigsh(H, TOP, which="LA", tol=tol, return_eigenvectors=False))[::-1]


def _peers() -> dict[str, Tool]:
    """Those that are installed; every one gets the full batch at once."""
    tools: dict[str, Tool] = {}
    if find_spec("curvlinops"):
        tools["curvlinops + eigsh"] = _curvlinops
        tools["the same, tolerance 1e-2"] = partial(_curvlinops, tol=1e-2)
    if find_spec("pyhessian"):
        tools["PyHessian, defaults"] = _pyhessian
        tools["PyHessian, tolerance 1e-5"] = partial(_pyhessian, maxIter=1000, tol=1e-5)
    if find_spec("hessian_eigenthings"):
        tools["hessian-eigenthings, defaults"] = _eigenthings
        for steps in (20, 50):
            tools[f"hessian-eigenthings, {steps} steps"] = lambda *given, steps=steps: _eigenthings(
                *given, max_iter=steps
            )
    return tools


def _curvlinops(model: nn.Module, x: Tensor, y: Tensor, counted: Counter, tol: float = 0) -> Any:
    from curvlinops import HessianLinearOperator

    H = HessianLinearOperator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(x, y)],
        check_deterministic=False,
    ).to_scipy()
    own = LinearOperator(H.shape, counted(H.matvec), dtype=H.dtype)
    return eigsh(own, TOP, which="LA", tol=tol, return_eigenvectors=False)


def _pyhessian(
    model: nn.Module, x: Tensor, y: Tensor, counted: Counter, **options: Any
) -> list[float]:
    import pyhessian

    module = sys.modules["pyhessian.hessian"]
    original = module.hessian_vector_product
    module.hessian_vector_product = counted(original)  # type: ignore[attr-defined]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            tool = pyhessian.hessian(model, nn.CrossEntropyLoss(), data=(x, y), cuda=False)
            return list(tool.eigenvalues(top_n=TOP, **options)[0])
    finally:
        module.hessian_vector_product = original  # type: ignore[attr-defined]
        model.zero_grad(set_to_none=True)


def _eigenthings(
    model: nn.Module, x: Tensor, y: Tensor, counted: Counter, **options: Any
) -> np.ndarray:
    from hessian_eigenthings import HessianOperator, lanczos

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    H = HessianOperator(model, [(x, y)], loss)
    H.matvec = counted(H.matvec)
    found = lanczos(H, k=TOP, which="LA", seed=0, **options).eigenvalues.numpy()
    return np.asarray(found)


def intrinsic() -> str:
    """The default task along finetuning, and how many dimensions that needs."""
    ws = Workspace(load_task(ROOT / "tasks/digits.yaml"), ROOT / ".dsel/benchmark")
    ws.prepare()
    for file in landed(ws):
        register(ws, file)
    for step in spectrum_steps(ws):
        spectrum_on_the_way(ws, step)
    pictures = ROOT / "docs/pictures"
    (pictures / "spectra.png").write_bytes(plots.spectra(spectra_so_far(ws)))
    entry = intrinsic_dimension(ws)
    found = json.loads(entry.file(HISTORY).read_text())
    summary = entry.summary
    picture = plots.rounds(found["history"], found["verification"], summary["target"])
    (pictures / "intrinsic.png").write_bytes(picture)
    half = found["verification"][-1]
    below = "stayed below" if summary["verified"] else "reached"
    return (
        f"The search ended in {summary['dimension']:,} of {summary['parameters']:,} dimensions "
        f"after {summary['steps']} steps (target {summary['target']:.3f}; all dimensions "
        f"{summary['all_dimensions']:.3f}, start {summary['start']:.3f}). Half of it, trained from "
        f"the start, {below} the target ({half['score']:.3f} after {half['step']} steps): the "
        f"answer is {'verified' if summary['verified'] else 'an upper bound, not verified'}."
    )


SECTIONS = {"bias": bias, "spectrum": top_five, "intrinsic": intrinsic}

if __name__ == "__main__":
    page.main(SECTIONS, __doc__)
