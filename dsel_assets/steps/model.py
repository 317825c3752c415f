"""The base checkpoint, and what of it is trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor

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
    if spec.lora is not None:
        fields["lora"] = spec.lora.model_dump()
    if entry := ws.store.find(ws.task.name, "base_model", fields):
        return entry
    with ws.store.write(ws.task.name, "base_model", fields) as draft:
        classes = len(schema.classes)
        if bundled:
            weights = pretrain(spec.name, tuple(schema.shape), classes)
        else:
            weights = load_weights(spec.base)
        model = _builder(ws, weights)()
        save_weights(weights, draft.path / WEIGHTS)
        draft.summary = {"parameters": sum(p.numel() for p in model.parameters())}
    return draft.done


def base_digest(ws: Workspace) -> str:
    """What training starts from: SHA-256 of the weights, however made, and the adapters if any."""
    digest, lora = base_model(ws).manifest["files"][WEIGHTS]["sha256"], ws.task.model.lora
    return digest if lora is None else f"{digest} with LoRA {lora.model_dump_json()}"


def base_builder(ws: Workspace) -> Builder:
    """A function that gives fresh copies of the base model."""
    return _builder(ws, load_weights(base_model(ws).file(WEIGHTS)))


def _builder(ws: Workspace, weights: dict[str, Tensor]) -> Builder:
    spec, schema = ws.task.model, ws.task.pool.columns
    lora = spec.lora.model_dump() if spec.lora else None
    return builder(spec.name, schema.shape, len(schema.classes), weights, lora)


def trainable_shapes(ws: Workspace) -> dict[str, list[int]]:
    """Names and shapes of the trained parameters, in the model's order."""
    model = base_builder(ws)()
    names = trainable_names(model, ws.task.finetune.trainable)
    return {name: list(model.get_parameter(name).shape) for name in names}


def gradient_space(ws: Workspace) -> dict[str, Any]:
    """What a gradient is taken of and by: two gradients may be compared only if this is equal."""
    spec = ws.task.gradients
    loss = spec.of == "loss"
    return {
        "base": base_digest(ws),
        "of": spec.of,
        "loss": "cross_entropy" if loss else None,
        "labels": spec.labels if loss else None,
        "outputs": None if loss else spec.outputs or "every",
        "trainable": trainable_shapes(ws),
    }


def gradient_rows(ws: Workspace) -> int | None:
    """k, if examples have k rows of gradients each, one an output; None for the loss's one."""
    spec = ws.task.gradients
    return None if spec.of == "loss" else spec.outputs or len(ws.task.pool.columns.classes)
