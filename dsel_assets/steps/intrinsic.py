"""How many dimensions the finetuning needs: the one-run search on the task's own data."""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import islice

import torch
from torch import Tensor
from torch.func import functional_call, grad
from torch.nn import functional as F
from tqdm import tqdm

from dsel_assets.curvature import search_intrinsic_dimension
from dsel_assets.finetuning import predict, shuffled_batches
from dsel_assets.resources.store import Entry
from dsel_assets.sketching import ModelSketch
from dsel_assets.steps.model import base_builder
from dsel_assets.steps.path import SEED, finetuning_path, path_weights, training_set
from dsel_assets.steps.pool import evaluation_set, load_examples
from dsel_assets.steps.space import trainable_shapes
from dsel_assets.steps.spectrum import hessian_spectrum
from dsel_assets.steps.workspace import Workspace

HISTORY = "history.json"


def intrinsic_dimension(ws: Workspace) -> Entry:
    """The dimension in which finetuning reaches a share of what it reaches in all of them.

    Trained on the first usable arrival as `finetuning_path` is, which also says what is reached;
    scored by accuracy on validation.
    """
    spec = ws.task.intrinsic
    pool = hessian_spectrum(ws).manifest["fields"]["pool"]
    path = finetuning_path(ws, pool)
    validation = evaluation_set(ws, "validation")
    fields = {
        "path": path.identity,
        "validation": validation.identity,
        "spec": spec.model_dump(),
        "version": 1,
    }
    if entry := ws.store.find(ws.task.name, "intrinsic_dimension", fields):
        return entry
    inputs, labels = training_set(ws, pool)
    held_out = load_examples(validation)
    shapes = trainable_shapes(ws)
    model = base_builder(ws)().eval()
    point = {name: model.get_parameter(name).detach().clone() for name in shapes}
    drawn = shuffled_batches(len(labels), ws.task.finetune.batch_size, SEED)
    batches: list[Tensor] = []

    def gradient(weights: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        bar.update()
        batches.extend(islice(drawn, max(0, step + 1 - len(batches))))
        rows = batches[step]

        def loss(weights: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(functional_call(model, weights, (inputs[rows],)), labels[rows])

        return grad(loss)(weights)

    def accuracy(weights: dict[str, Tensor]) -> float:
        own = base_builder(ws)()
        own.load_state_dict(weights, strict=False)
        found = predict(own, torch.from_numpy(held_out.inputs)).argmax(1)
        return float((found == torch.from_numpy(held_out.labels)).double().mean())

    full = accuracy(path_weights(path, ws.task.finetune.steps))
    with (
        tqdm(desc="intrinsic dimension", unit="step", leave=False) as bar,
        ws.store.write(ws.task.name, "intrinsic_dimension", fields) as draft,
    ):
        found = search_intrinsic_dimension(
            point,
            gradient,
            accuracy,
            ModelSketch(shapes, "affd", spec.dim, SEED),
            target=spec.share * full,
            delta=spec.delta,
            steps=spec.steps,
            start=spec.start,
            lr=spec.lr,
        )
        rounds = {
            "history": [asdict(one) for one in found.history],
            "verification": [asdict(one) for one in found.verification],
        }
        (draft.path / HISTORY).write_text(json.dumps(rounds))
        draft.rows = len(found.history)
        draft.summary = {
            "dimension": found.dimension,
            "verified": found.verified,
            "parameters": sum(p.numel() for p in point.values()),
            "start": found.history[0].score,
            "target": spec.share * full,
            "all_dimensions": full,
            "steps": found.history[-1].step,
        }
    return draft.done
