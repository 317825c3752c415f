"""Hessian spectra at the base checkpoint and along finetuning, and what they advise."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from tqdm import tqdm

from dsel_assets.curvature import (
    Spectrum,
    alignment,
    averaged,
    density,
    gauss_newton_vector_product,
    hessian_vector_product,
    negative_ratio,
    outliers,
    predicted_error,
    spectrum,
    suggest_dimension,
)
from dsel_assets.gradients import gradient_blocks
from dsel_assets.resources.store import Draft, Entry, StoreError, write_json
from dsel_assets.sketching import KINDS, ModelSketch
from dsel_assets.sketching.dense import Dense
from dsel_assets.sketching.quality import gram, gram_error
from dsel_assets.steps.arrivals import arrivals
from dsel_assets.steps.model import base_builder, base_model
from dsel_assets.steps.path import finetuning_path, path_weights, spectrum_steps
from dsel_assets.steps.pool import held_back, ingest, load_examples
from dsel_assets.steps.space import (
    dimension_pin,
    operator_fields,
    sketch_dimension,
    trainable_shapes,
)
from dsel_assets.steps.workspace import Workspace

SPECTRUM = "spectrum.json"
DIMENSIONS = [2**i for i in range(6, 15)]
SEEN_THROUGH = "affd"  # the sketch of spectrum.sketch_dim
PROBE = 64  # gradients whose inner products are compared with their sketches'


def hessian_spectrum(ws: Workspace) -> Entry:
    """Eigenvalues of the mean loss's Hessian over examples of the first arrival that has any.

    Ids are hashes, so the first examples by id are a random sample. Once taken it stays as the pool
    grows, also when a later arrival comes first by key, which pins the advised dimension.
    """
    made_of = {
        "base": base_model(ws).identity,
        "trainable": list(trainable_shapes(ws)),
        "contract": ws.task.pool.columns.model_dump(mode="json"),
        "spec": ws.task.spectrum.model_dump(exclude={"steps"}),
        "operator": operator_fields(ws, ws.task.sketch.kind),
        "seen_through": operator_fields(ws, SEEN_THROUGH),
        "version": 3,
    }
    for entry in ws.store.entries(ws.task.name, "hessian_spectrum"):
        if made_of.items() <= entry.manifest["fields"].items():
            return entry
    for known in arrivals(ws):
        pool = ingest(ws, known.key)
        if pool.manifest["rows"] and held_back(ws, pool) is None:
            break
    else:
        raise StoreError(f"{ws.task.name}: no usable arrival in {ws.landing} yet")
    fields = made_of | {"pool": pool.identity}
    with ws.store.write(ws.task.name, "hessian_spectrum", fields) as draft:
        found, content = _measure(ws, pool, base_builder(ws)().state_dict(), draft)
        content["predicted_error"] = {
            "dimension": DIMENSIONS,
            "relative_error": predicted_error(found, DIMENSIONS).tolist(),
        }
        content["measured_error"] = _distortion(ws, pool)
        (draft.path / SPECTRUM).write_text(json.dumps(content))
        draft.summary["advised_dimension"] = suggest_dimension(found, ws.task.spectrum.tolerance)
    return draft.done


def spectrum_on_the_way(ws: Workspace, step: int) -> Entry:
    """The same after `step` steps of the finetuning path, on the same examples."""
    base = hessian_spectrum(ws)
    path = finetuning_path(ws, base.manifest["fields"]["pool"])
    fields = _on_the_way(base, path) | {"step": step}
    if entry := ws.store.find(ws.task.name, "finetuning_spectra", fields):
        return entry
    pool = ws.store.entry(ws.task.name, "pool", base.manifest["fields"]["pool"])
    assert pool is not None
    with ws.store.write(ws.task.name, "finetuning_spectra", fields) as draft:
        content = _measure(ws, pool, path_weights(path, step), draft)[1]
        (draft.path / SPECTRUM).write_text(json.dumps(content))
        draft.summary["step"] = step
    return draft.done


def spectra_so_far(ws: Workspace) -> list[dict[str, Any]]:
    """Eigenvalues and summary of each spectrum of this task's finetuning path, by step."""
    base = hessian_spectrum(ws)
    path = finetuning_path(ws, base.manifest["fields"]["pool"])
    found = []
    for step in spectrum_steps(ws):
        fields = _on_the_way(base, path) | {"step": step}
        if entry := ws.store.find(ws.task.name, "finetuning_spectra", fields):
            content = json.loads(entry.file(SPECTRUM).read_text())
            found.append({"eigenvalues": content["eigenvalues"], **entry.summary})
    return found


def pin_dimension(ws: Workspace) -> int:
    """D of the task; `auto` takes what the spectrum advises (256 to 8192) once, and pins it."""
    if ws.task.sketch.dim == "auto" and not (pin := dimension_pin(ws)).exists():
        advised = hessian_spectrum(ws).summary["advised_dimension"]
        write_json(pin, {"dimension": min(8192, max(256, advised))})
    return sketch_dimension(ws)


def _on_the_way(base: Entry, path: Entry) -> dict[str, Any]:
    same = {name: base.manifest["fields"][name] for name in ("spec", "seen_through")}
    return {"path": path.identity, "version": 2, **same}


