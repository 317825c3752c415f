"""What each strategy chooses."""

from collections import Counter
from statistics import fmean
from typing import Any

import dagster as dg

from dsel_assets.assets.declare import (
    Home,
    all_of,
    key,
    picture,
    result,
    strategy_partitions,
    table,
)
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import Task

CARDS = 8  # picks that are shown one by one


def subsets(task: Task) -> dg.AssetsDefinition:
    """Declare the task's `subsets` asset, partitioned by strategy."""

    @dg.asset(
        key=key(task, "subsets"),
        deps=[
            all_of(task, "sketches"),
            key(task, "target"),
            key(task, "base_model"),
            key(task, "settings"),
        ],
        partitions_def=strategy_partitions(task),
        group_name="selection",
        kinds={"pytorch", "parquet"},
        code_version="1",
        description=f"The examples that a strategy chooses at budgets {task.budgets} with "
        f"{task.seeds} seeds, in order, with the scores that say why.",
    )
    def subsets(context: dg.AssetExecutionContext, home: Home) -> dg.MaterializeResult:
        from dsel_assets.evaluation.plots import churn, composition, picks
        from dsel_assets.selection import STRATEGIES
        from dsel_assets.steps.cells import cells
        from dsel_assets.steps.chosen import chosen_ids, per_pick, quota_rows
        from dsel_assets.steps.churn import over_generations
        from dsel_assets.steps.explain import cards, gallery_of
        from dsel_assets.steps.generation import current_generation
        from dsel_assets.steps.loading import pool_rows
        from dsel_assets.steps.subsets import select

        ws, strategy = Workspace(task, home), context.partition_key
        generation = current_generation(ws)
        entries = select(ws, generation, strategy)
        there = pool_rows(ws, generation)
        pool = there.examples
        classes = dict(
            zip(pool.ids, (task.pool.columns.classes[i] for i in pool.labels), strict=True)
        )
        sources = dict(zip(pool.ids, pool.groups, strict=True))
        by_class: dict[str, Counter[str]] = {}
        by_source: dict[str, Counter[str]] = {}
        numbers: dict[int, list[dict[str, Any]]] = {}
        placed = list(zip(cells(ws, generation, strategy), entries, strict=True))
        for cell, entry in placed:
            ids = chosen_ids(entry)
            by_class.setdefault(str(cell.budget), Counter()).update(classes[i] for i in ids)
            by_source.setdefault(str(cell.budget), Counter()).update(sources[i] for i in ids)
            numbers.setdefault(cell.budget, []).append(dict(entry.summary))
        largest = per_pick(entries[-1])
        first = next(entry for cell, entry in placed if cell.budget == task.budgets[-1])
        shown = cards(ws, generation, first, CARDS)
        portraits = gallery_of(ws, generation, shown)
        quotas = quota_rows(first)
        changed = over_generations(ws, generation, strategy, task.promote.budget)
        return result(
            task,
            "subsets",
            entries,
            {
                "generation": generation.number,
                "pool": len(pool),
                "duplicates_across_arrivals": len(there.duplicates),
                "conflicts_across_arrivals": len(there.conflicts),
                "classes_chosen": picture(
                    composition(by_class, Counter(classes.values()), "class")
                ),
                "sources_chosen": picture(
                    composition(by_source, Counter(sources.values()), "source")
                ),
                "diagnostics": table([_mean(budget, rows) for budget, rows in numbers.items()]),
                "why": table(shown),
                **({"why_in_pictures": picture(portraits)} if portraits else {}),
                **({"picks": picture(picks(*largest.values()))} if any(largest.values()) else {}),
                **({"quotas": table(quotas)} if quotas else {}),
                **({"churn": picture(churn(changed, STRATEGIES[strategy].aim))} if changed else {}),
            },
        )

    return subsets


def _mean(budget: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean over the seeds of every number that the strategy reports, where all report one."""
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in rows[0]}
    return {"budget": budget} | {
        name: None if None in values else fmean(values) for name, values in columns.items()
    }
