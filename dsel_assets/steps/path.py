"""One finetuning run on a whole arrival, with the weights kept at some steps on the way."""

from __future__ import annotations

import torch
from torch import Tensor

from dsel_assets.finetuning import train
from dsel_assets.models import load_weights, save_weights
from dsel_assets.resources.store import Entry, StoreError
from dsel_assets.steps.model import base_builder, base_model
from dsel_assets.steps.pool import evaluation_set, load_examples
from dsel_assets.steps.space import trainable_shapes
from dsel_assets.steps.workspace import Workspace

SEED = 0


def finetuning_path(ws: Workspace, pool: str) -> Entry:
    """The run that everything along finetuning is measured on: all rows of `pool`, one seed.

    pool: identity of an arrival's artifact. The target set is in, as in every other finetuning.
    """
    spec = ws.task.finetune
    steps = spectrum_steps(ws)
    fields = {
        "base": base_model(ws).identity,
        "pool": pool,
        "target": evaluation_set(ws, "target").identity if spec.include_target else None,
        "finetune": spec.model_dump(),
        "steps": steps,
        "version": 1,
    }
    if entry := ws.store.find(ws.task.name, "finetuning_path", fields):
        return entry
    inputs, labels = training_set(ws, pool)
    with ws.store.write(ws.task.name, "finetuning_path", fields) as draft:
        trained = train(
            base_builder(ws)(),
            inputs,
            labels,
            torch.ones(len(labels)),
            trainable=list(trainable_shapes(ws)),
            steps=spec.steps,
            batch_size=spec.batch_size,
            lr=spec.lr,
            seed=SEED,
            keep={*steps, spec.steps},
        )
        for step, weights in trained.kept.items():
            save_weights(weights, draft.path / _name(step))
        draft.rows = len(labels)
        draft.summary = {"curve": trained.curve}
    return draft.done


def path_weights(path: Entry, step: int) -> dict[str, Tensor]:
    """The weights after `step` steps; StoreError if they were not kept."""
    if _name(step) not in path.manifest["files"]:
        raise StoreError(f"{path.path}: no weights were kept at step {step}; see spectrum.steps")
    return load_weights(path.file(_name(step)))


def spectrum_steps(ws: Workspace) -> list[int]:
    """The task's `spectrum.steps` that its finetuning reaches."""
    return [step for step in ws.task.spectrum.steps if step <= ws.task.finetune.steps]


def training_set(ws: Workspace, pool: str) -> tuple[Tensor, Tensor]:
    """Inputs and labels of a whole arrival, and of the target set where it is trained on."""
    entry = ws.store.entry(ws.task.name, "pool", pool)
    if entry is None:
        raise StoreError(f"{ws.task.name}: arrival {pool} is not in the store any more")
    parts = [load_examples(entry)]
    if ws.task.finetune.include_target:
        parts.append(load_examples(evaluation_set(ws, "target")))
    inputs = torch.cat([torch.from_numpy(part.inputs) for part in parts])
    return inputs, torch.cat([torch.from_numpy(part.labels) for part in parts])


def _name(step: int) -> str:
    return f"step-{step}.safetensors"
