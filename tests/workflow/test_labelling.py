"""The loop that asks for labels, as Dagster runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dsel_assets import runner
from dsel_assets.automation import requests_to_label
from dsel_assets.build import build
from dsel_assets.resources.store import StoreError
from dsel_assets.steps.labelling import standing
from tests.steps.test_labelling import BATCH, answer, loop

SQL = Path(__file__).parents[2] / "dbt_like_sql"


def asked(ws: Any) -> list[Any]:
    return list(requests_to_label(ws.task, ws.home))


def test_it_asks_waits_and_asks_again(lab: Any, instance: Any) -> None:
    ws = loop(lab)
    [request] = asked(ws)
    assert isinstance(request, dg.RunRequest) and request.run_key.startswith("round-1-")
    assert asked(ws)[0].run_key == request.run_key
    runner.initialise(instance)
    said = runner.label(ws.task, instance)["said"]
    assert f"round 1: {BATCH} rows wait for their label, 0 have theirs" in said
    assert str(lab.landing) in said
    [skipped] = asked(ws)
    assert isinstance(skipped, dg.SkipReason) and "8 rows wait" in str(skipped.skip_message)
    answer(lab, ws, "labelled.parquet")
    assert asked(ws)[0].run_key.startswith("round-2-")
    assert f"round 2: {BATCH} rows wait" in runner.label(ws.task, instance)["said"]

    key = dg.AssetKey(["tiny", "label_requests"])
    last = instance.fetch_materializations(key, limit=1).records[0].asset_materialization
    assert last.metadata["waiting"].value == BATCH == last.metadata["labelled"].value
    waiting = standing(ws).waiting
    assert all(name in last.metadata["waiting_rows"].value for name in waiting)
    assert "data:image/png" in last.metadata["progress"].value


def test_a_task_that_does_not_ask_has_nothing_of_it(lab: Any, instance: Any) -> None:
    defs = build(lab.task(), SQL)
    names = {job.name for job in defs.jobs or []}
    assert "tiny_label" not in names
    with pytest.raises(StoreError, match="no `active` section"):
        runner.label(lab.task(), instance)


def test_the_sensor_and_the_schedule_are_declared(lab: Any) -> None:
    task = loop(lab, schedule="0 7 * * *").task
    defs = dg.Definitions.merge(build(task, SQL), dg.Definitions(resources=runner.resources()))
    dg.Definitions.validate_loadable(defs)
    assert defs.resolve_schedule_def("tiny_ask").cron_schedule == "0 7 * * *"
    assert defs.resolve_sensor_def("tiny_label_after_ingest_success")
