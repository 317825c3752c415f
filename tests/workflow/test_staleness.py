"""What Dagster calls stale after a change, and what it builds again by itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import dagster as dg

from dsel_assets.assets.declared import declare
from dsel_assets.build import build
from dsel_assets.runner import resources, run

SQL = Path(__file__).parents[2] / "dbt_like_sql"


def definitions(task: Any, sql: Path = SQL) -> dg.Definitions:
    return dg.Definitions.merge(
        build(task, sql), dg.Definitions(resources=resources(), executor=dg.in_process_executor)
    )


def stale(task: Any, instance: Any) -> set[str]:
    """Assets, with their partition, that Dagster's page shows as stale."""
    from dagster._core.definitions.data_version import CachingStaleStatusResolver
    from dagster._core.loader import LoadingContextForTest

    graph = definitions(task).resolve_asset_graph()
    resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
    names = [(name, p) for name in ("subsets", "checkpoints") for p in task.strategies.chosen()]
    found = [*names, ("verdict", None), ("pool", "a"), ("sketches", "a"), ("leaderboard", None)]
    return {
        name if partition is None else f"{name} {partition}"
        for name, partition in found
        if resolver.get_status(dg.AssetKey([task.name, name]), partition).value == "STALE"
    }


def test_a_setting_makes_only_its_strategy_stale(ran: Any, instance: Any) -> None:
    task = ran.task()
    assert declare(task, instance) == [] and stale(task, instance) == set()
    task = ran.task(strategies={"itl": {"noise": 0.5}})
    assert declare(task, instance) == ["settings itl"] and declare(task, instance) == []
    assert stale(task, instance) == {"subsets itl"}
    run(task, instance)
    assert stale(task, instance) == set()
    task = ran.task(strategies={"itl": {"noise": 0.5}}, finetune={"steps": 21})
    assert declare(task, instance) == ["training"]
    assert stale(task, instance) == {f"checkpoints {name}" for name in task.strategies.chosen()}
    task = ran.task(strategies={"itl": {"noise": 0.5}}, promote={"confidence": 0.9})
    assert declare(task, instance) == ["training", "rule"]
    assert stale(task, instance) == {"verdict"}


def test_an_edited_model_is_built_again_with_those_that_read_it(
    ran: Any, instance: Any, tmp_path: Path
) -> None:
    task = ran.task()
    sql = tmp_path / "sql"
    shutil.copytree(SQL, sql)
    first = dg.evaluate_automation_conditions(definitions(task, sql), instance)
    assert first.total_requested == 0
    chosen = sql / "staging" / "chosen.sql"
    chosen.write_text("-- a comment changes nothing\n" + chosen.read_text())
    second = dg.evaluate_automation_conditions(
        definitions(task, sql), instance, cursor=first.cursor
    )
    assert second.total_requested == 0
    chosen.write_text(chosen.read_text().replace("e.rank,\n", "e.rank + 0 as rank,\n"))
    third = dg.evaluate_automation_conditions(
        definitions(task, sql), instance, cursor=second.cursor
    )
    asked = {
        key.path[-1]
        for key in definitions(task, sql).resolve_asset_graph().get_all_asset_keys()
        if third.get_num_requested(key)
    }
    assert {"chosen", "churn", "coverage", "overlap"} <= asked
    assert not asked & {"candidates", "leaderboard", "cost", "verdict"}
    again = dg.evaluate_automation_conditions(definitions(task, sql), instance, cursor=third.cursor)
    assert again.total_requested == 0
