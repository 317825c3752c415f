"""The code location: every task under `tasks/`, as Dagster definitions. Imports nothing heavy."""

from pathlib import Path

import dagster as dg

from dsel_assets.build import build
from dsel_assets.runner import resources
from dsel_assets.task import load_tasks

ROOT = Path(__file__).parent

defs = dg.Definitions.merge(
    *(build(task, ROOT / "dbt_like_sql") for task in load_tasks(ROOT / "tasks")),
    dg.Definitions(
        resources=resources(),
        # a run is one process; inside it, the cells of a strategy use all cores
        executor=dg.in_process_executor,
    ),
)
