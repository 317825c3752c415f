from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.events import DagsterEvent, EngineEventData

from dsel_assets import runner
from dsel_assets.automation import NOT_FINISHED
from dsel_assets.build import build
from dsel_assets.resources.store import StoreError
from dsel_assets.resources.tracking import Tracking
from dsel_assets.resources.warehouse import Warehouse
from dsel_assets.steps.cells import cells
from dsel_assets.steps.generation import current_generation

SUCCESS, FAILURE = dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE
FEW = {"strategies": {name: None for name in ("target_only", "skmm", "bads", "itl", "gradmatch")}}


def query(lab: Any, sql: str) -> list[Any]:
    with Warehouse(lab.home / "warehouse.duckdb").connect(read_only=True) as warehouse:
        return warehouse.execute(sql).fetchall()


def test_all_jobs_run_and_a_bad_arrival_stops_nothing(original: Any) -> None:
    lab, outcome = original
    # three arrivals, seven strategies, one comparison
    assert outcome.runs == 3 + 7 + 1 and outcome.held_back == ["a0"]
    ws = lab.workspace()
    assert [m.arrival for m in current_generation(ws).members] == ["a", "b"]


def test_dagster_knows_what_happened(ran: Any, instance: Any) -> None:
    statuses = [run.status for run in instance.get_runs()]
    assert statuses.count(FAILURE) == 1 and statuses.count(SUCCESS) == 10
    arrived = instance.get_materialized_partitions(dg.AssetKey(["tiny", "pool"]))
    sketched = instance.get_materialized_partitions(dg.AssetKey(["tiny", "sketches"]))
    assert arrived == {"a", "b", "a0"} and sketched == {"a", "b"}
    evaluated = instance.get_materialized_partitions(dg.AssetKey(["tiny", "metrics"]))
    assert evaluated == {"random", "full", "target_only", "skmm", "bads", "itl", "gradmatch"}


def test_a_second_call_runs_nothing(ran: Any, instance: Any) -> None:
    outcome = runner.run(ran.task(), instance)
    assert outcome.runs == 0 and outcome.held_back == ["a0"]


def test_the_warehouse_has_the_leaderboard(ran: Any) -> None:
    rows = query(ran, "select strategy, budget, generation, seeds, verdict from leaderboard")
    assert len(rows) == 7 * 2
    assert {row[2:4] for row in rows} == {(1, 2)}
    held_back = query(ran, "select arrival, held_back from arrivals where held_back != ''")
    assert held_back == [("a0", "the file can't be read")]
    assert query(ran, "select arrival, reason from quarantine") == [("a0", "unreadable file")]
    assert query(ran, "select count(*) from pool") == [(120,)]


def test_mlflow_has_a_parent_and_a_child_a_cell(ran: Any) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(Tracking.at(ran.home).uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) == 1 and len(children) == 28
    ws = ran.workspace()
    expected = {cell.identities["metrics"] for cell in cells(ws, current_generation(ws))}
    assert {run.data.tags["dsel.metric"] for run in children} == expected
    for run in children:
        assert run.data.tags["mlflow.parentRunId"] == parents[0].info.run_id
        assert run.data.tags["dagster.asset_key"] == "tiny/metrics"


def test_a_new_arrival_makes_a_generation(ran: Any, instance: Any) -> None:
    ran.land("c.jsonl", ran.rows(250, 280))
    task = ran.task(**FEW)
    outcome = runner.run(task, instance)
    assert outcome.runs == 1 + 2 + 1 and outcome.held_back == ["a0"]
    found = query(ran, "select generation, count(*) from leaderboard group by 1 order by 1")
    assert found == [(1, 14), (2, 4)]
    assert runner.run(task, instance).runs == 0


def test_another_seed_runs_what_it_needs(ran: Any, instance: Any) -> None:
    outcome = runner.run(ran.task(seeds=3, **FEW), instance)
    assert outcome.runs == 2 + 1
    assert query(ran, "select distinct seeds from leaderboard") == [(3,)]


def test_going_back_to_an_earlier_task_shows_it_again(ran: Any, instance: Any) -> None:
    """All is in the store, but the leaderboard is of the other task."""
    task = ran.task(promote={"budget": 5})
    assert runner.run(task, instance).runs == 1
    assert runner.run(ran.task(), instance).runs == 1
    corrected = "select distinct budget from comparisons where corrected"
    assert query(ran, corrected) == [(10,)]
    assert runner.run(ran.task(), instance).runs == 0


