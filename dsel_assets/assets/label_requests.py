"""What is to be labelled next, and what waits for its label."""

import dagster as dg

from dsel_assets.assets.declare import Home, all_of, key, picture, result, table
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import Task

SHOWN = 20  # waiting rows in the metadata


def label_requests(task: Task) -> dg.AssetsDefinition:
    """Declare the task's `label_requests` asset."""
    rule = task.active
    assert rule is not None

    @dg.asset(
        key=key(task, "label_requests"),
        deps=[all_of(task, "pool"), key(task, "target"), key(task, "base_model")],
        group_name="selection",
        kinds={"pytorch", "parquet"},
        code_version="1",
        description=f"The {rule.batch} rows of {rule.candidates} that say most about the target "
        f"({rule.rule}), asked for in rounds. Fill in the labels of `requests` and put the rows "
        f"into {task.pool.landing}; a row waits here until it stands in the pool.",
    )
    def label_requests(context: dg.AssetExecutionContext, home: Home) -> dg.MaterializeResult:
        from dsel_assets.evaluation.plots import labelling
        from dsel_assets.steps.labelling import next_round, requests_file, standing

        ws = Workspace(task, home)
        before = len(standing(ws).rounds)
        newest = next_round(ws)
        now = standing(ws)
        rounds = [dict(entry.summary) for entry in now.rounds]
        for row in rounds:
            row.pop("candidates_refused")
        if len(now.rounds) == before:
            context.log.info(f"{len(now.waiting)} rows wait for their label; nothing new is asked")
        return result(
            task,
            "label_requests",
            newest,
            {
                "round": len(now.rounds),
                "waiting": len(now.waiting),
                "labelled": len(now.labelled),
                "requests": dg.MetadataValue.path(str(requests_file(newest))),
                "progress": picture(labelling(rounds)),
                "rounds": table(rounds),
                "refused": str(newest.summary["candidates_refused"] or "none"),
                "waiting_rows": table([{"example_id": name} for name in now.waiting[:SHOWN]]),
            },
        )

    return label_requests