def _measure(
    ws: Workspace, pool: Entry, weights: Mapping[str, Tensor], draft: Draft
) -> tuple[Spectrum, dict[str, Any]]:
    """The spectrum of the loss at these weights, and what of it is kept; fills the summary.

    Killed, it goes on from the Krylov vectors that it had.
    """
    spec = ws.task.spectrum
    examples = load_examples(pool)
    examples = examples.take(examples.ids.argsort()[: spec.examples])
    inputs, labels = torch.from_numpy(examples.inputs), torch.from_numpy(examples.labels)
    model = base_builder(ws)()
    model.load_state_dict(dict(weights))
    model.eval()
    parameters = {name: model.get_parameter(name).detach() for name in trainable_shapes(ws)}
    size = sum(p.numel() for p in parameters.values())
    sketch = None
    if spec.sketch_dim is not None:
        shapes = trainable_shapes(ws)
        sketch = ModelSketch(shapes, SEEN_THROUGH, spec.sketch_dim, ws.task.sketch.seed)
    room = size if spec.sketch_dim is None else spec.sketch_dim
    steps = min(spec.iterations, room)
    product, gradient = _products(ws, model, parameters, inputs, labels)
    state = draft.path.parent / f"{draft.identity}.lanczos"
    with tqdm(total=steps + 8, desc="spectrum", unit="product", leave=False) as bar:

        def counted(v: Any) -> Any:
            bar.update()
            return product(v)

        found = spectrum(
            counted,
            size,
            k=min(spec.eigenvalues, size if sketch is None else room // 2),
            iterations=steps,
            sketch=sketch,
            vectors=True,
            state=state,
        )
    low, high = found.nodes.min(), found.nodes.max()
    width = max((high - low) / 100, 1e-12)
    grid = torch.linspace(low - 5 * width, high + 5 * width, 400, dtype=torch.float64).tolist()
    content = {
        "eigenvalues": found.eigenvalues.tolist(),
        "raw": found.raw.tolist(),
        "residuals": found.residuals.tolist(),
        "density": {"grid": grid, "values": density(found, grid, width).tolist()},
    }
    count = outliers(found.eigenvalues)
    seen = sketch({k: g[None] for k, g in gradient.items()})[0] if sketch else _flat(gradient)
    assert found.vectors is not None
    draft.rows = len(found.eigenvalues)
    draft.summary = {
        "examples": len(examples),
        "parameters": size,
        "top_eigenvalue": float(found.eigenvalues[0]),
        "negative_ratio": negative_ratio(found.eigenvalues),
        "outliers": count,
        "all_outliers_seen": bool(np.abs(found.eigenvalues).min() <= 0.2 * found.eigenvalues[0]),
        "gradient_in_outliers": float(alignment(seen, found.vectors[:count])),
        "trace": found.trace,
        "frobenius": found.frobenius,
        "largest_residual": float(found.residuals.max()),
    }
    state.unlink(missing_ok=True)
    return found, content


def _products(
    ws: Workspace,
    model: torch.nn.Module,
    parameters: dict[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
) -> tuple[Callable[[Any], Any], dict[str, Tensor]]:
    """The curvature's product averaged over batches, and the mean loss's gradient."""
    spec = ws.task.spectrum
    parts = list(zip(inputs.split(spec.batch_size), labels.split(spec.batch_size), strict=True))
    keep = len(parts) == 1
    products, sizes = [], [len(y) for _, y in parts]
    gradient = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for x, y in parts:

        def logits(weights: dict[str, Tensor], x: Tensor = x) -> Tensor:
            return functional_call(model, weights, (x,))

        def loss(weights: dict[str, Tensor], x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(functional_call(model, weights, (x,)), y)

        def of_logits(outputs: Tensor, y: Tensor = y) -> Tensor:
            return F.cross_entropy(outputs, y)

        if spec.curvature == "hessian":
            products.append(hessian_vector_product(loss, parameters, keep=keep))
        else:
            products.append(gauss_newton_vector_product(logits, parameters, of_logits, keep=keep))
        for name, part in torch.func.grad(loss)(parameters).items():
            gradient[name] += part * (len(y) / len(labels))
    return averaged(products, sizes), gradient


def _distortion(ws: Workspace, pool: Entry) -> dict[str, list[float]]:
    """Error of gradients' inner products through sketches of growing dimension, on a probe."""
    shapes, spec = trainable_shapes(ws), ws.task.sketch
    examples = load_examples(pool)
    examples = examples.take(examples.ids.argsort()[:PROBE])
    inputs, labels = torch.from_numpy(examples.inputs), torch.from_numpy(examples.labels)
    block = next(gradient_blocks(base_builder(ws)(), inputs, labels, list(shapes), block=PROBE))
    if len(block.losses) < 2:
        return {"dimension": [], "rms": [], "within": []}
    exact = gram(block.gradients)
    slow = issubclass(KINDS[spec.kind], Dense)
    dimensions = [D for D in DIMENSIONS if not slow or D <= 1024]
    found = [
        gram_error(
            exact,
            gram(ModelSketch(shapes, spec.kind, D, spec.seed)(block.gradients)),
            D,
            allowed_variance(spec.kind),
        )
        for D in dimensions
    ]
    return {
        "dimension": [float(D) for D in dimensions],
        "rms": [one["rms"] for one in found],
        "within": [one["within"] for one in found],
    }


def allowed_variance(kind: str) -> float:
    """What a sketch of this kind is held to (`Sketch.variance`).

    One that promises nothing is held to the worst that the safe ones promise.
    """
    return min(KINDS[kind].variance, KINDS["affd"].variance)


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])
