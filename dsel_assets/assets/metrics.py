"""What the checkpoints are worth, and their runs in MLflow."""

import dagster as dg

from dsel_assets.assets.declare import Home, key, picture, result, strategy_partitions, table
from dsel_assets.resources.tracking import Tracking, best_effort
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import Task


def metrics(task: Task) -> dg.AssetsDefinition:
    """Declare the task's `metrics` asset, partitioned by strategy."""

    @dg.asset(
        key=key(task, "metrics"),
        deps=[key(task, "checkpoints"), key(task, "target")],
        partitions_def=strategy_partitions(task),
        group_name="finetuning",
        kinds={"pytorch", "mlflow"},
        code_version="1",
        description="Accuracy, macro-F1, loss and calibration of each checkpoint on validation and "
        "test, with every prediction kept. Each cell is a run in MLflow.",
    )
    def metrics(
        context: dg.AssetExecutionContext, home: Home, tracking: dg.ResourceParam[Tracking]
    ) -> dg.MaterializeResult:
        from dsel_assets.evaluation.plots import budget_curve
        from dsel_assets.steps.catalog import cell_rows
        from dsel_assets.steps.generation import current_generation
        from dsel_assets.steps.metrics import evaluate
        from dsel_assets.steps.tracked import tracked_cells

        ws, strategy = Workspace(task, home), context.partition_key
        generation = current_generation(ws)
        entries = evaluate(ws, generation, strategy)
        rows = cell_rows(ws, generation, strategy)
        metadata = {
            "generation": generation.number,
            "test_accuracy": sum(row["test_accuracy"] for row in rows) / len(rows),
            "validation_accuracy": sum(row["validation_accuracy"] for row in rows) / len(rows),
            "budget_curve": picture(budget_curve(rows, "accuracy on test", "test_accuracy")),
            "cells": table(
                [{k: row[k] for k in ("budget", "seed", "chosen", "test_accuracy")} for row in rows]
            ),
        }
        with best_effort(f"{task.name}, generation {generation.number}: runs of {strategy}"):
            tags = {
                "dagster.run_id": context.run.run_id,
                "dagster.asset_key": f"{task.name}/metrics",
            }
            tracked = tracked_cells(ws, generation, strategy)
            tracking.log_cells(task.name, generation.number, tracked, tags)
            metadata["mlflow"] = dg.MetadataValue.url(tracking.url(task.name))
        return result(task, "metrics", entries, metadata)

    return metrics
