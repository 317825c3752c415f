"""The base checkpoint, and what of it is trained."""

from __future__ import annotations

from typing import Any

from dsel_assets.models import (
    Builder,
    builder,
    load_weights,
    pretrain,
    save_weights,
    trainable_names,
)
from dsel_assets.resources.store import Entry
from dsel_assets.steps.pool import digest_of
from dsel_assets.steps.workspace import BUNDLED, Workspace

WEIGHTS = "weights.safetensors"


def base_model(ws: Workspace) -> Entry:
    """The checkpoint that everything starts from: a safetensors file, or the bundled one."""
    spec, schema = ws.task.model, ws.task.pool.columns
    bundled = spec.base.startswith(BUNDLED)
    fields = {
        "kind": spec.kind,
        "name": spec.name,
        "base": spec.base if bundled else digest_of(spec.base),
        "shape": schema.shape,
        "classes": schema.classes,
        "version": 1,
    }
    if entry := ws.store.find(ws.task.name, "base_model", fields):
        return entry
    with ws.store.write(ws.task.name, "base_model", fields) as draft:
        classes = len(schema.classes)
        if bundled:
            weights = pretrain(spec.name, tuple(schema.shape), classes)
        else:
            weights = load_weights(spec.base)
        model = builder(spec.name, schema.shape, classes, weights)()
        save_weights(weights, draft.path / WEIGHTS)
        draft.summary = {"parameters": sum(p.numel() for p in model.parameters())}
    return draft.done


def base_digest(ws: Workspace) -> str:
    """SHA-256 of the checkpoint's weights: the content, however it was made."""
    return base_model(ws).manifest["files"][WEIGHTS]["sha256"]


def base_builder(ws: Workspace) -> Builder:
    """A function that gives fresh copies of the base model."""
    schema = ws.task.pool.columns
    weights = load_weights(base_model(ws).file(WEIGHTS))
    return builder(ws.task.model.name, schema.shape, len(schema.classes), weights)


def trainable_shapes(ws: Workspace) -> dict[str, list[int]]:
    """Names and shapes of the trained parameters, in the model's order."""
    model = base_builder(ws)()
    names = trainable_names(model, ws.task.finetune.trainable)
    return {name: list(model.get_parameter(name).shape) for name in names}


def gradient_space(ws: Workspace) -> dict[str, Any]:
    """What a gradient is taken of and by: two gradients may be compared only if this is equal."""
    return {
        "base": base_digest(ws),
        "loss": "cross_entropy",
        "trainable": trainable_shapes(ws),
    }
