"""`dsel`: a thin face on the same functions."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Literal

import typer

from dsel_assets.task import Task

app = typer.Typer(
    help="Decide which examples to finetune on, and see what it bought.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
LEADERBOARD = """
    select budget, strategy, mean, diff, diff_low, diff_high, verdict, select_seconds,
           train_seconds, seeds
    from leaderboard where task = ? and generation = ?
    order by budget, mean desc
"""
COLUMNS = (
    "budget",
    "strategy",
    "accuracy",
    "vs random",
    "verdict",
    "select s",
    "train s",
)
TaskFile = Annotated[Path, typer.Argument(help="The task's YAML file.")]


@app.callback()
def main() -> None:
    """Decide which examples to finetune on, and see what it bought."""


@app.command()
def init() -> None:
    """Create the databases of Dagster, DuckDB and MLflow where they are not there yet."""
    from dsel_assets.runner import dagster_instance, initialise

    with dagster_instance() as instance:
        initialise(instance)


@app.command()
def run(
    task_file: TaskFile = Path("tasks/digits.yaml"),
    quick: Annotated[
        bool, typer.Option(help="2 seeds, short training: to see that it runs, not to conclude.")
    ] = False,
) -> None:
    """Ingest what landed, select, finetune, compare; only what is missing is made."""
    from dsel_assets.runner import dagster_instance, initialise
    from dsel_assets.runner import run as run_task
    from dsel_assets.task import TaskError, load_task, shortened

    started = time.perf_counter()
    try:
        task = load_task(task_file)
        if quick:
            task = shortened(task)
        with dagster_instance() as instance:
            initialise(instance)
            outcome = run_task(task, instance)
    except TaskError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except RuntimeError as error:  # a job that failed, or a store that lacks something
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    if not outcome.runs:
        typer.echo("nothing to do: every arrival, selection, checkpoint and verdict is there")
    show_leaderboard(task, outcome.generation)
    typer.echo(f"{time.perf_counter() - started:.1f} s")


@app.command()
def label(task_file: TaskFile) -> None:
    """Ask for the labels that say most: print where the next requests lie and who still waits."""
    from dsel_assets.runner import dagster_instance, initialise
    from dsel_assets.runner import label as ask_for_labels
    from dsel_assets.task import TaskError, load_task

    try:
        task = load_task(task_file)
        with dagster_instance() as instance:
            initialise(instance)
            typer.echo(ask_for_labels(task, instance))
    except TaskError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except RuntimeError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def show_leaderboard(task: Task, generation: int) -> None:
    """Print a generation's leaderboard and what became of the champion."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from dsel_assets.resources.warehouse import Warehouse
    from dsel_assets.steps.verdict import champion
    from dsel_assets.steps.workspace import Workspace, home

    with Warehouse(home() / "warehouse.duckdb").connect(read_only=True) as warehouse:
        rows = warehouse.execute(LEADERBOARD, [task.name, generation]).fetchall()
    rule = task.promote
    table = Table(
        title=f"{task.name}: test accuracy, {rows[0][-1]} seeds, {rule.confidence:.0%} intervals",
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        collapse_padding=True,
    )
    for name in COLUMNS:
        side: Literal["left", "right"] = "left" if name in ("strategy", "verdict") else "right"
        table.add_column(name, justify=side, no_wrap=True)
    for number, row in enumerate(rows):
        budget, strategy, mean, diff, low, high, verdict, select, train, _ = row
        table.add_row(
            str(budget),
            strategy,
            f"{mean:.3f}",
            "" if diff is None else f"{diff:+.3f}  [{low:+.3f}, {high:+.3f}]",
            verdict,
            f"{select:.2f}",
            f"{train:.2f}",
            end_section=number + 1 < len(rows) and rows[number + 1][0] != budget,
        )
    console = Console(width=max(100, Console().width), highlight=False)
    console.print(table)
    judged = [row for row in rows if row[0] == rule.budget and row[1] != rule.against]
    for answer in ("better", "worse", "no difference shown"):
        names = ", ".join(row[1] for row in judged if row[6] == answer)
        if names:
            console.print(
                f"at {rule.budget} examples, {answer} than {rule.against}: {names}".replace(
                    "no difference shown than", "no difference shown to"
                )
            )
    chosen = champion(Workspace(task, home()))
    if chosen is None:
        console.print(
            f"no champion: on validation no strategy that chooses is better than {rule.against}"
        )
    else:
        console.print(
            f"champion, by validation: {chosen['strategy']} at {chosen['budget']} "
            f"(generation {chosen['generation']}, selection {chosen['selection']})"
        )


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port of Dagster's pages.")] = 3000,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's pages.")] = 5000,
) -> None:
    """Show Dagster and MLflow on this machine; the sensors and the schedule work meanwhile."""
    from dsel_assets.runner import ROOT
    from dsel_assets.task import TaskError, load_tasks
    from dsel_assets.ui import serve

    try:
        load_tasks(ROOT / "tasks")  # one broken file would hide every task
    except TaskError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    init()
    raise typer.Exit(serve(port, mlflow_port))


if __name__ == "__main__":
    app()
