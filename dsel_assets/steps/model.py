"""The base checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dsel_assets.resources.store import Entry
from dsel_assets.steps.pool import digest_of
from dsel_assets.steps.workspace import BUNDLED, Workspace

if TYPE_CHECKING:
    from torch import Tensor

    from dsel_assets.models import Builder

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
        "version": 2,
    }
    if spec.lora is not None:
        fields["lora"] = spec.lora.model_dump()
    if entry := ws.store.find(ws.task.name, "base_model", fields):
        return entry
    from dsel_assets.models import load_weights, lora_names, pretrain, save_weights

    with ws.store.write(ws.task.name, "base_model", fields) as draft:
        classes = len(schema.classes)
        if bundled:
            weights = pretrain(spec.name, tuple(schema.shape), classes)
        else:
            weights = load_weights(spec.base)
        model = _builder(ws, weights)()
        save_weights(weights, draft.path / WEIGHTS)
        draft.summary = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "shapes": [[name, list(p.shape)] for name, p in model.named_parameters()],
            "adapters": lora_names(model),
        }
    return draft.done


def base_digest(ws: Workspace) -> str:
    """What training starts from: SHA-256 of the weights, however made, and the adapters if any."""
    digest, lora = base_model(ws).manifest["files"][WEIGHTS]["sha256"], ws.task.model.lora
    return digest if lora is None else f"{digest} with LoRA {lora.model_dump_json()}"


def base_builder(ws: Workspace) -> Builder:
    """A function that gives fresh copies of the base model."""
    from dsel_assets.models import load_weights

    return _builder(ws, load_weights(base_model(ws).file(WEIGHTS)))


def _builder(ws: Workspace, weights: dict[str, Tensor]) -> Builder:
    from dsel_assets.models import builder

    spec, schema = ws.task.model, ws.task.pool.columns
    lora = spec.lora.model_dump() if spec.lora else None
    return builder(spec.name, schema.shape, len(schema.classes), weights, lora)
