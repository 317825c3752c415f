"""Every strategy against random, and what becomes of the champion."""

from typing import Any

import dagster as dg

from dsel_assets.assets.declare import Home, all_of, key, picture, result, table
from dsel_assets.resources.tracking import Tracking, best_effort
from dsel_assets.resources.warehouse import Warehouse
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import Task


def verdict(task: Task) -> dg.AssetsDefinition:
    """Declare the task's `verdict` asset."""
    rule = task.promote

    @dg.asset(
        key=key(task, "verdict"),
        deps=[all_of(task, "metrics"), key(task, "rule")],
        group_name="comparison",
        kinds={"python", "mlflow"},
        code_version="1",
        pool="warehouse",
        description=f"Better, no difference shown, or worse than {rule.against}: {rule.metric} "
        "paired by seed and example, a two-way bootstrap, Holm's correction at the promoted budget "
        f"of {rule.budget}. Validation promotes a champion or keeps the one there is; test is "
        "reported. The interval speaks about new seeds and new examples; pool, target set and base "
        "model are taken as they are.",
    )
    def verdict(
        home: Home,
        warehouse: dg.ResourceParam[Warehouse],
        tracking: dg.ResourceParam[Tracking],
    ) -> dg.MaterializeResult:
        from dsel_assets.evaluation.plots import budget_curve, differences
        from dsel_assets.steps.catalog import cell_rows, tables, write_catalog
        from dsel_assets.steps.generation import current_generation
        from dsel_assets.steps.tracked import track_champion
        from dsel_assets.steps.verdict import compare, comparisons, promote

        ws = Workspace(task, home)
        generation = current_generation(ws)
        decided = compare(ws, generation)
        champion = promote(ws, generation, decided)
        write_catalog(ws, generation, decided)
        warehouse.publish_views(tables(home))

        rows = cell_rows(ws, generation)
        compared = comparisons(decided)
        test = [row for row in compared if row["split"] == "test"]
        figures = {
            "budget_curve": budget_curve(rows, "accuracy on test", "test_accuracy"),
            "differences": differences(test),
        }
        board = leaderboard(rows, test)
        metadata = {
            "generation": generation.number,
            "champion": champion["strategy"] if champion else "none",
            "leaderboard": table([row for row in board if row["budget"] == rule.budget]),
            **{name: picture(png) for name, png in figures.items()},
        }
        with best_effort(f"{task.name}, generation {generation.number}: leaderboard"):
            means = {f"accuracy/{r['strategy']}:{r['budget']}": r["accuracy"] for r in board}
            tracking.log_summary(
                task.name, generation.number, means, figures, board, decided.identity
            )
            track_champion(ws, tracking)
            metadata["mlflow"] = dg.MetadataValue.url(tracking.url(task.name))
        return result(task, "verdict", decided, metadata)

    return verdict


def leaderboard(rows: list[dict[str, Any]], test: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean test accuracy of each strategy and budget beside its difference to random."""
    compared = {(row["strategy"], row["budget"]): row for row in test}
    board = []
    for place in dict.fromkeys((row["budget"], row["strategy"]) for row in rows):
        own = [r["test_accuracy"] for r in rows if (r["budget"], r["strategy"]) == place]
        row = compared.get((place[1], place[0]), {})
        board.append(
            {
                "budget": place[0],
                "strategy": place[1],
                "accuracy": sum(own) / len(own),
                "difference": row.get("diff"),
                "low": row.get("diff_low"),
                "high": row.get("diff_high"),
                "verdict": row.get("verdict", "baseline"),
            }
        )
    return sorted(board, key=lambda row: (row["budget"], -row["accuracy"]))
