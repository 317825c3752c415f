"""The intrinsic dimension of the finetuning."""

import json

import dagster as dg

from dsel_assets.assets.declare import Home, key, picture, result
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import Task


def intrinsic_dimension(task: Task) -> dg.AssetsDefinition:
    """Declare the task's `intrinsic_dimension` asset."""

    @dg.asset(
        key=key(task, "intrinsic_dimension"),
        deps=[key(task, "hessian_spectrum"), key(task, "target")],
        group_name="gradients",
        kinds={"pytorch"},
        code_version="1",
        description="The smallest random subspace in which finetuning reaches a share of what it "
        "reaches in all dimensions: found in one run, verified by one at half of it. Not part of "
        "a job; materialise it when you want to know.",
    )
    def intrinsic_dimension(home: Home) -> dg.MaterializeResult:
        from dsel_assets.evaluation.plots import rounds
        from dsel_assets.steps.intrinsic import HISTORY, intrinsic_dimension

        entry = intrinsic_dimension(Workspace(task, home))
        found = json.loads(entry.file(HISTORY).read_text())
        plot = rounds(found["history"], found["verification"], entry.summary["target"])
        return result(
            task, "intrinsic_dimension", entry, {"search": picture(plot), **entry.summary}
        )

    return intrinsic_dimension
