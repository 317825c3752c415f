"""The cells of a comparison: every strategy at every budget with every seed, each with identities.

An identity is computed from what a cell is made of, so one can ask what is there, and what is
missing, without making anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from dsel_assets.resources.store import Entry, StoreError, identity
from dsel_assets.selection import STRATEGIES, Needs
from dsel_assets.steps.generation import Generation, generation_at
from dsel_assets.steps.model import base_digest
from dsel_assets.steps.pool import evaluation_set
from dsel_assets.steps.space import sketch_space
from dsel_assets.steps.spending import spending_fields
from dsel_assets.steps.warm import COLD, origins
from dsel_assets.steps.workspace import Workspace

SPLITS = ("validation", "test")  # that every checkpoint is judged on
BACK = 5  # generations that are looked through for an earlier selection


@dataclass(frozen=True)
class Cell:
    """One strategy at one budget with one seed, and the fields that its artifacts are known by."""

    strategy: str
    budget: int
    seed: int
    selection: dict[str, Any]
    checkpoint: dict[str, Any]
    metric: dict[str, Any]

    @cached_property
    def identities(self) -> dict[str, str]:
        """Identities of the cell's three artifacts, by kind."""
        return {
            "subsets": identity(self.selection),
            "checkpoints": identity(self.checkpoint),
            "metrics": identity(self.metric),
        }


def cells(
    ws: Workspace, generation: Generation, strategy: str | None = None, decide: bool = False
) -> Iterator[Cell]:
    """The cells of one strategy, or of all, in a fixed order.

    Where a strategy does not look at the budget or the seed, its cells share a selection. decide:
    settles for good which selection each goes on from; only who selects does.
    """
    task = ws.task
    evaluation = {split: evaluation_set(ws, split).identity for split in ws.splits}
    target = evaluation.pop("target", None)
    space, base = sketch_space(ws), base_digest(ws)
    for name in [strategy] if strategy else task.strategies.chosen():
        selector = STRATEGIES[name]
        selections = {
            (budget, seed): {
                "generation": generation.identity,
                "strategy": name,
                "version": selector.version,
                "settings": task.settings(name),
                "budget": None if selector.whole else budget,
                "seed": None if selector.deterministic else seed,
                "constraints": spending_fields(ws, name),
                "warm": COLD,
                "target": target if Needs.TARGET in selector.needs else None,
                "space": space if selector.needs & (Needs.SKETCHES | Needs.MODEL) else None,
            }
            for budget in task.budgets
            for seed in range(task.seeds)
        }
        if selector.warms and task.reselect == "warm":
            found = origins(ws, generation, selections, decide, selector.follows)
            for place, warm in found.items():
                selections[place]["warm"] = warm
        for (budget, seed), selection in selections.items():
            checkpoint = {
                "selection": identity(selection),
                "base": base,
                "finetune": task.finetune.model_dump(),
                "target": target if task.finetune.include_target else None,
                "seed": seed,
                "version": 1,
            }
            metric = {"checkpoint": identity(checkpoint), "on": evaluation, "version": 1}
            yield Cell(name, budget, seed, selection, checkpoint, metric)


def cell_at(ws: Workspace, generation: Generation, strategy: str, budget: int, seed: int) -> Cell:
    """One cell; StoreError, saying what there is, for one that the task does not have."""
    if strategy not in ws.task.strategies.chosen():
        raise StoreError(
            f"{ws.task.name} has no strategy {strategy!r}; it has "
            + ", ".join(ws.task.strategies.chosen())
        )
    for cell in cells(ws, generation, strategy):
        if (cell.budget, cell.seed) == (budget, seed):
            return cell
    raise StoreError(
        f"{ws.task.name} has no budget {budget} with seed {seed}; budgets are {ws.task.budgets}, "
        f"seeds 0 to {ws.task.seeds - 1}"
    )


def selection_before(ws: Workspace, generation: Generation, cell: Cell) -> Entry | None:
    """The cell's selection in the last generation before that has it, under today's settings."""
    for number in range(generation.number - 1, max(0, generation.number - 1 - BACK), -1):
        other = cell_at(ws, generation_at(ws, number), cell.strategy, cell.budget, cell.seed)
        if entry := ws.store.find(ws.task.name, "subsets", other.selection):
            return entry
    return None


def artifacts(ws: Workspace, cell: Cell) -> tuple[Entry, Entry, Entry]:
    """A cell's selection, checkpoint and metric; StoreError for one that is not there."""
    get, task = ws.store.get, ws.task.name
    return (
        get(task, "subsets", cell.selection),
        get(task, "checkpoints", cell.checkpoint),
        get(task, "metrics", cell.metric),
    )


def missing_strategies(ws: Workspace, generation: Generation) -> dict[str, str]:
    """Strategies that lack a metric, each with the identity of all that it should have."""
    wanted: dict[str, list[dict[str, Any]]] = {}
    for cell in cells(ws, generation):
        wanted.setdefault(cell.strategy, []).append(cell.metric)
    return {
        strategy: identity({"metrics": metrics})
        for strategy, metrics in wanted.items()
        if ws.store.missing(ws.task.name, "metrics", metrics)
    }