def test_another_space_is_sketched_again(ran: Any, instance: Any) -> None:
    task = ran.task(sketch={"seed": 1}, **FEW)
    outcome = runner.run(task, instance)
    assert outcome.held_back == ["a0"]
    assert current_generation(ran.workspace(sketch={"seed": 1}, **FEW)).number == 2
    assert runner.run(task, instance).runs == 0


def test_a_comparison_that_died_is_done_again(
    ran: Any, instance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict is in the store, its tables are not in the warehouse."""
    task = ran.task(seeds=3, **FEW)

    def dies(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Warehouse, "publish_views", dies)
        with pytest.raises(RuntimeError, match="the comparison failed"):
            runner.run(task, instance)
    assert query(ran, "select distinct seeds from leaderboard") == [(2,)]
    assert runner.run(task, instance).runs == 1
    assert query(ran, "select distinct seeds from leaderboard") == [(3,)]


def test_a_store_without_history_is_shown(ran: Any) -> None:
    """Dagster's history is lost: every job runs once more, and makes nothing."""
    before = {path for path in (ran.home / "store").rglob("manifest.json")}
    with dg.DagsterInstance.ephemeral() as fresh:
        runner.run(ran.task(), fresh)
        assert len(fresh.get_materialized_partitions(dg.AssetKey(["tiny", "metrics"]))) == 7
    assert {path for path in (ran.home / "store").rglob("manifest.json")} == before


def test_mlflow_being_down_fails_no_run_and_is_made_good(
    lab: Any, instance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSEL_MLFLOW_URI", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.warns(UserWarning, match="not in MLflow"):
        runner.initialise(instance)
    with pytest.warns(UserWarning, match="not in MLflow: tiny, generation 1: runs of random"):
        outcome = runner.run(lab.task(**FEW), instance)
    assert outcome.held_back == [] and outcome.runs == 2 + 2 + 1
    assert len(query(lab, "select * from leaderboard")) == 4
    assert time.monotonic() - started < 60

    monkeypatch.delenv("DSEL_MLFLOW_URI")
    made = {path for path in (lab.home / "store").rglob("manifest.json")}
    assert runner.run(lab.task(**FEW), instance).runs == 2 + 1, (
        "both strategies, then the comparison"
    )
    assert {path for path in (lab.home / "store").rglob("manifest.json")} == made
    assert runner.run(lab.task(**FEW), instance).runs == 0


RUN = """
import sys
import dagster as dg
from dsel_assets.runner import run
from dsel_assets.task import load_task
with dg.instance_for_test(temp_dir=sys.argv[2]) as instance:
    run(load_task(sys.argv[1]), instance)
"""


def test_a_killed_run_holds_up_nothing(lab: Any, tmp_path: Path) -> None:
    task, history = lab.task(**FEW), str(tmp_path / "dagster")
    Path(history).mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(lab.folder / "tiny.yaml"), history],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not list(lab.home.glob("store/tiny/checkpoints/*/manifest.json")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    with dg.instance_for_test(temp_dir=history) as instance:
        unfinished = dg.RunsFilter(statuses=NOT_FINISHED)
        assert instance.get_runs_count(unfinished) == 1
        runner.initialise(instance)
        assert instance.get_runs_count(unfinished) == 0
        assert runner.run(task, instance).held_back == []
        assert runner.run(task, instance).runs == 0


def at_work(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """This process says so in the run's log."""
    event = DagsterEvent(
        event_type_value=dg.DagsterEventType.ENGINE_EVENT.value,
        job_name=run.job_name,
        message="at work",
        event_specific_data=EngineEventData(),
        pid=os.getpid(),
    )
    instance.report_dagster_event(event, run.run_id)


def test_a_run_of_a_living_process_is_left_alone(instance: Any, lab: Any) -> None:
    defs = dg.Definitions.merge(
        build(lab.task(), runner.ROOT / "dbt_like_sql"),
        dg.Definitions(resources=runner.resources()),
    )
    job = defs.resolve_job_def("tiny_ingest")
    run = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
    at_work(instance, run)
    runner.end_leftovers(instance)
    assert instance.get_run_by_id(run.run_id).status is dg.DagsterRunStatus.STARTED


@pytest.mark.parametrize("living", [True, False])
def test_a_killed_run_gives_the_warehouse_back(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, living: bool
) -> None:
    """Killed while it wrote there, it would keep every later run waiting."""
    (tmp_path / "dagster").mkdir()
    pools = {"concurrency": {"pools": {"default_limit": 1}}}
    defs = dg.Definitions.merge(
        build(lab.task(), runner.ROOT / "dbt_like_sql"),
        dg.Definitions(resources=runner.resources()),
    )
    job = defs.resolve_job_def("tiny_compare")
    folder = str(tmp_path / "dagster")
    with dg.instance_for_test(temp_dir=folder, overrides=pools) as instance:
        storage = instance.event_log_storage
        one, other = (
            instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED) for _ in range(2)
        )
        for run in (one, other):
            at_work(instance, run)
        storage.initialize_concurrency_limit_to_default("warehouse")
        claim = partial(storage.claim_concurrency_slot, "warehouse", step_key="leaderboard")
        assert claim(run_id=one.run_id).is_claimed and not claim(run_id=other.run_id).is_claimed
        if not living:
            monkeypatch.setattr(runner, "alive", lambda pid: False)
        runner.end_leftovers(instance)
        later = instance.create_run_for_job(job).run_id
        claim(run_id=later)
        asked_again = storage.check_concurrency_claim("warehouse", later, "leaderboard")
        assert asked_again.is_claimed is not living


def test_nothing_landed(lab: Any, instance: Any) -> None:
    for path in lab.landing.iterdir():
        path.unlink()
    runner.initialise(instance)
    with pytest.raises(Exception, match=r"no \.parquet, .* file has landed yet"):
        runner.run(lab.task(), instance)


def test_what_is_wrong_is_said_in_one_line(
    lab: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from dsel_assets.cli import app

    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    (tmp_path / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    lab.task(model={"base": str(tmp_path / "gone.safetensors")})
    found = CliRunner().invoke(app, ["run", str(lab.folder / "tiny.yaml")])
    assert found.exit_code == 2
    assert f"tiny: model.base: there is no file {tmp_path / 'gone.safetensors'}" in found.output
    assert "Traceback" not in found.output

    (tmp_path / "odd.safetensors").write_bytes(b"no weights" * 100)
    lab.task(model={"base": str(tmp_path / "odd.safetensors")})
    found = CliRunner().invoke(app, ["run", str(lab.folder / "tiny.yaml")])
    assert found.exit_code != 0 and "Traceback" not in found.output


def test_every_strategy_goes_all_the_way(lab: Any, instance: Any) -> None:
    """Each of the registry through Dagster's jobs to the leaderboard, its checks included."""
    from dsel_assets.selection import STRATEGIES

    few = {"steps": 20, "batch_size": 16}
    settings = {
        **{name: {} for name in STRATEGIES},
        "bads": few | {"weighting": "network", "mode": "sgld", "chains": 2},
        "bads_joint": few,
        "smallloss": few | {"per_class": True},
        "cleanlab": few | {"folds": 2},
        "itl": {"rule": "vtl", "until": {"target_variance": 0.9}},
    }
    task = lab.task(strategies=settings, budgets=[10])
    runner.initialise(instance)
    outcome = runner.run(task, instance)
    assert outcome.runs == 2 + len(STRATEGIES) + 1 and outcome.held_back == []
    rows = query(lab, "select distinct strategy from leaderboard")
    assert {row[0] for row in rows} == set(STRATEGIES)
    stopped = query(lab, "select chosen from cells where strategy = 'itl' and stopped")
    assert stopped and all(chosen < 10 for [chosen] in stopped)
    whole = query(lab, "select distinct strategy from cells where whole")
    assert {row[0] for row in whole} == {"full", "target_only", "bads_joint"}
    assert runner.run(task, instance).runs == 0


def test_files_are_delivered_and_only_ingested(ran: Any, instance: Any) -> None:
    from dsel_assets.runner import ingest
    from dsel_assets.steps.arrivals import arrivals
    from dsel_assets.steps.cells import missing_strategies
    from dsel_assets.steps.generation import current_generation
    from dsel_assets.steps.status import status
    from tests.conftest import write

    drop = ran.folder / "elsewhere"
    drop.mkdir()
    file = write(drop / "c.parquet", ran.rows(220, 250))
    assert ingest(ran.task(), instance, [file]) == ["a0"]
    ws = ran.workspace()
    assert file.exists() and arrivals(ws)[-1].path == str(ran.landing / "c.parquet")
    assert status(ws)["rows"] == 150 and status(ws)["landed_and_unknown"] == 0
    assert missing_strategies(ws, current_generation(ws)).keys() >= {"random", "itl"}
    assert ingest(ran.task(), instance, [file]) == ["a0"]  # again: nothing new
    assert len(arrivals(ws)) == 4 and list(ran.landing.glob(".*")) == []
    write(file, ran.rows(250, 260))
    with pytest.raises(FileExistsError, match="with other content; rename"):
        ingest(ran.task(), instance, [file])
    with pytest.raises(StoreError, match="its name must end in"):
        ingest(ran.task(), instance, [drop / "notes.txt"])
