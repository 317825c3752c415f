from __future__ import annotations

import json
import multiprocessing
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsel_assets.resources.tracking import TrackedCell, Tracking, best_effort

GENERATION = "0123456789abcdef0123"
CHAMPION = {
    "strategy": "itl",
    "budget": 100,
    "generation": 1,
    "selection": "s",
    "checkpoint": "c1",
    "evidence": {"diff": 0.02},
}


def cell(strategy: str = "itl", budget: int = 50, seed: int = 0, metric: str = "m") -> TrackedCell:
    return TrackedCell(
        strategy=strategy,
        budget=budget,
        seed=seed,
        selection=f"s-{strategy}-{budget}",
        metric=f"{metric}-{strategy}-{budget}-{seed}",
        settings={"form": "paper", "noise": None},
        finetune={"steps": 400, "lr": 1e-3, "trainable": ["fc.*"]},
        scores={
            split: {"accuracy": 0.9, "macro_f1": 0.88, "loss": 0.3, "calibration_error": 0.02}
            for split in ("validation", "test")
        },
        curve=[1.0, 0.5, 0.25],
        select_seconds=2.0,
        train_seconds=3.0,
        digest=GENERATION,
        source="/data/landing",
        ended=1_700_000_000.0,
    )


CELLS = [cell(strategy, seed=seed) for strategy in ("itl", "random") for seed in range(2)]


