"""What Dagster costs: the demo's work through its jobs, and the same work from a plain script.

    python benchmarks/overhead.py [--quick] [--rounds 3]

Both make everything from nothing in a home of their own, in fresh processes, one after the other.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent


def plain(task_file: Path, quick: bool) -> None:
    """Everything that the jobs do, by the same functions, without Dagster."""
    from dsel_assets import pipeline
    from dsel_assets.assets.verdict import leaderboard
    from dsel_assets.evaluation.plots import budget_curve, differences
    from dsel_assets.resources.tracking import Tracking
    from dsel_assets.resources.warehouse import Warehouse
    from dsel_assets.sql import load_checks, load_models
    from dsel_assets.steps.catalog import cell_rows, tables
    from dsel_assets.steps.generation import current_generation
    from dsel_assets.steps.tracked import tracked_cells
    from dsel_assets.steps.workspace import Workspace, home
    from dsel_assets.task import load_task, shortened

    task = load_task(task_file)
    task = shortened(task) if quick else task
    ws = Workspace(task, home())
    tracking, warehouse = Tracking.at(home()), Warehouse(home() / "warehouse.duckdb")
    tracking.initialise()
    decided, compared = pipeline.run(ws)
    generation = current_generation(ws)
    for strategy in task.strategies.chosen():
        tracking.log_cells(
            task.name, generation.number, tracked_cells(ws, generation, strategy), {}
        )
    warehouse.initialise()
    warehouse.publish_views(tables(home()))
    checks = load_checks(ROOT / "dbt_like_sql/checks")
    for model in load_models(ROOT / "dbt_like_sql"):
        own = {check.name: check.text for check in checks if check.of == model.name}
        assert warehouse.build(model.name, model.text, own).published
    rows = cell_rows(ws, generation)
    test = [row for row in compared if row["split"] == "test"]
    figures = {"curve": budget_curve(rows, "accuracy", "test_accuracy"), "diff": differences(test)}
    board = leaderboard(rows, test)
    tracking.log_summary(task.name, generation.number, {}, figures, board, decided.identity)


def timed(command: list[str], quick: bool) -> float:
    """Seconds of a command in a fresh home with a fresh Dagster instance."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "dagster").mkdir()
        environment = os.environ | {"DSEL_HOME": folder, "DAGSTER_HOME": f"{folder}/dagster"}
        text = (ROOT / "dagster.yaml").read_text().replace(".dsel/dagster", f"{folder}/dagster")
        (Path(folder) / "dagster/dagster.yaml").write_text(text)
        started = time.perf_counter()
        subprocess.run(
            [*command, *(["--quick"] if quick else [])],
            cwd=ROOT, env=environment, check=True, capture_output=True,
        )  # fmt: skip
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--task", type=Path, default=ROOT / "tasks/digits.yaml")
    given = parser.parse_args()
    if given.plain:
        return plain(given.task, given.quick)
    ways = {
        "plain script": [sys.executable, __file__, "--plain"],
        "through Dagster": [sys.executable, "-m", "dsel_assets.cli", "run", str(given.task)],
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(given.rounds):
        for way, command in ways.items():
            seconds[way].append(timed(command, given.quick))
            print(f"round {number + 1}, {way}: {seconds[way][-1]:.1f} s", flush=True)
    one, other = (median(values) for values in seconds.values())
    print(f"median: plain {one:.1f} s, Dagster {other:.1f} s, ratio {other / one:.2f}")


if __name__ == "__main__":
    main()
