"""The checkpoint that every strategy starts from."""

import dagster as dg

from dsel_assets.assets.declare import Home, key, result
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import Task


def base_model(task: Task) -> dg.AssetsDefinition:
    """Declare the task's `base_model` asset."""

    @dg.asset(
        key=key(task, "base_model"),
        group_name="arrivals",
        kinds={"pytorch"},
        code_version="1",
        description=f"`{task.model.name}` from `{task.model.base}`: where gradients are taken and "
        "finetuning starts.",
    )
    def base_model(home: Home) -> dg.MaterializeResult:
        from math import prod

        from dsel_assets.steps.model import base_model
        from dsel_assets.steps.space import trainable_shapes

        ws = Workspace(task, home)
        entry = base_model(ws)
        trainable = sum(prod(shape) for shape in trainable_shapes(ws).values())
        return result(task, "base_model", entry, {**entry.summary, "trainable": trainable})

    return base_model
