"""`dsel`: a thin face on the same functions."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dsel_assets.shown import board, changed, explained, leaderboard, planned, show, stands
from dsel_assets.task import TaskError, load_task

if TYPE_CHECKING:
    from rich.console import RenderableType

    from dsel_assets.steps.workspace import Workspace

app = typer.Typer(
    help="Decide which examples to finetune on, and see what it bought.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
TaskFile = Annotated[Path, typer.Argument(help="The task's YAML file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def _telling() -> Iterator[None]:
    """Errors as one line: 2 for a task that can't be used, 1 for what failed or is missing."""
    try:
        yield
    except TaskError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except (RuntimeError, FileExistsError) as error:
        if isinstance(error, typer.Exit):
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def _quietly(wanted: bool) -> Iterator[None]:
    """What is printed on the way goes to the standard error, so that JSON stands alone."""
    with redirect_stdout(sys.stderr) if wanted else nullcontext():
        yield


def _workspace(task_file: Path) -> Workspace:
    from dsel_assets.steps.workspace import Workspace, home

    return Workspace(load_task(task_file), home())


def _print(found: Any, as_json: bool, shown: Iterable[RenderableType]) -> None:
    if as_json:
        typer.echo(json.dumps(found, indent=1, default=str))
    else:
        show(shown)


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
    as_json: Json = False,
) -> None:
    """Ingest what landed, select, finetune, compare; only what is missing is made."""
    from dataclasses import asdict

    from dsel_assets.runner import dagster_instance, initialise
    from dsel_assets.runner import run as run_task
    from dsel_assets.task import shortened

    started = time.perf_counter()
    with _telling(), _quietly(as_json):
        task = load_task(task_file)
        if quick:
            task = shortened(task)
        with dagster_instance() as instance:
            initialise(instance)
            outcome = run_task(task, instance)
    if as_json:
        rows = board(task, outcome.generation)
        _print(asdict(outcome) | {"leaderboard": rows}, as_json, iter([]))
        return
    if not outcome.runs:
        typer.echo("nothing to do: every arrival, selection, checkpoint and verdict is there")
    show(leaderboard(task, outcome.generation))
    typer.echo(f"{time.perf_counter() - started:.1f} s")


