from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dsel_assets.automation import requests_to_compare, requests_to_select
from dsel_assets.build import build
from dsel_assets.runner import resources
from dsel_assets.steps.arrivals import arrivals
from dsel_assets.steps.cells import cells
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.verdict import verdict_identity

SQL = Path(__file__).parents[2] / "dbt_like_sql"
STRATEGIES = {"random", "full", "target_only", "skmm", "bads", "itl", "gradmatch"}


class Sensor:
    """The arrival sensor, tick by tick, as the daemon would."""

    def __init__(self, lab: Any, instance: dg.DagsterInstance) -> None:
        self.lab, self.instance, self.cursor = lab, instance, None
        self.defs = definitions(lab.task())

    def tick(self) -> dict[str, str | None]:
        """Requested partitions and their run keys."""
        sensor = self.defs.resolve_sensor_def("tiny_arrivals")
        with dg.build_sensor_context(
            instance=self.instance, cursor=self.cursor, resources={"home": self.lab.home}
        ) as context:
            result = sensor(context)
        assert isinstance(result, dg.SensorResult)
        self.cursor = result.cursor
        for request in result.dynamic_partitions_requests or []:
            self.instance.add_dynamic_partitions("tiny_arrivals", list(request.partition_keys))
        known = set(self.instance.get_dynamic_partitions("tiny_arrivals"))
        assert {r.partition_key for r in result.run_requests or []} <= known
        return {str(r.partition_key): r.run_key for r in result.run_requests or []}


def definitions(task: Any) -> dg.Definitions:
    return dg.Definitions.merge(
        build(task, SQL), dg.Definitions(resources=resources(), executor=dg.in_process_executor)
    )


@pytest.fixture
def sensor(lab: Any, instance: Any) -> Sensor:
    return Sensor(lab, instance)


