"""Which examples each strategy chooses, and why."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from dsel_assets.data import Examples
from dsel_assets.models import save_weights
from dsel_assets.resources.store import Entry, identity
from dsel_assets.selection import STRATEGIES, Needs, Selection, Selector, State, make_selector
from dsel_assets.selection.interface import READS
from dsel_assets.steps.cells import Cell, cells, selection_before
from dsel_assets.steps.chosen import chosen_ids
from dsel_assets.steps.generation import Generation, sketched_rows
from dsel_assets.steps.loading import load_pool, load_target, named_rows, pool_rows, rows_there
from dsel_assets.steps.model import WEIGHTS, base_builder
from dsel_assets.steps.parallel import each
from dsel_assets.steps.space import trainable_shapes
from dsel_assets.steps.spending import budget_of, constraints_of, cost_of, prices
from dsel_assets.steps.warm import COLD, STATE, arrivals_seen, load_state, origin, save_state
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import warn_about_budgets

QUOTAS = pa.schema(
    [("column", pa.string()), ("value", pa.string()), ("asked", pa.float64())]
    + [(name, pa.int64()) for name in ("there", "chosen", "short")]
    + [(name, pa.float64()) for name in ("objective", "objective_without", "price")]
)


def select(ws: Workspace, generation: Generation, strategy: str) -> list[Entry]:
    """The selections of a strategy's cells, in the order of `cells`; only missing ones are made."""
    every = list(cells(ws, generation, strategy, decide=True))
    missing = ws.store.missing(ws.task.name, "subsets", [cell.selection for cell in every])
    needs = STRATEGIES[strategy].needs
    threads = Needs.MODEL not in needs
    if missing:
        warn_about_budgets(ws.task, len(pool_rows(ws, generation).examples))
        load_target(ws)  # made here once, not by every worker at the same time
        if threads and COLD in {cell.selection["warm"] for cell in every}:
            load_pool(ws, generation, arrays=_reads(needs))  # likewise, and kept for them
    by_seed: dict[int, list[Cell]] = {}
    for cell in every:
        if cell.identities["subsets"] in missing:
            missing.discard(cell.identities["subsets"])
            by_seed.setdefault(cell.seed, []).append(cell)
    each(
        partial(_select, ws, generation, strategy),
        list(by_seed.values()),
        f"select {strategy}",
        threads=threads,
    )
    return [ws.store.get(ws.task.name, "subsets", cell.selection) for cell in every]


def _select(ws: Workspace, generation: Generation, strategy: str, group: list[Cell]) -> None:
    """The cells of one seed, by one selector: what it learns for the largest budget serves all."""
    trainable = list(trainable_shapes(ws))
    selector = make_selector(
        strategy, ws.task.settings(strategy), model=base_builder(ws), trainable=trainable
    )
    scratch = ws.store.folder(ws.task.name, "scratch")
    scratch.mkdir(parents=True, exist_ok=True)
    name = f"{strategy}-{group[0].seed}"
    # of two processes with the same work the second waits, and then finds it done
    with FileLock(scratch / f"{name}.lock"):
        fields = group[0].selection
        work = {key: fields[key] for key in fields.keys() - {"budget", "warm"}}
        selector.scratch = scratch / name / identity(work)
        for cell in sorted(group, key=lambda cell: -cell.budget):
            if ws.store.find(ws.task.name, "subsets", cell.selection) is None:
                _write(ws, generation, cell, selector)
        shutil.rmtree(scratch / name, ignore_errors=True)


def _write(ws: Workspace, generation: Generation, cell: Cell, selector: Selector) -> None:
    name, before = cell.strategy, origin(ws, cell.selection["warm"])
    warm = load_state(before) if before else None
    pool, target = _read(ws, generation, selector, before, warm), load_target(ws)
    budget = budget_of(ws, cell.budget, pool)
    n = min(cell.budget, len(pool))
    select = partial(selector.select, pool, target, budget, seed=cell.seed, warm=warm)
    with ws.store.write(ws.task.name, "subsets", cell.selection) as draft:
        chosen = select(constraints=constraints_of(ws, name, pool, n)[0])

        def objective(ids: Sequence[str]) -> float | None:
            there = np.sort(rows_there(ws, generation, ids))
            if len(there) == 0:
                return None
            examples = load_pool(ws, generation, there, _reads(selector.traits.needs))
            return selector.objective(examples, target, chosen)

        table = _table(ws, cell.identities["subsets"], chosen)
        pq.write_table(table, draft.path / "rows.parquet")
        if selector.traits.warms and selector.can_go_on(chosen.state):
            save_state(chosen.state, draft.path / STATE)
        if chosen.model is not None:
            save_weights(chosen.model, draft.path / WEIGHTS)
        if cell.seed == 0:
            without = prices(
                ws, name, pool, n, lambda c: select(constraints=c).ids, objective, chosen.ids
            )
            if without:
                table = pa.Table.from_pylist(without, QUOTAS)
                pq.write_table(table, draft.path / "quotas.parquet")
        draft.rows = len(chosen.ids)
        draft.summary = {key: _plain(value) for key, value in chosen.diagnostics.items()}
        draft.summary["rows_read"] = len(pool)
        if (cost := cost_of(ws, pool, chosen.ids)) is not None:
            draft.summary["cost"] = cost
        if selector.traits.follows:
            of_all = before.summary["looked_at"] if before else sketched_rows(ws, generation)
            draft.summary["looked_at"] = of_all
        if selector.traits.aim:
            earlier = selection_before(ws, generation, cell)
            own = chosen.diagnostics.get(selector.traits.aim)
            draft.summary["objective"] = objective(chosen.ids.tolist()) if own is None else own
            draft.summary["objective_before"] = earlier and objective(chosen_ids(earlier))


def _read(
    ws: Workspace,
    generation: Generation,
    selector: Selector,
    before: Entry | None,
    warm: State | None,
) -> Examples:
    """The pool as the strategy reads it, or what it goes on from and what has come since."""
    if before is None or warm is None or not selector.traits.follows:
        return load_pool(ws, generation, arrays=_reads(selector.traits.needs))
    kept = named_rows(ws, generation, warm["ids"].tolist())
    seen = arrivals_seen(ws, generation, before)
    assert seen is not None  # else the cell would begin cold
    new = np.flatnonzero(pool_rows(ws, generation).member >= seen)
    return load_pool(ws, generation, np.append(kept, new), _reads(selector.traits.needs))


def _reads(needs: Needs) -> list[str]:
    return [name for name, need in READS.items() if need in needs]


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
