from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dsel_assets.build import build
from dsel_assets.runner import resources
from dsel_assets.steps.arrivals import landed, register
from dsel_assets.steps.cells import cells
from dsel_assets.steps.chosen import beyond_chance
from dsel_assets.steps.generation import current_generation, members
from dsel_assets.steps.loading import load_pool

SQL = Path(__file__).parents[2] / "dbt_like_sql"


def execute(
    task: Any, instance: Any, job: str, partition: str | None = None, only: str | None = None
) -> Any:
    defs = dg.Definitions.merge(
        build(task, SQL), dg.Definitions(resources=resources(), executor=dg.in_process_executor)
    )
    instance.add_dynamic_partitions("tiny_arrivals", [partition] if job == "ingest" else [])
    return defs.resolve_job_def(f"tiny_{job}").execute_in_process(
        partition_key=partition,
        instance=instance,
        raise_on_error=False,
        asset_selection=[dg.AssetKey(["tiny", only])] if only else None,
    )


def register_all(lab: Any) -> None:
    for file in landed(lab.workspace()):
        register(lab.workspace(), file)


def checked(result: Any) -> dict[str, bool]:
    return {f.check_name: f.passed for f in result.get_asset_check_evaluations()}


def materialised(result: Any) -> set[str]:
    return {event.asset_key.path[-1] for event in result.get_asset_materialization_events()}


@pytest.fixture
def instance() -> Any:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["pool", "gradients", "sketches"])
def test_a_damaged_artifact_stops_the_selection(done: Any, instance: Any, kind: str) -> None:
    ws = done.workspace()
    entry = ws.store.entry("tiny", kind, getattr(current_generation(ws).members[0], kind))
    damage(entry.path / max(entry.manifest["files"]))
    result = execute(done.task(), instance, "select", "random")
    assert not result.success
    assert checked(result) == {"fit": False}
    assert materialised(result) == set()


@pytest.mark.parametrize("how", ["cut", "gone", "no manifest"])
def test_a_sketch_file_that_is_not_whole_stops_the_selection(
    done: Any, instance: Any, how: str
) -> None:
    ws = done.workspace()
    *_, (_, _, sketches) = members(ws, current_generation(ws))
    path = sketches.file("sketches.safetensors")
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-4])
    elif how == "gone":
        path.unlink()
    else:
        (sketches.path / "manifest.json").write_text("{")
    result = execute(done.task(), instance, "select", "random")
    assert not result.success and materialised(result) == set()


def test_a_whole_generation_fits(done: Any, instance: Any) -> None:
    result = execute(done.task(), instance, "select", "random")
    assert result.success and checked(result) == {"fit": True}
    assert materialised(result) == {"subsets", "checkpoints", "metrics"}


def test_duplicates_and_conflicts_across_arrivals_fit(lab: Any, instance: Any) -> None:
    lab.land("c.jsonl", lab.rows(150, 180))
    task = lab.task()
    register_all(lab)
    for key in ("a", "c"):
        assert execute(task, instance, "ingest", key).success
    result = execute(task, instance, "select", "full")
    assert result.success
    (evaluation,) = result.get_asset_check_evaluations()
    assert evaluation.metadata["duplicates"].value == 10


def test_missing_metrics_stop_the_verdict(done: Any, instance: Any) -> None:
    ws = done.workspace()
    shutil.rmtree(done.home / "store" / "tiny" / "verdict")
    cell = next(iter(cells(ws, current_generation(ws), "skmm")))
    shutil.rmtree(ws.store.get("tiny", "metrics", cell.metric).path)
    result = execute(done.task(), instance, "compare")
    assert not result.success
    assert checked(result)["complete"] is False
    assert materialised(result) == set()
    assert not (done.home / "store" / "tiny" / "verdict").exists()
    found = {e.check_name: e for e in result.get_asset_check_evaluations()}
    assert found["complete"].metadata["missing"].value == "skmm at 5, seed 0"


def test_all_metrics_give_a_verdict(done: Any, instance: Any) -> None:
    resources()["warehouse"].initialise()
    result = execute(done.task(), instance, "compare")
    assert result.success
    found = checked(result)
    found.pop("more_than_chance")  # of ten rows or so chance can't be told
    found.pop("weights_hold")  # nor can forty steps settle weights
    assert found.pop("complete") and all(found.values())
    assert {"verdict", "leaderboard", "budget_curve"} <= materialised(result)


