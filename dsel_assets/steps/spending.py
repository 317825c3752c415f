"""The task's budgets and quotas as selectors understand them, and what each quota costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsel_assets.data import Examples
from dsel_assets.selection import STRATEGIES, Budget, Constraints, Strategy
from dsel_assets.selection.strata import fill_quotas
from dsel_assets.steps.workspace import Workspace

Price = dict[str, Any]


def spending_fields(ws: Workspace, strategy: str) -> dict[str, Any]:
    """What a selection's identity says of quotas and of what the budget counts."""
    task = ws.task
    if STRATEGIES[strategy].whole:
        return {}
    cost = {"cost": task.pool.columns.cost} if task.budget_in == "cost" else {}
    return cost | ({"quotas": task.quotas} if task.quotas else {})


def budget_of(ws: Workspace, limit: int, pool: Examples) -> Budget:
    """A budget of the task; no more examples than there are."""
    if ws.task.budget_in == "cost":
        return Budget(limit, ws.task.pool.columns.cost)
    return Budget(min(limit, len(pool)))


def cost_of(ws: Workspace, pool: Examples, ids: NDArray[np.str_]) -> float | None:
    """What these examples cost together, or None where the pool has no costs."""
    column = ws.task.pool.columns.cost
    return None if column is None else float(pool.columns[column][np.isin(pool.ids, ids)].sum())


def constraints_of(
    ws: Workspace, strategy: str, pool: Examples, n: int, but: str | None = None
) -> tuple[Constraints, dict[str, int]]:
    """The quotas for n examples, and by how many each value falls short of what was asked.

    but: a value whose quota is left out.
    """
    if STRATEGIES[strategy].whole or not ws.task.quotas:
        return Constraints(), {}
    [(column, asked)] = ws.task.quotas.items()
    name, values, names = _column(ws, column, pool)
    wanted = {value: quota for value, quota in asked.items() if value != but}
    if not wanted:
        return Constraints(), {}
    counts, short = fill_quotas(wanted, values, n)
    return Constraints(quotas={name: {names(v): k for v, k in counts.items()}}), short


def _column(
    ws: Workspace, column: str, pool: Examples
) -> tuple[str, NDArray[np.str_], Callable[[str], str]]:
    """A column of the data: its name in the pool, its values as text, and how those are named."""
    schema = ws.task.pool.columns
    if column == schema.label:
        classes = np.array(schema.classes)
        return "label", classes[pool.labels], lambda value: str(schema.classes.index(value))
    if column == schema.group:
        return "group", pool.groups, str
    return column, pool.columns[column], str


def prices(
    ws: Workspace,
    strategy: str,
    pool: Examples,
    n: int,
    select: Callable[[Constraints], NDArray[np.str_]],
    objective: Callable[[Sequence[str]], float | None],
    chosen: NDArray[np.str_],
) -> list[Price]:
    """A row a quota: what it asked, what was there and chosen, and what it cost.

    price: by how much of itself the objective would be better without this quota, with all others
    as they are; None where the strategy has no objective that can tell. Below 0, the quota helped:
    a greedy or random choice was led to a better one.
    """
    if STRATEGIES[strategy].whole or not ws.task.quotas:
        return []
    [(column, asked)] = ws.task.quotas.items()
    values, own = _column(ws, column, pool)[1], objective(chosen.tolist())
    taken, short = np.isin(pool.ids, chosen), constraints_of(ws, strategy, pool, n)[1]
    rows = []
    for value, quota in asked.items():
        without = None
        if own is not None:
            without = objective(
                select(constraints_of(ws, strategy, pool, n, but=value)[0]).tolist()
            )
        rows.append(
            {
                "column": column,
                "value": value,
                "asked": float(quota),
                "there": int(np.count_nonzero(values == value)),
                "chosen": int(np.count_nonzero(values[taken] == value)),
                "short": short.get(value, 0),
                "objective": own,
                "objective_without": without,
                "price": _worse(STRATEGIES[strategy], own, without),
            }
        )
    return rows


def _worse(strategy: Strategy, own: float | None, without: float | None) -> float | None:
    if own is None or without is None or own == 0:
        return None
    gain = (without - own) / abs(own)
    return -gain if strategy.lower else gain