def log_in_process(home: Path, start: Any) -> None:
    start.wait()
    Tracking.at(home).log_cells("race", 1, CELLS, {})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow that two processes at once have created and logged the task `race` to."""
    home = tmp_path_factory.mktemp("home")
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    processes = [context.Process(target=log_in_process, args=(home, start)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    return home


@pytest.fixture
def tracking(home: Path) -> Tracking:
    return Tracking.at(home)


def runs(tracking: Tracking, task: str) -> list[Any]:
    found = tracking._client.get_experiment_by_name(task)
    return list(tracking._client.search_runs([found.experiment_id]))


def parents(tracking: Tracking, task: str) -> list[Any]:
    return [r for r in runs(tracking, task) if "mlflow.parentRunId" not in r.data.tags]


def children(tracking: Tracking, task: str) -> list[Any]:
    return [r for r in runs(tracking, task) if "mlflow.parentRunId" in r.data.tags]


def places(found: Sequence[Any]) -> list[tuple[str, str, str]]:
    return sorted(tuple(r.data.params[k] for k in ("strategy", "budget", "seed")) for r in found)


def test_two_processes_on_a_fresh_database_make_one_parent_and_no_duplicates(
    tracking: Tracking,
) -> None:
    assert len(parents(tracking, "race")) == 1
    assert places(children(tracking, "race")) == sorted(cell.place for cell in CELLS)


def test_a_child_shows_what_its_cell_was_made_from_and_scored(tracking: Tracking) -> None:
    dagster = {"dagster.run_id": "r", "dagster.asset_key": "k"}
    parent = tracking.log_cells("one", 7, [cell()], dagster)
    (child,) = children(tracking, "one")
    assert child.data.params == {
        "strategy": "itl",
        "budget": "50",
        "seed": "0",
        "itl.form": "paper",
        "itl.noise": "None",
        "finetune.steps": "400",
        "finetune.lr": "0.001",
        "finetune.trainable": "['fc.*']",
    }
    names = ("accuracy", "macro_f1", "loss", "calibration_error")
    scored = {f"{split}/{name}" for split in ("validation", "test") for name in names}
    assert child.data.metrics.keys() == scored | {"select_seconds", "train_seconds", "train/loss"}
    assert child.data.metrics["test/accuracy"] == 0.9
    curve = tracking._client.get_metric_history(child.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in curve] == [(1, 1.0), (2, 0.5), (3, 0.25)]
    expected = dagster | {
        "mlflow.parentRunId": parent,
        "dsel.generation": "7",
        "dsel.selection": "s-itl-50",
        "dsel.metric": "m-itl-50-0",
    }
    assert expected.items() <= child.data.tags.items()
    (used,) = child.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("one pool 7", GENERATION)
    assert "/data/landing" in used.dataset.source
    assert child.info.status == "FINISHED"
    assert child.info.end_time == 1_700_000_000_000
    assert child.info.end_time - child.info.start_time == 5000
    assert tracking._client.get_run(parent).info.status == "FINISHED"


def test_what_is_logged_is_not_logged_again(tracking: Tracking) -> None:
    parent = tracking.log_cells("again", 1, CELLS[:2], {})
    before = {run.info.run_id for run in children(tracking, "again")}
    assert tracking.log_cells("again", 1, CELLS, {}) == parent
    after = {run.info.run_id for run in children(tracking, "again")}
    assert before < after
    assert len(after) == len(CELLS)
    assert tracking.log_cells("again", 2, CELLS[:1], {}) != parent


def test_another_metric_of_the_same_cell_supersedes_the_logged_one(tracking: Tracking) -> None:
    tracking.log_cells("stale", 1, CELLS, {})
    changed = replace(CELLS[0], metric="other")
    tracking.log_cells("stale", 1, [changed], {})
    found = children(tracking, "stale")
    assert places(found) == sorted(cell.place for cell in CELLS)
    expected = {changed.metric, *(cell.metric for cell in CELLS[1:])}
    assert {run.data.tags["dsel.metric"] for run in found} == expected


def test_a_call_that_broke_off_is_made_good_by_the_next(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def fail_late(run_id: str, datasets: Any) -> None:
        calls.append(run_id)
        if len(calls) == 2:
            raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(tracking._client, "log_inputs", fail_late)
        with pytest.raises(ConnectionError):
            tracking.log_cells("broken", 1, CELLS, {})
    tracking.log_cells("broken", 1, CELLS, {})
    assert len(parents(tracking, "broken")) == 1
    found = children(tracking, "broken")
    assert places(found) == sorted(cell.place for cell in CELLS)
    assert {run.info.status for run in found} == {"FINISHED"}


def test_the_summary_stands_on_the_parent_once(tracking: Tracking, tmp_path: Path) -> None:
    client = tracking._client
    rows = [
        {"strategy": "itl", "diff": 0.02},
        {"strategy": "random", "diff": float("nan"), "note": "baseline"},
    ]

    def log(accuracy: float, identity: str) -> Any:
        metrics = {"accuracy/itl:50": accuracy}
        run = tracking.log_summary("summed", 1, metrics, {"budget_curve": b"png"}, rows, identity)
        return client.get_run(run)

    parent = log(0.9, "v1")
    assert parent.info.run_id == tracking.log_cells("summed", 1, CELLS[:1], {})
    assert parent.data.metrics == {"accuracy/itl:50": 0.9}
    assert log(0.1, "v1").data.metrics == {"accuracy/itl:50": 0.9}
    assert log(0.8, "v2").data.metrics == {"accuracy/itl:50": 0.8}
    folder = Path(client.download_artifacts(parent.info.run_id, "", str(tmp_path)))
    assert (folder / "figures" / "budget_curve.png").read_bytes() == b"png"
    assert json.loads((folder / "leaderboard.json").read_text()) == {
        "columns": ["strategy", "diff", "note"],
        "data": [["itl", 0.02, None], ["random", None, "baseline"]],
    }
    assert '"leaderboard.json", "type": "table"' in parent.data.tags["mlflow.loggedArtifacts"]
    assert len(parents(tracking, "summed")) == 1


def test_the_alias_follows_the_champion_and_a_checkpoint_has_one_version(
    tracking: Tracking, tmp_path: Path
) -> None:
    client = tracking._client
    weights = tmp_path / "model.safetensors"

    def register(checkpoint: str) -> str:
        weights.write_bytes(checkpoint.encode())
        tracking.register_champion("led", CHAMPION | {"checkpoint": checkpoint}, weights)
        return str(client.get_model_version_by_alias("led", "champion").version)

    tracking.register_champion("led", None, weights)
    assert not client.search_registered_models("name = 'led'")
    assert [register(name) for name in ("c1", "c1", "c2", "c1")] == ["1", "1", "2", "1"]
    assert len(client.search_model_versions("name = 'led'")) == 2

    version = client.get_model_version_by_alias("led", "champion")
    assert version.tags["dsel.selection"] == "s"
    (parent,) = parents(tracking, "led")
    assert version.run_id == parent.info.run_id
    file = client.download_artifacts(version.run_id, "champion/c1/model.safetensors", str(tmp_path))
    assert Path(file).read_bytes() == b"c1"
    assert version.source == f"{parent.info.artifact_uri}/champion/c1"

    tracking.register_champion("led", None, weights)
    assert not client.get_registered_model("led").aliases


def test_the_link_leads_to_the_experiment(
    tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = tracking._client.get_experiment_by_name("race").experiment_id
    assert (
        tracking.url("race")
        == f"http://127.0.0.1:5000/#/experiments/{number}/runs?workflowType=machine_learning"
    )
    monkeypatch.setenv("DSEL_MLFLOW_UI", "https://mlflow.example.org/")
    assert (
        tracking.url("race")
        == f"https://mlflow.example.org/#/experiments/{number}/runs?workflowType=machine_learning"
    )


def test_artifacts_lie_under_the_home_whatever_the_working_directory(
    tracking: Tracking, home: Path
) -> None:
    (parent,) = parents(tracking, "race")
    assert parent.info.artifact_uri.startswith((home / "mlflow" / "artifacts" / "race").as_uri())


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Accepts connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("server", ["refuses", "never answers"])
def test_the_work_goes_on_without_mlflow(
    server: str, silent_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSEL_MLFLOW_URI", "http://127.0.0.1:9")
    if server == "never answers":
        monkeypatch.setenv("DSEL_MLFLOW_URI", silent_server)
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    started = time.perf_counter()
    with (
        pytest.warns(UserWarning, match=r"not in MLflow: digits 1.*; the next run") as caught,
        best_effort("digits 1: cells of random"),
    ):
        Tracking.at(tmp_path).log_cells("digits", 1, CELLS, {})
    assert time.perf_counter() - started < 10
    assert [("\n" in str(w.message), w.filename) for w in caught] == [(False, __file__)]


def test_best_effort_is_silent_when_all_is_well() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with best_effort("nothing"):
            pass


def test_mlflow_is_imported_by_use_alone_and_sends_no_telemetry(tmp_path: Path) -> None:
    code = """
import os, sys
from pathlib import Path
from dsel_assets.resources.tracking import Tracking
assert "mlflow" not in sys.modules
Tracking("http://127.0.0.1:9", Path(sys.argv[1]) / "artifacts")._client
assert "mlflow" in sys.modules
assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