def older(path: Path) -> None:
    """Move the file's time, as a writer does."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10**9))


def test_a_file_that_stands_still_is_asked_for_once(sensor: Sensor) -> None:
    assert sensor.tick() == {}
    assert arrivals(sensor.lab.workspace()) == []
    asked = sensor.tick()
    assert asked.keys() == {"a", "b"}
    for known in arrivals(sensor.lab.workspace()):
        assert asked[known.key] == f"{known.key}-{known.digest}"
    for _ in range(3):
        assert sensor.tick() == {}


def test_a_growing_file_waits(sensor: Sensor) -> None:
    sensor.tick(), sensor.tick()
    path = sensor.lab.landing / "c.jsonl"
    for stop in (230, 240, 250):
        sensor.lab.land("c.jsonl", sensor.lab.rows(220, stop))
        assert sensor.tick() == {}
    assert sensor.tick().keys() == {"c"}
    assert path.exists() and sensor.tick() == {}


def test_the_same_size_at_another_time_waits(sensor: Sensor) -> None:
    sensor.tick()
    older(sensor.lab.landing / "a.parquet")
    assert sensor.tick().keys() == {"b"}
    assert sensor.tick().keys() == {"a"}


def test_a_copy_asks_for_nothing(sensor: Sensor) -> None:
    sensor.tick(), sensor.tick()
    shutil.copy(sensor.lab.landing / "a.parquet", sensor.lab.landing / "copy.parquet")
    shutil.copy(sensor.lab.landing / "a.parquet", sensor.lab.landing / "b2.parquet")
    for _ in range(4):
        assert sensor.tick() == {}


def test_a_file_that_is_only_touched_asks_for_nothing(sensor: Sensor) -> None:
    sensor.tick(), sensor.tick()
    older(sensor.lab.landing / "a.parquet")
    for _ in range(3):
        assert sensor.tick() == {}


def test_new_content_under_a_known_name(sensor: Sensor) -> None:
    sensor.tick(), sensor.tick()
    sensor.lab.land("a.parquet", sensor.lab.rows(220, 250))
    assert sensor.tick() == {}
    (asked,) = sensor.tick()
    assert asked.startswith("a-")
    assert sensor.tick() == {}


def test_a_file_that_goes_between_ticks(sensor: Sensor) -> None:
    sensor.tick()
    content = (sensor.lab.landing / "a.parquet").read_bytes()
    (sensor.lab.landing / "a.parquet").unlink()
    assert sensor.tick().keys() == {"b"}
    (sensor.lab.landing / "a.parquet").write_bytes(content)
    assert sensor.tick() == {}
    assert sensor.tick().keys() == {"a"}


def test_a_file_that_cannot_be_read_stops_no_other(
    sensor: Sensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsel_assets.steps import arrivals as step

    digest = step.file_digest

    def refused(path: str) -> str:
        if path.endswith("a.parquet"):
            raise PermissionError(path)
        return digest(path)

    sensor.tick()
    with monkeypatch.context() as patch:
        patch.setattr(step, "file_digest", refused)
        assert sensor.tick().keys() == {"b"}
    assert sensor.tick().keys() == {"a"}


def test_no_landing_folder_yet(sensor: Sensor) -> None:
    shutil.rmtree(sensor.lab.landing)
    assert sensor.tick() == {}
    sensor.lab.land("a.jsonl", sensor.lab.rows(220, 230))
    sensor.tick()
    assert sensor.tick().keys() == {"a"}


def test_a_lost_cursor_asks_for_nothing_that_is_there(ran: Any, instance: Any) -> None:
    sensor = Sensor(ran, instance)
    first, second = sensor.tick(), sensor.tick()
    assert first | second == {} == sensor.tick()  # not even for the one that is held back
    # an unreadable file stays so, whatever is allowed
    sensor.defs, sensor.cursor = definitions(ran.task(pool={"max_quarantine": 1.0})), None
    assert sensor.tick() == {}


def test_the_cursor_is_small_and_json(sensor: Sensor) -> None:
    sensor.tick(), sensor.tick()
    assert sensor.cursor is not None
    assert json.loads(sensor.cursor).keys() == {"seen", "still", "asked", "declaration"}


def said(requests: Any) -> tuple[dict[str | None, str | None], str]:
    """Requested partitions with their run keys, and the reason when there are none."""
    found = list(requests)
    runs = {r.partition_key: r.run_key for r in found if isinstance(r, dg.RunRequest)}
    return runs, " ".join(r.skip_message for r in found if isinstance(r, dg.SkipReason))


def test_before_anything_arrived_nothing_is_asked_for(lab: Any) -> None:
    for requests in (requests_to_select, requests_to_compare):
        runs, why = said(requests(lab.task(), lab.home))
        assert not runs and "no arrival is sketched yet" in why


def test_select_is_asked_for_what_is_missing(done: Any) -> None:
    assert said(requests_to_select(done.task(), done.home)) == (
        {},
        "nothing changed: generation 1 is complete",
    )
    runs, _ = said(
        requests_to_select(done.task(strategies={"itl": {"form": "library"}}), done.home)
    )
    assert runs.keys() == {"itl"}
    more, _ = said(requests_to_select(done.task(seeds=3), done.home))
    assert {"random", "skmm", "bads", "itl", "gradmatch"} <= more.keys()
    assert more["itl"] != runs["itl"]
    # asked again, the same keys: the daemon launches nothing twice
    assert said(requests_to_select(done.task(seeds=3), done.home))[0] == more


def test_a_new_arrival_asks_for_every_strategy(done: Any) -> None:
    from dsel_assets.steps.arrivals import landed, register
    from dsel_assets.steps.pool import ingest
    from dsel_assets.steps.sketches import sketch

    done.land("c.jsonl", done.rows(220, 250))
    ws = done.workspace()
    for file in landed(ws):
        register(ws, file)
    assert said(requests_to_select(done.task(), done.home))[0] == {}
    sketch(ws, ingest(ws, "c"))
    assert said(requests_to_select(done.task(), done.home))[0].keys() == STRATEGIES


def test_compare_waits_for_the_last_strategy(done: Any) -> None:
    ws = done.workspace()
    generation = current_generation(ws)
    runs, _ = said(requests_to_compare(done.task(), done.home))
    assert runs == {None: verdict_identity(ws, generation)}
    cell = next(iter(cells(ws, generation, "bads")))
    shutil.rmtree(ws.store.get("tiny", "metrics", cell.metric).path)
    assert said(requests_to_compare(done.task(), done.home)) == ({}, "waiting for bads")


def test_the_schedule(done: Any, instance: Any) -> None:
    def tick(**changes: Any) -> Any:
        schedule = definitions(done.task(**changes)).resolve_schedule_def("tiny_reselect")
        assert schedule.cron_schedule == "0 6 * * 1"
        with dg.build_schedule_context(instance=instance, resources={"home": done.home}) as context:
            return said(schedule(context))

    assert tick() == ({}, "nothing changed: generation 1 is complete")
    assert tick(strategies={"skmm": {"c": 0.99}})[0].keys() == {"skmm"}


def after(defs: dg.Definitions, job: str, status: dg.DagsterRunStatus) -> list[dg.SensorDefinition]:
    """The sensors that see a run of this job end like this."""
    return [
        sensor
        for sensor in defs.sensors or []
        if isinstance(sensor, dg.RunStatusSensorDefinition)
        and sensor._run_status is status
        and job in [monitored.name for monitored in sensor._monitored_jobs]
    ]


def follow(sensor: Any, run: Any, instance: Any, home: Path) -> tuple[Any, str]:
    """What a sensor asks for when it sees the run."""
    logs = [entry.dagster_event for entry in instance.all_logs(run.run_id)]
    ended = [event for event in logs if event is not None and event.is_job_event][-1]
    with dg.build_run_status_sensor_context(
        sensor_name=sensor.name,
        dagster_instance=instance,
        dagster_run=run,
        dagster_event=ended,
        resources={"home": home},
    ) as context:
        return said(sensor(context))


def test_the_last_arrival_being_held_back_does_not_stop_the_others(ran: Any, instance: Any) -> None:
    """The good ones saw that one was waiting; when it fails, nobody else would ask."""
    shutil.rmtree(ran.home / "store" / "tiny" / "metrics")
    defs = definitions(ran.task())
    runs = instance.get_runs(dg.RunsFilter(job_name="tiny_ingest"))
    failed = [run for run in runs if run.status is dg.DagsterRunStatus.FAILURE]
    assert len(failed) == 1
    (sensor,) = after(defs, "tiny_ingest", dg.DagsterRunStatus.FAILURE)
    assert follow(sensor, failed[0], instance, ran.home)[0].keys() == STRATEGIES


def test_what_follows_a_run(ran: Any, instance: Any) -> None:
    defs = definitions(ran.task())
    (to_select,) = after(defs, "tiny_ingest", dg.DagsterRunStatus.SUCCESS)
    (to_compare,) = after(defs, "tiny_select", dg.DagsterRunStatus.SUCCESS)
    succeeded = dg.DagsterRunStatus.SUCCESS
    ingest, select = (
        instance.get_runs(dg.RunsFilter(job_name=f"tiny_{job}", statuses=[succeeded]))[0]
        for job in ("ingest", "select")
    )
    assert follow(to_select, ingest, instance, ran.home) == (
        {},
        "nothing changed: generation 1 is complete",
    )
    runs, _ = follow(to_compare, select, instance, ran.home)
    assert set(runs) == {None}
    # while another run of the job waits, the last one will ask
    instance.create_run_for_job(
        defs.resolve_job_def("tiny_ingest"), status=dg.DagsterRunStatus.STARTED
    )
    assert follow(to_select, ingest, instance, ran.home) == (
        {},
        "runs of tiny_ingest are not done yet",
    )


def test_an_arrival_whose_runs_all_died_is_asked_for_again_but_not_for_ever(
    sensor: Sensor,
) -> None:
    sensor.tick()
    keys = {sensor.tick()["a"]}
    job = sensor.defs.resolve_job_def("tiny_ingest")
    for _ in range(12):
        run = sensor.instance.create_run_for_job(job, tags={"dagster/partition": "a"})
        assert sensor.tick() == {}  # it is waited for
        sensor.instance.report_run_failed(run)
        again = sensor.tick()
        assert again.keys() <= {"a"}
        keys |= set(again.values())
    assert len(keys) == 9


def test_runs_that_never_began_hold_up_nothing(
    lab: Any, instance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsel_assets import runner

    job = definitions(lab.task()).resolve_job_def("tiny_ingest")
    run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTING)
    runner.end_leftovers(instance)
    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.STARTING
    monkeypatch.setattr(runner, "BEGUN", -1)
    runner.end_leftovers(instance)
    assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE
