"""Which examples each strategy chooses, and why."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dsel_assets.resources.store import Entry
from dsel_assets.selection import Budget, Selection, make_selector
from dsel_assets.steps.cells import Cell, cells
from dsel_assets.steps.generation import Generation, load_pool, load_target
from dsel_assets.steps.model import base_builder, trainable_shapes
from dsel_assets.steps.parallel import each
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import warn_about_budgets


def select(ws: Workspace, generation: Generation, strategy: str) -> list[Entry]:
    """The selections of a strategy's cells, in the order of `cells`; only missing ones are made."""
    every = list(cells(ws, generation, strategy))
    missing = ws.store.missing(ws.task.name, "subsets", [cell.selection for cell in every])
    if missing:
        warn_about_budgets(ws.task, len(load_pool(ws, generation)[0]))
        load_target(ws)  # made here once, not by every worker at the same time
    by_seed: dict[int, list[Cell]] = {}
    for cell in every:
        if cell.identities["subsets"] in missing:
            missing.discard(cell.identities["subsets"])
            by_seed.setdefault(cell.seed, []).append(cell)
    each(partial(_select, ws, generation, strategy), list(by_seed.values()), f"select {strategy}")
    return [ws.store.get(ws.task.name, "subsets", cell.selection) for cell in every]


def _select(ws: Workspace, generation: Generation, strategy: str, group: list[Cell]) -> None:
    """The cells of one seed, by one selector: what it learns for one budget serves the others."""
    pool, target = load_pool(ws, generation)[0], load_target(ws)
    trainable = list(trainable_shapes(ws))
    selector = make_selector(
        strategy, ws.task.settings(strategy), model=base_builder(ws), trainable=trainable
    )
    for cell in group:
        with ws.store.write(ws.task.name, "subsets", cell.selection) as draft:
            budget = Budget(min(cell.budget, len(pool)))
            chosen = selector.select(pool, target, budget, seed=cell.seed)
            table = _table(ws, cell.identities["subsets"], chosen)
            pq.write_table(table, draft.path / "rows.parquet")
            draft.rows = len(chosen.ids)
            draft.summary = {key: _plain(value) for key, value in chosen.diagnostics.items()}


def _table(ws: Workspace, name: str, selection: Selection) -> pa.Table:
    rows = len(selection.ids)
    return pa.table(
        {
            "task": pa.array([ws.task.name] * rows, pa.string()),
            "selection": pa.array([name] * rows, pa.string()),
            "example_id": pa.array(selection.ids.tolist(), pa.string()),
            "weight": selection.weights,
        }
        | {name: pa.array(column) for name, column in selection.scores.items()}
    )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def chosen_ids(entry: Entry) -> list[str]:
    """The ids of a selection, in the order of choice."""
    return pq.read_table(entry.file("rows.parquet"), columns=["example_id"])[
        "example_id"
    ].to_pylist()
