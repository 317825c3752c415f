"""What each checkpoint is worth on validation and on a test split that no selection has seen."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dsel_assets.evaluation import scores
from dsel_assets.finetuning import predict
from dsel_assets.models import load_weights
from dsel_assets.resources.store import Entry
from dsel_assets.steps.cells import SPLITS, Cell, cells
from dsel_assets.steps.generation import Generation
from dsel_assets.steps.model import WEIGHTS, base_builder
from dsel_assets.steps.pool import evaluation_set, load_examples
from dsel_assets.steps.workspace import Workspace


def evaluate(ws: Workspace, generation: Generation, strategy: str) -> list[Entry]:
    """The metrics of a strategy's cells, in the order of `cells`; only missing are computed."""
    every = list(cells(ws, generation, strategy))
    distinct = {cell.identities["metrics"]: cell for cell in every}
    for identity in ws.store.missing(ws.task.name, "metrics", [cell.metric for cell in every]):
        _evaluate(ws, distinct[identity])
    return [ws.store.get(ws.task.name, "metrics", cell.metric) for cell in every]


def _evaluate(ws: Workspace, cell: Cell) -> None:
    checkpoint = ws.store.get(ws.task.name, "checkpoints", cell.checkpoint)
    model = base_builder(ws)()
    model.load_state_dict(load_weights(checkpoint.file(WEIGHTS)))
    tables, summary = [], {}
    with ws.store.write(ws.task.name, "metrics", cell.metric) as draft:
        for split in SPLITS:
            examples = load_examples(evaluation_set(ws, split))
            probabilities = predict(model, torch.from_numpy(examples.inputs)).numpy()
            summary[split] = scores(probabilities, examples.labels)
            given = probabilities[range(len(examples)), examples.labels]
            tables.append(
                pa.table(
                    {
                        "split": [split] * len(examples),
                        "example_id": examples.ids,
                        "label": examples.labels,
                        "predicted": probabilities.argmax(1),
                        "probability": given,
                    }
                )
            )
        pq.write_table(pa.concat_tables(tables), draft.path / "predictions.parquet")
        draft.rows = sum(map(len, tables))
        draft.summary = summary
