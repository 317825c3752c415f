"""When work happens: jobs, the arrival sensor, what follows it, and the schedule."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from dsel_assets.assets.declare import Home, arrival_partitions, key
from dsel_assets.assets.declared import declare
from dsel_assets.resources.store import StoreError, identity
from dsel_assets.steps.arrivals import Arrival, arrivals, files_in, landed, register
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import Task

if TYPE_CHECKING:
    from dsel_assets.steps.generation import Generation

INGEST = ("target", "base_model", "pool", "gradients", "sketches", "hessian_spectrum")
SELECT = ("subsets", "checkpoints", "metrics")
# the event log holds everything; the terminal only what went wrong
QUIET = {"loggers": {"console": {"config": {"log_level": "ERROR"}}}}
NOT_FINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
]

MOST_TRIES = 9  # runs of one arrival, Dagster's own retries among them

Job = Any  # what `define_asset_job` returns; dagster does not export the type
Requests = Callable[[Task, Path], Iterator[dg.RunRequest | dg.SkipReason]]


def jobs(task: Task, models: list[str]) -> dict[str, Job]:
    """`ingest` by arrival, `select` by strategy, `compare`: one job can't mix their partitions."""

    def assets(*names: str) -> dg.AssetSelection:
        return dg.AssetSelection.assets(*(key(task, name) for name in names))

    def check(asset: str, name: str) -> dg.AssetSelection:
        return dg.AssetSelection.checks(dg.AssetCheckKey(key(task, asset), name))

    fit = check("sketches", "fit")
    across = (
        check("metrics", "complete")
        | check("subsets", "more_than_chance")
        | check("subsets", "weights_hold")
        | check("subsets", "covers")
        | check("verdict", "champion_holds")
    )
    said = {
        "ingest": "An arrival: validate it, differentiate it, sketch it. Nothing else is touched.",
        "select": "A strategy: choose, finetune, evaluate, at every budget with every seed.",
        "compare": "All strategies: verdict, champion, SQL models.",
    }
    chosen = {
        "ingest": assets(*INGEST) - fit,
        "select": (assets(*SELECT) | fit) - across,
        "compare": assets("verdict", *models) | across,
    }
    if task.active is not None:
        said["label"] = "Unlabelled rows: look at what was labelled, ask for the next."
        chosen["label"] = assets("label_requests")
    return {
        name: dg.define_asset_job(
            f"{task.name}_{name}", chosen[name], description=text, config=QUIET
        )
        for name, text in said.items()
    }


def arrival_sensor(task: Task, ingest: Job) -> dg.SensorDefinition:
    """Watches the landing folder; a file that stood still from tick to tick is an arrival."""

    @dg.sensor(
        name=f"{task.name}_arrivals",
        job=ingest,
        minimum_interval_seconds=10,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"New files in {task.pool.landing} become partitions and are ingested.",
    )
    def arrival_sensor(context: dg.SensorEvaluationContext, home: Home) -> dg.SensorResult:
        ws = Workspace(task, home)
        ws.prepare()
        before = json.loads(context.cursor or '{"seen": {}, "still": {}, "asked": []}')
        declaration = identity({"task": task.model_dump()})
        if before.get("declaration") != declaration and (
            changed := declare(task, context.instance)
        ):
            context.log.info(f"declared anew: {', '.join(changed)}")
        files = landed(ws)
        seen = {file.path: [file.size, file.modified] for file in files}
        still = {path: state for path, state in seen.items() if before["seen"].get(path) == state}
        for file in files:
            if file.path in still and before["still"].get(file.path) != still[file.path]:
                try:
                    entered = register(ws, file)
                except OSError as error:  # it went away; the next tick looks again
                    context.log.warning(f"{file.path}: {error}")
                    del still[file.path]
                else:
                    context.log.info(f"{file.path}: {entered.key if entered else 'known content'}")
        done = context.instance.get_materialized_partitions(key(task, "sketches"))
        new = [a for a in arrivals(ws) if a.key not in done and a.key not in before["asked"]]
        requests = [
            dg.RunRequest(partition_key=known.key, run_key=run_key)
            for known in arrivals(ws)
            if known.key not in done
            and (run_key := _run_key(context.instance, ws, known, known in new))
        ]
        asked = [known for known in before["asked"] if known not in done]
        cursor = {"seen": seen, "still": still, "asked": asked + [a.key for a in new]}
        cursor["declaration"] = declaration
        return dg.SensorResult(
            run_requests=requests,
            dynamic_partitions_requests=[
                arrival_partitions(task).build_add_request([a.key for a in new])
            ],
            cursor=json.dumps(cursor),
        )

    return arrival_sensor


