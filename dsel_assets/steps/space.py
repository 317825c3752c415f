"""What sketches are of: parameters, gradient and operator; known without loading torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsel_assets.models.trainable import trained
from dsel_assets.resources.store import StoreError
from dsel_assets.sketching.versions import version_of
from dsel_assets.steps.model import base_digest, base_model
from dsel_assets.steps.workspace import Workspace


def trainable_shapes(ws: Workspace) -> dict[str, list[int]]:
    """Names and shapes of the trained parameters, in the model's order."""
    known = base_model(ws).summary
    shapes = dict(known["shapes"])
    names = trained(list(shapes), known["adapters"], ws.task.finetune.trainable)
    return {name: shapes[name] for name in names}


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


def operator_fields(ws: Workspace, kind: str) -> dict[str, Any]:
    """What a sketch of this kind is made of, but for its dimension."""
    return {"kind": kind, "seed": ws.task.sketch.seed, "version": version_of(kind)}


class NoDimensionError(StoreError):
    """The dimension is left to the spectrum, which nobody has taken yet."""


def sketch_dimension(ws: Workspace) -> int:
    """D of the task; for `auto` what was pinned when the first arrival was sketched."""
    if ws.task.sketch.dim != "auto":
        return int(ws.task.sketch.dim)
    if not (pin := dimension_pin(ws)).exists():
        raise NoDimensionError(
            f"{ws.task.name}: sketch.dim is auto and nothing is sketched yet; run the ingest job"
        )
    return int(json.loads(pin.read_text())["dimension"])


def dimension_pin(ws: Workspace) -> Path:
    """Where the dimension stands that the spectrum advised."""
    return ws.store.folder(ws.task.name, "sketches") / "dimension.json"


def sketch_space(ws: Workspace) -> dict[str, Any]:
    """The gradient space and its operator: sketches may be compared only if this is equal."""
    operator = operator_fields(ws, ws.task.sketch.kind) | {"dim": sketch_dimension(ws)}
    return gradient_space(ws) | {"sketch": operator, "dtype": "float32"}
