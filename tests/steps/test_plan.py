"""What is planned: only what is missing, in the right numbers; and what it took."""

from __future__ import annotations

import gzip
import shutil
from dataclasses import asdict
from typing import Any

import pytest

from dsel_assets.pipeline import run
from dsel_assets.resources.store import StoreError
from dsel_assets.steps.cells import cells
from dsel_assets.steps.doctor import examine
from dsel_assets.steps.estimate import BEFORE, _line
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.plan import last_plan, plan

LEAN = {name: None for name in ("bads", "gradmatch", "target_only")}


def test_everything_is_planned_then_made_then_nothing_is(lab: Any) -> None:
    ws = lab.workspace(strategies=LEAN)
    with pytest.raises(StoreError, match="no plan yet"):
        last_plan(ws)
    found = plan(ws)
    assert not (lab.home / "store" / "tiny" / "pool").exists()
    missing = {stage.name: stage.missing for stage in found.stages}
    assert missing == {
        "ingest": 120,
        "sketch": 120,
        "select random": 4,
        "select full": 1,
        "select skmm": 4,
        "select itl": 2,
        "finetune": 14,
        "evaluate": 14,
    }
    assert found.rows == 120 and found.memory_mib > 100
    assert all(stage.seconds > 0 and stage.mib > 0 for stage in found.stages)
    assert all(stage.took_seconds is None for stage in last_plan(ws).stages)
    run(ws)
    made = last_plan(ws)
    assert made.number == 1 and made.took_memory_mib is not None
    for stage in made.stages:
        assert stage.took_seconds is not None and stage.took_mib is not None
        if stage.name in ("ingest", "sketch", "finetune", "evaluate"):
            assert stage.took_mib / 3 < stage.mib < stage.took_mib * 3, asdict(stage)
    again = plan(ws)
    assert again.number == 2 and again.stages == []
    changed = lab.workspace(strategies=LEAN | {"itl": {"noise": 0.5}})
    assert {stage.name: stage.missing for stage in plan(changed).stages} == {
        "select itl": 2,
        "finetune": 4,
        "evaluate": 4,
    }
    assert list(examine(ws)) == []


def test_broken_files_and_copies_are_not_planned_for(lab: Any) -> None:
    path = lab.land("z.parquet", lab.rows(220, 250))
    path.write_bytes(path.read_bytes()[:-100])
    packed = gzip.compress((lab.landing / "b.jsonl").read_bytes())
    (lab.landing / "z.jsonl.gz").write_bytes(packed[:-20])
    shutil.copy(lab.landing / "a.parquet", lab.landing / "y.parquet")
    (lab.landing / "x.jsonl").touch(), (lab.landing / "w.jsonl").touch()
    [ingest, *_] = plan(lab.workspace(strategies=LEAN)).stages
    # nothing is known yet, so that the copy counts
    assert ingest.missing == 180


def test_nothing_has_landed(lab: Any) -> None:
    for path in lab.landing.iterdir():
        path.unlink()
    with pytest.raises(StoreError, match="nothing usable has landed"):
        plan(lab.workspace())


def test_lines() -> None:
    assert _line(1, 3, 2, 5, 10) == pytest.approx(21)
    assert _line(1, 3, 2, 5, 0) == 0
    assert _line(1, 5, 2, 3, 10) == pytest.approx(15)  # noise: in proportion
    assert _line(2, 1, 4, 4, 8) == pytest.approx(12)  # no negative fixed part


def test_what_was_done_before_needs_no_probe(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ws = lab.workspace(strategies=LEAN)
    run(ws)
    lab.land("c.jsonl", lab.rows(220, 226))
    monkeypatch.setattr("dsel_assets.steps.estimate.ROWS", (20, 80))
    monkeypatch.setattr("dsel_assets.steps.estimate.probes", lambda *_: pytest.fail("a probe ran"))
    found = plan(ws)
    assert {stage.source for stage in found.stages} == {BEFORE}
    stages = {stage.name: stage for stage in found.stages}
    pools = [ws.store.entry("tiny", "pool", m.pool) for m in current_generation(ws).members]
    seconds = sum(pool.manifest["seconds"] for pool in pools if pool)
    assert stages["ingest"].seconds == pytest.approx(seconds * 6 / 120)
    # it goes on: of 126 examples it looks at its 20 or 40 and the 6 new ones, as before at 120
    expected = 0.0
    for cell in cells(ws, current_generation(ws), "itl"):
        if cell.seed == 0:
            before = ws.store.get("tiny", "subsets", cell.selection).manifest
            expected += before["seconds"] * (before["rows"] + 6) / 120
    assert stages["select itl"].seconds == pytest.approx(expected)
    with pytest.raises(pytest.fail.Exception, match="a probe ran"):
        plan(lab.workspace(strategies=LEAN | {"itl": {"noise": 0.5}}))


def test_a_new_seed_begins_cold(lab: Any) -> None:
    ws = lab.workspace(strategies=LEAN)
    run(ws)
    more = lab.workspace(strategies=LEAN, seeds=3)
    stages = {stage.name: stage for stage in plan(more).stages}
    every = cells(ws, current_generation(ws), "skmm")
    first = [ws.store.get("tiny", "subsets", c.selection).manifest for c in every if c.seed == 0]
    assert stages["select skmm"].missing == 2
    assert stages["select skmm"].seconds == pytest.approx(sum(made["seconds"] for made in first))