@app.command()
def ingest(
    task_file: TaskFile = Path("tasks/digits.yaml"),
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files that are copied into the landing folder.", exists=True, dir_okay=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Validate, differentiate and sketch what has landed; nothing is selected."""
    from dsel_assets.runner import dagster_instance, initialise
    from dsel_assets.runner import ingest as ingest_files
    from dsel_assets.steps.status import status as standing

    with _telling(), _quietly(as_json):
        task = load_task(task_file)
        with dagster_instance() as instance:
            initialise(instance)
            ingest_files(task, instance, files or [])
        found = standing(_workspace(task_file))
    names = ("arrivals", "rows", "held_back")
    found = {name: found[name] for name in names}
    _print(found, as_json, stands(found))


@app.command()
def plan(
    task_file: TaskFile = Path("tasks/digits.yaml"),
    last: Annotated[bool, typer.Option(help="The last plan, beside what it took.")] = False,
    as_json: Json = False,
) -> None:
    """Say what the next run will take, from what was done before or a probe; or what one took."""
    from dataclasses import asdict

    from dsel_assets.steps.plan import last_plan
    from dsel_assets.steps.plan import plan as measure

    with _telling():
        ws = _workspace(task_file)
        found = last_plan(ws) if last else measure(ws)
        _print(asdict(found), as_json, planned(found))


@app.command()
def label(task_file: TaskFile, as_json: Json = False) -> None:
    """Ask for the labels that say most: print where the next requests lie and who still waits."""
    from dsel_assets.runner import dagster_instance, initialise
    from dsel_assets.runner import label as ask_for_labels

    with _telling(), _quietly(as_json):
        task = load_task(task_file)
        with dagster_instance() as instance:
            initialise(instance)
            found = ask_for_labels(task, instance)
    _print(found, as_json, iter([found.pop("said")]))


@app.command()
def status(task_file: TaskFile = Path("tasks/digits.yaml"), as_json: Json = False) -> None:
    """Say what has landed, what is selected, what is missing, and who is champion."""
    from dsel_assets.steps.status import status as standing

    with _telling():
        found = standing(_workspace(task_file))
        _print(found, as_json, stands(found))


@app.command()
def explain(
    example_id: Annotated[str, typer.Argument(help="Id of an example of the pool.")],
    task_file: TaskFile = Path("tasks/digits.yaml"),
    picture: Annotated[
        Path | None, typer.Option(help="Write a PNG of it beside its nearest targets here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say why an example was chosen, or what became of it."""
    from dsel_assets.steps.explain import explain as why
    from dsel_assets.steps.explain import portrait

    with _telling():
        ws = _workspace(task_file)
        found = why(ws, example_id)
        if picture is not None:
            picture.write_bytes(portrait(ws, example_id))
        _print(found, as_json, explained(found))


@app.command()
def diff(
    earlier: Annotated[int, typer.Argument(help="Number of a generation.")],
    later: Annotated[int, typer.Argument(help="Number of a later one.")],
    task_file: TaskFile = Path("tasks/digits.yaml"),
    cold: Annotated[
        bool, typer.Option(help="Also select anew where a strategy went on, and compare.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what each strategy kept, added and dropped from one generation to another."""
    from dsel_assets.steps.churn import diff as compare

    with _telling():
        found = compare(_workspace(task_file), earlier, later, cold)
        _print(found, as_json, changed(found, earlier, later))


By = Annotated[str, typer.Option(help="Who decides; else who is logged in.")]


@app.command()
def promote(
    strategy: Annotated[str, typer.Argument(help="Whose selection.")],
    task_file: TaskFile = Path("tasks/digits.yaml"),
    budget: Annotated[int | None, typer.Option(help="Else that of the task's rule.")] = None,
    seed: Annotated[int, typer.Option(help="Which of the paired seeds.")] = 0,
    by: By = "",
    why: Annotated[str, typer.Option(help="Needed where validation does not say better.")] = "",
    as_json: Json = False,
) -> None:
    """Make a selection of the current generation the champion; says who, when, on what evidence."""
    from getpass import getuser

    from dsel_assets.steps.verdict import promote_by_hand

    with _telling():
        ws = _workspace(task_file)
        limit = ws.task.promote.budget if budget is None else budget
        now = promote_by_hand(ws, strategy, limit, seed, by or getuser(), why)
        _enthroned(ws, now, as_json)


@app.command()
def rollback(
    task_file: TaskFile = Path("tasks/digits.yaml"), by: By = "", as_json: Json = False
) -> None:
    """Go back to the champion before this one; holds until another promotion."""
    from getpass import getuser

    from dsel_assets.steps.champion import rollback as go_back

    with _telling():
        ws = _workspace(task_file)
        _enthroned(ws, go_back(ws, by or getuser()), as_json)


def _enthroned(ws: Workspace, now: dict[str, Any] | None, as_json: bool) -> None:
    """Point MLflow's alias at the champion there is now, and print it."""
    from dsel_assets.resources.tracking import Tracking, best_effort
    from dsel_assets.steps.tracked import track_champion

    with best_effort(f"{ws.task.name}: the alias of the champion"):
        track_champion(ws, Tracking.at(ws.home))
    _print(now, as_json, stands({"champion": now}))


@app.command()
def export(
    to: Annotated[Path, typer.Argument(help="A new folder.")],
    strategy: Annotated[str, typer.Option(help="Whose selection.")],
    budget: Annotated[int, typer.Option(help="At which budget.")],
    seed: Annotated[int, typer.Option(help="Which of the paired seeds.")] = 0,
    task_file: Annotated[Path, typer.Option("--task", help="The task's YAML file.")] = Path(
        "tasks/digits.yaml"
    ),
    form: Annotated[
        Literal["parquet", "jsonl", "hf"], typer.Option("--as", help="hf: for `datasets`.")
    ] = "parquet",
    message: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROLE=COLUMN",
            help="A conversation in the input's place: a role and a column of pool.schema.text.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a selection's rows for other tools, with a manifest."""
    from dsel_assets.steps.export import MANIFEST
    from dsel_assets.steps.export import export as write

    with _telling():
        parts = [one.partition("=") for one in message or []]
        if not all(role and column for role, _, column in parts):
            raise typer.BadParameter("a message is given as ROLE=COLUMN", param_hint="--message")
        messages = [(role, column) for role, _, column in parts]
        folder = write(_workspace(task_file), strategy, budget, seed, to, form, messages)
        manifest = json.loads((folder / MANIFEST).read_text())
        _print({"folder": folder} | manifest, as_json, iter([str(folder)]))


@app.command()
def doctor(task_file: TaskFile = Path("tasks/digits.yaml"), as_json: Json = False) -> None:
    """Read everything that is stored and say what is damaged or left over; 1 if anything is."""
    from dataclasses import asdict

    from dsel_assets.steps.doctor import examine

    with _telling():
        found = list(examine(_workspace(task_file)))
    lines = (f"{one.path}: {one.problem}; {one.do}" for one in found)
    _print([asdict(one) for one in found], as_json, lines if found else iter(["all is well"]))
    raise typer.Exit(1 if found else 0)


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port of Dagster's pages.")] = 3000,
    mlflow_port: Annotated[int, typer.Option(help="Port of MLflow's pages.")] = 5000,
) -> None:
    """Show Dagster and MLflow on this machine; the sensors and the schedule work meanwhile."""
    from dsel_assets.runner import ROOT
    from dsel_assets.task import load_tasks
    from dsel_assets.ui import serve

    with _telling():
        load_tasks(ROOT / "tasks")  # one broken file would hide every task
    init()
    raise typer.Exit(serve(port, mlflow_port))


if __name__ == "__main__":
    app()