def _run_key(instance: dg.DagsterInstance, ws: Workspace, known: Arrival, new: bool) -> str | None:
    """The key of the run that an arrival needs now, or None; Dagster starts one run a key.

    A file that was missed and is back has a key of its own, and so has an arrival of which Dagster
    has given up every run: it tries again those whose process died, but not for ever.
    """
    from dsel_assets.steps.pool import find_ingested, held_back, missed

    plain = f"{known.key}-{known.digest}"
    if new and not ws.store.folder(ws.task.name, "pool").exists():
        return plain
    if (when := missed(ws, known)) is not None:
        return f"{plain}-back-{when}"
    pool = find_ingested(ws, known)
    if pool is not None and held_back(ws, pool) is not None:
        return None
    if new:
        return plain
    of_it = {"dagster/partition": known.key}
    runs = instance.get_runs(dg.RunsFilter(job_name=f"{ws.task.name}_ingest", tags=of_it))
    died = all(run.status == dg.DagsterRunStatus.FAILURE for run in runs)  # nobody cancelled it
    given_up = 0 < len(runs) < MOST_TRIES and died
    return f"{plain}-again-{len(runs)}" if given_up else None


def follow_sensor(
    task: Task,
    after: Job,
    wanted: Job,
    requests: Requests,
    ended: dg.DagsterRunStatus = dg.DagsterRunStatus.SUCCESS,
) -> dg.SensorDefinition:
    """When the last waiting run of one job has ended so, ask for what the next one lacks."""

    @dg.run_status_sensor(
        name=f"{wanted.name}_after_{after.name.rpartition('_')[2]}_{ended.value.lower()}",
        run_status=ended,
        monitored_jobs=[after],
        request_job=wanted,
        minimum_interval_seconds=10,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"When a run of {after.name} ends in {ended.value} and no other waits, runs "
        f"{wanted.name}.",
    )
    def follow_sensor(
        context: dg.RunStatusSensorContext, home: Home
    ) -> Iterator[dg.RunRequest | dg.SkipReason]:
        # a comparison waits for arrivals as well: they make it one of another generation
        for job in dict.fromkeys((f"{task.name}_ingest", after.name)):
            unfinished = dg.RunsFilter(job_name=job, statuses=NOT_FINISHED)
            if context.instance.get_runs_count(unfinished):
                yield dg.SkipReason(f"runs of {job} are not done yet")
                return
        yield from requests(task, home)

    return follow_sensor


def requests_to_select(task: Task, home: Path) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """A run for each strategy that has a cell to make in the current generation."""
    ws = Workspace(task, home)
    standing = _standing(ws)
    if isinstance(standing, dg.SkipReason):
        yield standing
        return
    generation, missing = standing
    for strategy, wanted in missing.items():
        yield dg.RunRequest(run_key=f"{strategy}-{wanted}", partition_key=strategy)
    if not missing:
        yield dg.SkipReason(f"nothing changed: generation {generation.number} is complete")


def requests_to_compare(task: Task, home: Path) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """A run of the comparison once no strategy has a cell left to make."""
    from dsel_assets.steps.verdict import verdict_identity

    ws = Workspace(task, home)
    standing = _standing(ws)
    if isinstance(standing, dg.SkipReason):
        yield standing
        return
    generation, missing = standing
    if missing:
        yield dg.SkipReason(f"waiting for {', '.join(missing)}")
    else:
        yield dg.RunRequest(run_key=verdict_identity(ws, generation))