def test_a_strategy_that_draws_like_chance_is_told(done: Any) -> None:
    ws = done.workspace()
    generation = current_generation(ws)
    rows = {(row["strategy"], row["budget"]): row for row in beyond_chance(ws, generation)}
    assert not {"random", "full", "target_only", "itl"} & {strategy for strategy, _ in rows}
    assert {"skmm", "bads"} <= {strategy for strategy, _ in rows}
    pool = len(load_pool(ws, generation))
    for (_, budget), row in rows.items():
        assert row["by_chance"] == pytest.approx(budget**2 / pool)
        assert 0 <= row["shared_by_two_seeds"] <= budget
        assert (row["uniform_as_good"] is None) == (row["strategy"] != "skmm")


def test_an_unreadable_arrival_is_not_differentiated(lab: Any, instance: Any) -> None:
    (lab.landing / "bad.parquet").write_bytes(b"PAR1 nothing PAR1")
    register_all(lab)
    result = execute(lab.task(), instance, "ingest", "bad")
    assert not result.success
    assert not checked(result)["usable"]
    assert not materialised(result) & {"gradients", "sketches", "hessian_spectrum"}


def test_leaks_are_a_warning(lab: Any, instance: Any) -> None:
    lab.land("c.jsonl", lab.rows(220, 250) + lab.rows(60, 62))
    register_all(lab)
    result = execute(lab.task(), instance, "ingest", "c")
    assert result.success
    assert checked(result)["no_leaks"] is False and checked(result)["usable"]


def test_sets_that_overlap_stop_everything(lab: Any, instance: Any) -> None:
    lab.land("../test.parquet", lab.rows(49, 90))
    register_all(lab)
    result = execute(lab.task(), instance, "ingest", "a")
    assert not result.success and checked(result) == {"apart": False, "no_near_copies": False}
    assert "pool" not in materialised(result)


@pytest.mark.parametrize("name", ["sketches", "gradients"])
def test_either_output_of_the_pass_alone(lab: Any, instance: Any, name: str) -> None:
    register_all(lab)
    result = execute(lab.task(), instance, "ingest", "a", only=name)
    assert result.success and materialised(result) == {name}


def distort(monkeypatch: Any) -> None:
    """An operator that is no isometry, such as one whose scale was forgotten."""
    from dsel_assets.sketching.countsketch import CountSketch

    partial = CountSketch._partial
    monkeypatch.setattr(CountSketch, "_partial", lambda self, x: 3 * partial(self, x))


def test_a_sketch_that_does_not_keep_its_promise_fails_the_arrival_and_the_selection(
    lab: Any, instance: Any, monkeypatch: Any
) -> None:
    distort(monkeypatch)
    task = lab.task(sketch={"kind": "countsketch"})
    register_all(lab)
    result = execute(task, instance, "ingest", "a")
    assert not result.success and checked(result)["keeps_inner_products"] is False
    result = execute(task, instance, "select", "random")
    assert not result.success and checked(result) == {"fit": False}
    (evaluation,) = result.get_asset_check_evaluations()
    assert "of the inner products lie within" in evaluation.metadata["distorted"].value
    assert materialised(result) == set()


@pytest.mark.parametrize("kind", ["countsketch", "sjlt", "srht", "affd"])
def test_the_safe_sketches_keep_theirs(lab: Any, instance: Any, kind: str) -> None:
    register_all(lab)
    result = execute(lab.task(sketch={"kind": kind}), instance, "ingest", "a")
    assert result.success and checked(result)["keeps_inner_products"]


def test_weights_that_collapsed_are_a_warning(lab: Any, instance: Any) -> None:
    from dsel_assets.pipeline import run

    changes = {"strategies": {"bads": {"sigma": 50.0, "steps": 400}}}
    run(lab.workspace(**changes))
    resources()["warehouse"].initialise()
    result = execute(lab.task(**changes), instance, "compare")
    assert result.success  # it warns, it does not stop
    [check] = [e for e in result.get_asset_check_evaluations() if e.check_name == "weights_hold"]
    assert not check.passed and check.severity == dg.AssetCheckSeverity.WARN
    assert "bads at 5: collapsed in 2 of 2 seeds" in check.metadata["alarms"].value
    assert "lower sigma" in check.metadata["what_to_do"].value
