"""The sets that evaluation and target-aware strategies read."""

import dagster as dg

from dsel_assets.assets.declare import Home, key, result
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import Task


def target(task: Task) -> dg.AssetsDefinition:
    """Declare the task's `target` asset."""

    @dg.asset(
        key=key(task, "target"),
        group_name="arrivals",
        kinds={"parquet"},
        code_version="1",
        description="Target, validation and test: small, clean, of the task that matters. "
        "Strategies read the target, promotion the validation set; test is only reported.",
        check_specs=[
            dg.AssetCheckSpec(
                "apart",
                asset=key(task, "target"),
                blocking=True,
                description="No input stands in two of the sets.",
            ),
            dg.AssetCheckSpec(
                "no_near_copies",
                asset=key(task, "target"),
                description="No input of one set nearly repeats one of another.",
            ),
        ],
    )
    def target(home: Home) -> dg.MaterializeResult:
        from dsel_assets.steps.pool import evaluation_set, shared_inputs

        ws = Workspace(task, home)
        sets = {split: evaluation_set(ws, split) for split in ws.splits}
        shared = shared_inputs(ws)
        check = dg.AssetCheckResult(
            check_name="apart", passed=not any(shared.values()), metadata=shared
        )
        near = shared_inputs(ws, task.pool.leak_similarity)
        near_check = dg.AssetCheckResult(
            check_name="no_near_copies",
            passed=not any(near.values()),
            severity=dg.AssetCheckSeverity.WARN,
            metadata=near,
        )
        rows = {f"rows of {split}": entry.manifest["rows"] for split, entry in sets.items()}
        return result(task, "target", sets.values(), rows, [check, near_check])

    return target
