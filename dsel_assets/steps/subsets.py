"""Which examples each strategy chooses, and why."""

from __future__ import annotations

import shutil
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock
from numpy.typing import NDArray

from dsel_assets.data import Examples
from dsel_assets.models import save_weights
from dsel_assets.resources.store import Entry, identity
from dsel_assets.selection import STRATEGIES, Needs, Selection, Selector, make_selector
from dsel_assets.selection.guards import ALARMS
from dsel_assets.steps.cells import Cell, cells, selection_before
from dsel_assets.steps.generation import Generation, load_pool, load_target
from dsel_assets.steps.model import WEIGHTS, base_builder, trainable_shapes
from dsel_assets.steps.parallel import each
from dsel_assets.steps.spending import budget_of, constraints_of, cost_of, prices
from dsel_assets.steps.warm import STATE, save_state, state_of
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
    if missing:
        warn_about_budgets(ws.task, len(load_pool(ws, generation)[0]))
        load_target(ws)  # made here once, not by every worker at the same time
    by_seed: dict[int, list[Cell]] = {}
    for cell in every:
        if cell.identities["subsets"] in missing:
            missing.discard(cell.identities["subsets"])
            by_seed.setdefault(cell.seed, []).append(cell)
    each(
        partial(_select, ws, generation, strategy),
        list(by_seed.values()),
        f"select {strategy}",
        threads=Needs.MODEL not in STRATEGIES[strategy].needs,
    )
    return [ws.store.get(ws.task.name, "subsets", cell.selection) for cell in every]


def _select(ws: Workspace, generation: Generation, strategy: str, group: list[Cell]) -> None:
    """The cells of one seed, by one selector: what it learns for one budget serves the others."""
    pool, target = load_pool(ws, generation)[0], load_target(ws)
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
        for cell in group:
            if ws.store.find(ws.task.name, "subsets", cell.selection) is None:
                _write(ws, generation, cell, selector, pool, target)
        shutil.rmtree(scratch / name, ignore_errors=True)


def _write(
    ws: Workspace,
    generation: Generation,
    cell: Cell,
    selector: Selector,
    pool: Examples,
    target: Examples | None,
) -> None:
    name, warm = cell.strategy, state_of(ws, cell.selection["warm"])
    budget = budget_of(ws, cell.budget, pool)
    n = min(cell.budget, len(pool))
    select = partial(selector.select, pool, target, budget, seed=cell.seed, warm=warm)
    with ws.store.write(ws.task.name, "subsets", cell.selection) as draft:
        chosen = select(constraints=constraints_of(ws, name, pool, n)[0])

        def objective(ids: NDArray[np.str_]) -> float | None:
            there = ids[np.isin(ids, pool.ids)]
            if len(there) == 0:
                return None
            return selector.objective(pool, target, there, chosen)

        table = _table(ws, cell.identities["subsets"], chosen)
        pq.write_table(table, draft.path / "rows.parquet")
        if selector.warms and chosen.state:
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
        if (cost := cost_of(ws, pool, chosen.ids)) is not None:
            draft.summary["cost"] = cost
        if selector.aim:
            earlier = selection_before(ws, generation, cell)
            draft.summary["objective"] = objective(chosen.ids)
            draft.summary["objective_before"] = earlier and objective(
                np.array(chosen_ids(earlier), np.str_)
            )


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


def quota_rows(entry: Entry) -> list[dict[str, Any]]:
    """What each quota asked, got and cost; nothing where there are none, or of another seed."""
    if "quotas.parquet" not in entry.manifest["files"]:
        return []
    return pq.read_table(entry.file("quotas.parquet")).to_pylist()


PER_PICK = ("gain", "variance_left", "worst_variance_left")


def per_pick(entry: Entry) -> dict[str, list[float]]:
    """What a greedy choice about targets says of each pick; nothing for other strategies."""
    file = entry.file("rows.parquet")
    if not set(PER_PICK) <= set(pq.read_schema(file).names):
        return {}
    table = pq.read_table(file, columns=list(PER_PICK))
    return {name: table[name].to_pylist() for name in PER_PICK}


