"""A finetuned checkpoint for each strategy, budget and seed."""

import dagster as dg

from dsel_assets.assets.declare import Home, key, result, strategy_partitions
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import Task


def checkpoints(task: Task) -> dg.AssetsDefinition:
    """Declare the task's `checkpoints` asset, partitioned by strategy."""
    rule = task.finetune

    @dg.asset(
        key=key(task, "checkpoints"),
        deps=[
            key(task, "subsets"),
            key(task, "base_model"),
            key(task, "target"),
            key(task, "training"),
        ],
        partitions_def=strategy_partitions(task),
        group_name="finetuning",
        kinds={"pytorch"},
        code_version="1",
        description=f"The base model after {rule.steps} steps of {rule.batch_size} on each subset"
        f"{' and the target set' if rule.include_target else ''}: same start, same steps, same "
        "schedule for every strategy.",
    )
    def checkpoints(context: dg.AssetExecutionContext, home: Home) -> dg.MaterializeResult:
        from dsel_assets.steps.checkpoints import finetune
        from dsel_assets.steps.generation import current_generation

        ws = Workspace(task, home)
        generation = current_generation(ws)
        entries = finetune(ws, generation, context.partition_key)
        last = [entry.summary["curve"][-1] for entry in entries if entry.summary["curve"]]
        how = {"final_training_loss": sum(last) / len(last)} if last else {"trained_by": "strategy"}
        return result(task, "checkpoints", entries, {"generation": generation.number, **how})

    return checkpoints
