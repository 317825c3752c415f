"""Finetuning on each subset, from the same start with the same steps and schedule."""

from __future__ import annotations

import shutil
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import torch

from dsel_assets.finetuning import train
from dsel_assets.models import save_weights
from dsel_assets.resources.store import Entry
from dsel_assets.steps.cells import Cell, cells
from dsel_assets.steps.generation import Generation
from dsel_assets.steps.loading import load_pool, named_rows, training_target
from dsel_assets.steps.model import WEIGHTS, base_builder
from dsel_assets.steps.parallel import each
from dsel_assets.steps.space import trainable_shapes
from dsel_assets.steps.workspace import Workspace


def finetune(ws: Workspace, generation: Generation, strategy: str) -> list[Entry]:
    """The checkpoints of a strategy's cells, in the order of `cells`; only missing are trained."""
    every = list(cells(ws, generation, strategy))
    distinct = {cell.identities["checkpoints"]: cell for cell in every}
    missing = ws.store.missing(ws.task.name, "checkpoints", [cell.checkpoint for cell in every])
    todo = [distinct[identity] for identity in distinct if identity in missing]
    each(partial(_finetune, ws, generation), todo, f"finetune {strategy}")
    return [ws.store.get(ws.task.name, "checkpoints", cell.checkpoint) for cell in every]


def _finetune(ws: Workspace, generation: Generation, cell: Cell) -> None:
    selection = ws.store.get(ws.task.name, "subsets", cell.selection)
    subset = pq.read_table(selection.file("rows.parquet"))
    if WEIGHTS in selection.manifest["files"]:  # the strategy trained the model itself
        with ws.store.write(ws.task.name, "checkpoints", cell.checkpoint) as draft:
            shutil.copyfile(selection.file(WEIGHTS), draft.path / WEIGHTS)
            draft.rows = len(subset)
            draft.summary = {"curve": []}
        return
    rows = named_rows(ws, generation, subset["example_id"].to_pylist())
    chosen = load_pool(ws, generation, rows, ["inputs"])
    parts, weights = [chosen], [subset["weight"].to_numpy()]
    if ws.task.finetune.include_target:
        target = training_target(ws)
        parts.append(target)
        weights.append(np.ones(len(target)))
    spec = ws.task.finetune
    with ws.store.write(ws.task.name, "checkpoints", cell.checkpoint) as draft:
        trained = train(
            base_builder(ws)(),
            torch.cat([torch.from_numpy(part.inputs) for part in parts]),
            torch.cat([torch.from_numpy(part.labels) for part in parts]),
            torch.from_numpy(np.concatenate(weights)).float(),
            trainable=list(trainable_shapes(ws)),
            steps=spec.steps,
            batch_size=spec.batch_size,
            lr=spec.lr,
            seed=cell.seed,
        )
        save_weights(trained.weights, draft.path / WEIGHTS)
        draft.rows = sum(map(len, parts))
        draft.summary = {"curve": trained.curve}