def alarms(ws: Workspace, generation: Generation) -> list[dict[str, Any]]:
    """Of each strategy that watches itself and each budget, in how many seeds an alarm was on."""
    found: dict[tuple[str, int], list[Entry]] = {}
    for cell in cells(ws, generation):
        entry = ws.store.get(ws.task.name, "subsets", cell.selection)
        if ALARMS.keys() <= entry.summary.keys():
            found.setdefault((cell.strategy, cell.budget), []).append(entry)
    return [
        {"strategy": strategy, "budget": budget, "seeds": len(entries)}
        | {name: sum(entry.summary[name] for entry in entries) for name in ALARMS}
        | {
            name: float(np.mean([entry.summary[name] for entry in entries]))
            for name in ("mean_weight", "weight_loss_correlation", "outside_share_top")
        }
        for (strategy, budget), entries in found.items()
    ]


COLLAPSED = 0.7  # share of one class or source in a choice that is worth a warning


def collapsed(ws: Workspace, generation: Generation) -> list[dict[str, Any]]:
    """Choices of which one class or source takes most, but less than half as much of the pool."""
    pool, classes = load_pool(ws, generation)[0], np.array(ws.task.pool.columns.classes)
    values = {"class": classes[pool.labels], "source": pool.groups}
    rows, seen = [], set[str]()
    for cell in cells(ws, generation):
        entry = ws.store.get(ws.task.name, "subsets", cell.selection)
        if STRATEGIES[cell.strategy].whole or entry.identity in seen:
            continue
        seen.add(entry.identity)
        chosen = np.isin(pool.ids, chosen_ids(entry))
        for name, column in values.items():
            value, share = _most(column[chosen])
            there = float(np.mean(column == value))
            if share > COLLAPSED and there < share / 2:
                place = {"strategy": cell.strategy, "budget": cell.budget, "seed": cell.seed}
                rows.append(place | {"of": name, "value": value, "share": share, "pool": there})
    return rows


def _most(values: NDArray[np.str_]) -> tuple[str, float]:
    """The most frequent value and its share."""
    if len(values) == 0:
        return "", 0.0
    found, counts = np.unique(values, return_counts=True)
    return str(found[counts.argmax()]), float(counts.max() / len(values))


CHANCE = 3.0  # standard deviations by which chance alone hardly departs


def beyond_chance(ws: Workspace, generation: Generation) -> list[dict[str, Any]]:
    """Of each strategy and budget, whether anything but chance seems to have chosen.

    What two seeds both choose is compared with what two uniform draws would (hypergeometric), and
    where a strategy reports how many uniform draws do as well as its subsets, that counts too.
    `chosen` is False where neither tells it from a uniform draw. Strategies without a seed, and
    budgets of which a strategy takes the whole pool, are left out.
    """
    groups: dict[tuple[str, int], list[Entry]] = {}
    for cell in cells(ws, generation):
        selector = STRATEGIES[cell.strategy]
        if cell.strategy != "random" and not (selector.whole or selector.deterministic):
            entry = ws.store.get(ws.task.name, "subsets", cell.selection)
            groups.setdefault((cell.strategy, cell.budget), []).append(entry)
    rows, found = len(load_pool(ws, generation)[0]), []
    for (strategy, budget), entries in groups.items():
        sets = [set(chosen_ids(entry)) for entry in entries]
        n = float(np.mean([len(ids) for ids in sets]))  # under a cost budget they differ a little
        if n in (0, rows):
            continue
        pairs = list(combinations(sets, 2))
        shared = float(np.mean([len(a & b) for a, b in pairs]))
        chance = n * n / rows
        sd = np.sqrt(chance * (1 - n / rows) ** 2 * rows / (rows - 1) / len(pairs))
        as_good = [e.summary["uniform_as_good"] for e in entries if "uniform_as_good" in e.summary]
        better = bool(as_good) and float(np.mean(as_good)) < 0.5
        found.append(
            {
                "strategy": strategy,
                "budget": budget,
                "shared_by_two_seeds": shared,
                "by_chance": chance,
                "uniform_as_good": float(np.mean(as_good)) if as_good else None,
                "chosen": bool(abs(shared - chance) > CHANCE * sd or better),
            }
        )
    return found
