"""Why this example: where it came from, what was found of it, and which selections hold it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from dsel_assets.resources.store import Entry, StoreError
from dsel_assets.steps.arrivals import arrivals
from dsel_assets.steps.cells import cells
from dsel_assets.steps.generation import Generation, current_generation, members
from dsel_assets.steps.pool import pool_fields
from dsel_assets.steps.workspace import Workspace

ABOUT_THE_FILE = ("task", "artifact", "selection", "example_id")


def explain(ws: Workspace, example_id: str) -> dict[str, Any]:
    """What is known of one example in the current generation.

    arrivals    rows that carried it: arrival, row, label, source; of the arrivals that are not held
                back the first one's is kept
    quarantine  refusals of it: arrival, reason, detail
    gradient    loss in nats, norm, and the share of the generation whose norm is smaller
    selections  one a strategy, budget and seed that chose it: rank, weight, and every score

    StoreError if no file that landed has this id.
    """
    generation = current_generation(ws, enter=False)
    arrived = [row | {"arrival": key} for key, row in _arrived(ws, example_id)]
    refused = list(_refused(ws, generation, example_id))
    if not arrived and not refused:
        raise StoreError(f"{ws.task.name}: no row that landed has the id {example_id!r}")
    return {
        "example_id": example_id,
        "generation": generation.number,
        "arrivals": arrived,
        "quarantine": refused,
        "gradient": _gradient(ws, generation, example_id),
        "selections": list(_selections(ws, generation, example_id)),
    }


def _rows(entry: Entry, file: str, example_id: str) -> list[dict[str, Any]]:
    """Rows of a table with this id, without the columns that are the same for all."""
    found = pq.read_table(entry.file(file), filters=[("example_id", "=", example_id)])
    return found.drop_columns([n for n in ABOUT_THE_FILE if n in found.column_names]).to_pylist()


def _arrived(ws: Workspace, example_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for known in arrivals(ws):
        if pool := ws.store.find(ws.task.name, "pool", pool_fields(ws, known)):
            for row in _rows(pool, "rows.parquet", example_id):
                yield known.key, row


def _refused(ws: Workspace, generation: Generation, example_id: str) -> Iterator[dict[str, Any]]:
    pools = (ws.store.find(ws.task.name, "pool", pool_fields(ws, a)) for a in arrivals(ws))
    gradients = (gradients for _, gradients, _ in members(ws, generation))
    for entry in filter(None, (*pools, *gradients)):
        yield from _rows(entry, "quarantine.parquet", example_id)


def _gradient(ws: Workspace, generation: Generation, example_id: str) -> dict[str, Any] | None:
    own, smaller, total = None, 0, 0
    entries = [gradients for _, gradients, _ in members(ws, generation)]
    for entry in entries:
        own = own or next(iter(_rows(entry, "rows.parquet", example_id)), None)
    if own is None:
        return None
    for entry in entries:
        norms = pq.read_table(entry.file("rows.parquet"), columns=["norm"])["norm"]
        smaller += pc.sum(pc.less(norms, own["norm"])).as_py() or 0
        total += len(norms)
    return own | {"share_of_pool_with_smaller_norm": smaller / total}


def _selections(ws: Workspace, generation: Generation, example_id: str) -> Iterator[dict[str, Any]]:
    for cell in cells(ws, generation):
        entry = ws.store.find(ws.task.name, "subsets", cell.selection)
        for row in _rows(entry, "rows.parquet", example_id) if entry else []:
            yield {"strategy": cell.strategy, "budget": cell.budget, "seed": cell.seed} | row
