"""The jobs of a task in order, in this process: what `make demo` runs.

It asks the store what is missing, and Dagster's history what is not shown, and runs only the jobs
that have something to do. Interrupted, the same call goes on where it stopped.
"""

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from filelock import FileLock

from dsel_assets.assets.declare import data_version, key
from dsel_assets.assets.declared import DATA_VERSION, declare
from dsel_assets.build import build
from dsel_assets.resources.store import StoreError, alive
from dsel_assets.resources.tracking import Tracking, best_effort
from dsel_assets.resources.warehouse import Warehouse
from dsel_assets.steps.arrivals import arrivals, deliver, landed, register
from dsel_assets.steps.workspace import Workspace, home
from dsel_assets.task import Task

ROOT = Path(__file__).parent.parent
LOGGED = "mlflow"  # the metadata that an asset has once its runs are in MLflow
BEGUN = 180  # seconds in which the process of a run begins, or ends
SILENT = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}  # what failed is said here


@dataclass(frozen=True)
class Outcome:
    """runs: jobs that ran; held_back: arrivals that a check keeps out; generation: its number."""

    runs: int
    held_back: list[str]
    generation: int


def dagster_instance() -> dg.DagsterInstance:
    """The instance of DAGSTER_HOME, else the one that the project's `dagster.yaml` describes."""
    with _alone():
        if os.environ.get("DAGSTER_HOME"):
            return dg.DagsterInstance.get()
        return dg.DagsterInstance.from_config(str(ROOT))


def resources() -> dict[str, object]:
    """What the assets ask for, under the home of this process."""
    return {
        "home": home(),
        "warehouse": Warehouse(home() / "warehouse.duckdb"),
        "tracking": Tracking.at(home()),
    }


def initialise(instance: dg.DagsterInstance) -> None:
    """Create the databases, once and alone: several processes at a fresh one would break it."""
    with _alone():
        instance.get_runs_count()
        Warehouse(home() / "warehouse.duckdb").initialise()
        with best_effort("the database of MLflow"):
            Tracking.at(home()).initialise()
        end_leftovers(instance)


def _alone() -> FileLock:
    """Held while databases are opened or created for the first time."""
    home().mkdir(parents=True, exist_ok=True)
    return FileLock(home() / "initialise.lock")


def end_leftovers(instance: dg.DagsterInstance) -> None:
    """Let runs whose process was killed fail, and take their slots back.

    They would hold the queue's only place, and the warehouse's only writer, for ever.
    """
    for run in instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
        events = [entry.dagster_event for entry in instance.all_logs(run.run_id)]
        pids = [event.pid for event in events if event is not None and event.pid is not None]
        if pids and not alive(pids[-1]):
            instance.report_run_failed(run, f"Its process {pids[-1]} was killed.")
    stuck = dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTING, dg.DagsterRunStatus.CANCELING])
    for record in instance.get_run_records(stuck):
        if time.time() - record.update_timestamp.timestamp() > BEGUN:
            instance.report_run_failed(record.dagster_run, "Its process never began.")
    storage = instance.event_log_storage
    for run_id in storage.get_concurrency_run_ids():
        holder = instance.get_run_by_id(run_id)
        if holder is None or holder.is_finished:
            storage.free_concurrency_slots_for_run(run_id)


def run(task: Task, instance: dg.DagsterInstance) -> Outcome:
    """Ingest what landed, select and finetune what is missing, compare; say what happens."""
    from dsel_assets.steps.cells import cells, missing_strategies
    from dsel_assets.steps.generation import current_generation
    from dsel_assets.steps.verdict import find_verdict

    jobs = _Jobs(task, instance)
    ws = jobs.ws
    jobs.must_register()
    strategies = ", ".join(task.strategies.chosen())
    print(f"{task.name}: {len(arrivals(ws))} arrivals, {strategies}", flush=True)
    print(f"budgets {task.budgets}, {task.seeds} seeds; only what is missing is made", flush=True)
    held_back = jobs.ingest()
    if len(held_back) == len(arrivals(ws)):
        raise RuntimeError(f"{task.name}: every arrival is held back")

    generation = current_generation(ws)
    missing = missing_strategies(ws, generation)
    for strategy in task.strategies.chosen():
        version = data_version(c.identities["metrics"] for c in cells(ws, generation, strategy))
        there = strategy not in missing and jobs.shown("metrics", version, strategy, logged=True)
        if not there and (failed := jobs.execute("select", strategy)):
            raise RuntimeError(f"{task.name}: selecting by {strategy} failed: {failed}")
    decided = find_verdict(ws, generation)
    last = instance.get_runs(dg.RunsFilter(job_name=f"{task.name}_compare"), limit=1)
    there = (
        not jobs.runs
        and decided is not None
        and jobs.shown("verdict", decided.identity, logged=True)
        and [run.status for run in last] == [dg.DagsterRunStatus.SUCCESS]
    )
    if not there and (failed := jobs.execute("compare")):
        raise RuntimeError(f"{task.name}: the comparison failed: {failed}")
    return Outcome(jobs.runs, held_back, generation.number)


def ingest(task: Task, instance: dg.DagsterInstance, files: Sequence[Path] = ()) -> list[str]:
    """Ingest what has landed, these files among it; the arrivals that are held back.

    A file is copied into the landing folder under its own name; FileExistsError where another of
    that name lies there, StoreError where the landing folder is not on this machine.
    """
    jobs = _Jobs(task, instance)
    jobs.ws.prepare()
    for file in files:
        deliver(jobs.ws, file)
    jobs.must_register()
    return jobs.ingest()