def _standing(ws: Workspace) -> "tuple[Generation, dict[str, str]] | dg.SkipReason":
    """The current generation and the strategies that it lacks, or why there is none to follow."""
    from dsel_assets.steps.cells import missing_strategies
    from dsel_assets.steps.generation import current_generation

    try:
        generation = current_generation(ws)
    except StoreError as error:  # nothing was ingested yet, or not under these settings
        return dg.SkipReason(str(error))
    return generation, missing_strategies(ws, generation)


def reselection_schedule(task: Task, select: Job) -> dg.ScheduleDefinition:
    """The task's schedule: select again, where anything changed."""
    assert task.schedule is not None

    @dg.schedule(
        name=f"{task.name}_reselect",
        job=select,
        cron_schedule=task.schedule,
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Selects again for whatever changed since; says so when nothing did.",
    )
    def reselection_schedule(
        context: dg.ScheduleEvaluationContext, home: Home
    ) -> Iterator[dg.RunRequest | dg.SkipReason]:
        yield from requests_to_select(task, home)

    return reselection_schedule


def requests_to_label(task: Task, home: Path) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """A run once enough of what was asked for is labelled."""
    from dsel_assets.steps.labelling import standing

    assert task.active is not None
    try:
        now = standing(Workspace(task, home))
    except StoreError as error:  # an arrival under other settings
        yield dg.SkipReason(str(error))
        return
    if now.due(task.active):
        # a round that failed, or found no candidate, is tried again once anything is new
        candidates = [asdict(file) for file in files_in(task.active.candidates)]
        pool = now.generation.identity if now.generation else None
        new = identity({"candidates": candidates, "pool": pool, "labelled": len(now.labelled)})
        yield dg.RunRequest(run_key=f"round-{len(now.rounds) + 1}-{new}")
    else:
        yield dg.SkipReason(f"{len(now.waiting)} rows wait for their label")


def labelling_schedule(task: Task, label: Job, cron: str) -> dg.ScheduleDefinition:
    """Looks at what was labelled."""

    @dg.schedule(
        name=f"{task.name}_ask",
        job=label,
        cron_schedule=cron,
        default_status=dg.DefaultScheduleStatus.RUNNING,
        description="Asks for the next labels once the last ones are there; else says how many "
        "rows wait.",
    )
    def labelling_schedule(
        context: dg.ScheduleEvaluationContext, home: Home
    ) -> Iterator[dg.RunRequest | dg.SkipReason]:
        yield from requests_to_label(task, home)

    return labelling_schedule


def model_sensor(task: Task, models: list[str]) -> dg.AutomationConditionSensorDefinition:
    """Builds a SQL model again when its text has changed, and those that read it."""
    return dg.AutomationConditionSensorDefinition(
        f"{task.name}_models",
        target=dg.AssetSelection.assets(*(key(task, name) for name in models)),
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="A SQL model whose text has changed is built again, and those that read it.",
    )


def automation(
    task: Task, by_name: dict[str, Job]
) -> tuple[list[dg.SensorDefinition], list[dg.ScheduleDefinition]]:
    """Sensors and schedules of a task, all running from the start."""
    ingest, select, compare = (by_name[name] for name in ("ingest", "select", "compare"))
    sensors = [
        arrival_sensor(task, ingest),
        follow_sensor(task, ingest, select, requests_to_select),
        # an arrival that is held back may be the last of several; the good ones waited for it
        follow_sensor(task, ingest, select, requests_to_select, dg.DagsterRunStatus.FAILURE),
        follow_sensor(task, select, compare, requests_to_compare),
    ]
    schedules = [reselection_schedule(task, select)] if task.schedule else []
    if task.active is not None:
        sensors.append(follow_sensor(task, ingest, by_name["label"], requests_to_label))
        if task.active.schedule is not None:
            schedules.append(labelling_schedule(task, by_name["label"], task.active.schedule))
    return sensors, schedules