def label(task: Task, instance: dg.DagsterInstance) -> dict[str, Any]:
    """Ingest what landed, then ask for labels if it is time; say where things are."""
    from dsel_assets.steps.labelling import requests_file, standing

    if task.active is None:
        raise StoreError(f"{task.name}: the task has no `active` section; see docs/itl.md")
    jobs = _Jobs(task, instance)
    if jobs.register():
        jobs.ingest()
    if failed := jobs.execute("label"):
        raise RuntimeError(f"{task.name}: asking for labels failed: {failed}")
    now = standing(jobs.ws)
    found = {
        "round": len(now.rounds),
        "waiting": len(now.waiting),
        "labelled": len(now.labelled),
        "requests": str(requests_file(now.rounds[-1])),
        "landing": jobs.ws.landing,
    }
    return found | {
        "said": f"round {found['round']}: {found['waiting']} rows wait for their label, "
        f"{found['labelled']} have theirs\n"
        f"requests: {found['requests']}\nlabelled rows go into {found['landing']}"
    }


class _Jobs:
    """The jobs of a task, run in this process; `runs` counts them."""

    def __init__(self, task: Task, instance: dg.DagsterInstance) -> None:
        self.task, self.instance, self.ws, self.runs = task, instance, Workspace(task, home()), 0
        self.definitions = dg.Definitions.merge(
            build(task, ROOT / "dbt_like_sql"),
            dg.Definitions(resources=resources(), executor=dg.in_process_executor),
        )
        declare(task, instance)

    def execute(self, job: str, partition: str | None = None) -> str | None:
        """Run a job; why it failed, or None."""
        self.runs += 1
        started = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dg.BetaWarning)
            found = self.definitions.resolve_job_def(f"{self.task.name}_{job}")
            done = found.execute_in_process(
                partition_key=partition,
                instance=self.instance,
                run_config=SILENT,
                raise_on_error=False,
            )
        said = "done" if done.success else "did not succeed"
        what = f"{job} {partition or ''}".ljust(32)
        print(f"{what} {said} in {time.perf_counter() - started:.1f} s", flush=True)
        return None if done.success else _why(done)

    def shown(
        self, asset: str, version: str, partition: str | None = None, logged: bool = False
    ) -> bool:
        """Say whether Dagster's history holds this version, and MLflow, where it should."""
        last = _last_materialization(self.instance, key(self.task, asset), partition)
        return (
            last is not None
            and (last.tags or {}).get(DATA_VERSION) == version
            and (not logged or LOGGED in last.metadata)
        )

    def register(self) -> bool:
        """Enter what landed; whether there is any arrival."""
        self.ws.check_files()
        self.ws.prepare()
        for file in landed(self.ws):
            try:
                register(self.ws, file)
            except OSError as error:  # it went away, or may not be read; the others go on
                print(f"  {file.path} can't be read: {error}", flush=True)
        keys = [known.key for known in arrivals(self.ws)]
        self.instance.add_dynamic_partitions(f"{self.task.name}_arrivals", keys)
        return bool(keys)

    def must_register(self) -> None:
        """The same; StoreError where nothing has landed."""
        if not self.register():
            landing = self.ws.landing
            raise StoreError(f"{landing}: no .parquet, .jsonl or .jsonl.gz file has landed yet")

    def ingest(self) -> list[str]:
        """Ingest the arrivals that are not; those that are held back."""
        from dsel_assets.steps.pool import find_ingested
        from dsel_assets.steps.pool import held_back as why_held_back
        from dsel_assets.steps.sketched import find_sketched

        ws, held_back = self.ws, []
        for known in arrivals(ws):
            pool = find_ingested(ws, known)
            if pool is None or not (
                why_held_back(ws, pool) and self.shown("pool", pool.identity, known.key)
            ):
                made = find_sketched(ws, pool) if pool else None
                if made and self.shown("sketches", made.sketches.identity, known.key):
                    continue
                failed = self.execute("ingest", known.key)
                pool = find_ingested(ws, known)
                if failed and not (pool and why_held_back(ws, pool)):
                    raise RuntimeError(f"{self.task.name}: ingesting {known.key} failed: {failed}")
                assert pool is not None
            if why := why_held_back(ws, pool):
                held_back.append(known.key)
                print(f"  {known.key} is held back: {why}", flush=True)
            elif pool.summary["reasons"]:
                rows, seen, reasons = (pool.summary[name] for name in ("rows", "seen", "reasons"))
                counts = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
                print(f"  {rows} of {seen} rows kept; in quarantine: {counts}", flush=True)
        return held_back


def _why(done: dg.ExecuteInProcessResult) -> str:
    """The first failed step and the error at the bottom of it; the event log has the rest."""
    for event in done.all_events:
        if event.is_step_failure and (error := event.step_failure_data.error):
            while error.cause is not None:
                error = error.cause
            return f"{event.step_key}: {' '.join(error.message.split())}"
    return "a blocking check did not pass; its page in the UI says why"


def _last_materialization(
    instance: dg.DagsterInstance, asset: dg.AssetKey, partition: str | None
) -> dg.AssetMaterialization | None:
    which = dg.AssetRecordsFilter(asset, [partition] if partition else None)
    records = instance.fetch_materializations(which, limit=1).records
    return records[0].asset_materialization if records else None
