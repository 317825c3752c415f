"""After an arrival a strategy goes on from its last selection, and asking again changes nothing."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dsel_assets.pipeline import run
from dsel_assets.resources.store import StoreError
from dsel_assets.steps import loading
from dsel_assets.steps.arrivals import arrivals, landed, register
from dsel_assets.steps.cells import cells
from dsel_assets.steps.chosen import chosen_ids
from dsel_assets.steps.churn import diff
from dsel_assets.steps.generation import current_generation, generation_at
from dsel_assets.steps.loading import pool_rows
from dsel_assets.steps.pool import ingest
from dsel_assets.steps.sketches import sketch
from dsel_assets.steps.subsets import select
from dsel_assets.steps.warm import COLD, STATE, arrivals_seen, load_state, save_state
from tests.steps.test_resume import digests

FOLLOWING = ("skmm", "itl", "gradmatch")


def warms(ws: Any, strategy: str) -> dict[tuple[int, int], str]:
    found = cells(ws, current_generation(ws), strategy)
    return {(cell.budget, cell.seed): cell.selection["warm"] for cell in found}


def arrive(lab: Any, ws: Any, start: int = 220, stop: int = 280) -> None:
    lab.land(f"from{start}.parquet", lab.rows(start, stop))
    run(ws)


def test_the_first_generation_is_cold(done: Any) -> None:
    ws = done.workspace()
    for strategy in ("bads", "skmm", "itl", "gradmatch"):
        assert set(warms(ws, strategy).values()) == {"cold"}


def test_the_next_one_goes_on_where_the_strategy_can(done: Any) -> None:
    ws = done.workspace()
    arrive(done, ws)
    for cell in cells(ws, generation_at(ws, 1), "bads"):
        assert warms(ws, "bads")[cell.budget, cell.seed] == cell.identities["subsets"]
    for entry in select(ws, current_generation(ws), "bads"):
        assert entry.summary["steps"] == 10  # a quarter of the chain's
    assert set(warms(ws, "random").values()) == {"cold"}


# Strategies that look only at what was chosen and what has come


def test_a_small_arrival_is_all_that_is_read(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ws, read = done.workspace(), []
    done.land("c.parquet", done.rows(220, 225))
    prepare(ws)
    gathered = loading._gathered

    def noted(key: Any, name: str, rows: Any) -> Any:
        read.append(len(rows))
        return gathered(key, name, rows)

    monkeypatch.setattr(loading, "_gathered", noted)
    pool = pool_rows(ws, current_generation(ws))
    new = set(pool.examples.ids[pool.member == 2].tolist())
    for strategy in FOLLOWING:
        before = [cell.identities["subsets"] for cell in cells(ws, generation_at(ws, 1), strategy)]
        entries = select(ws, current_generation(ws), strategy)
        assert list(warms(ws, strategy).values()) == before
        for entry in entries:
            assert entry.summary["looked_at"] == 120
            origin = ws.store.entry("tiny", "subsets", entry.manifest["fields"]["warm"])
            assert set(chosen_ids(entry)) <= set(chosen_ids(origin)) | new
    assert 0 < max(read) <= 10 + 5


def test_a_tenth_more_and_everything_is_looked_at_again(done: Any) -> None:
    ws = done.workspace()
    arrive(done, ws, 220, 226)
    arrive(done, ws, 226, 232)
    for strategy in FOLLOWING:
        assert COLD not in warms(ws, strategy).values()
    arrive(done, ws, 232, 233)
    for strategy in FOLLOWING:
        assert set(warms(ws, strategy).values()) == {COLD}
        for entry in select(ws, current_generation(ws), strategy):
            assert entry.summary["looked_at"] == 133
    arrive(done, ws, 233, 234)
    for strategy in FOLLOWING:
        assert COLD not in warms(ws, strategy).values()


def test_an_arrival_without_new_rows_changes_no_choice(done: Any) -> None:
    ws = done.workspace()
    before = {s: [chosen_ids(e) for e in select(ws, current_generation(ws), s)] for s in FOLLOWING}
    arrive(done, ws, 120, 130)
    assert current_generation(ws).number == 2
    for strategy in FOLLOWING:
        entries = select(ws, current_generation(ws), strategy)
        assert [sorted(chosen_ids(e)) for e in entries] == [sorted(ids) for ids in before[strategy]]
        assert COLD not in warms(ws, strategy).values()


def test_one_that_was_let_in_later_makes_it_begin_anew(done: Any) -> None:
    """What a selection saw must be how this pool begins."""
    ws = done.workspace()
    arrive(done, ws, 220, 225)
    generation = current_generation(ws)
    entry = select(ws, generation, "itl")[0]
    assert arrivals_seen(ws, generation, entry) == 3
    swapped = replace(generation, members=(*generation.members[1:], generation.members[0]))
    assert arrivals_seen(ws, swapped, entry) is None
    assert arrivals_seen(ws, replace(generation, members=generation.members[:2]), entry) is None


def test_under_quotas_everything_is_looked_at(done: Any) -> None:
    ws = done.workspace(quotas={"source": {"vendor0": 0.5}})
    run(ws)
    arrive(done, ws, 220, 225)
    for strategy in FOLLOWING:
        assert set(warms(ws, strategy).values()) == {COLD}


def test_churn_holds_it_against_a_cold_choice(done: Any) -> None:
    ws = done.workspace()
    arrive(done, ws, 220, 225)
    rows = [row for row in diff(ws, 1, 2, cold=True) if row["strategy"] in FOLLOWING]
    assert len(rows) == 3 * 4
    for row in rows:
        if row["strategy"] == "skmm":  # another draw, as good
            assert row["objective"] <= 1.2 * row["objective_cold"]
        else:
            assert row["shared_with_cold"] >= (1 if row["strategy"] == "gradmatch" else 0.5)


def prepare(ws: Any) -> None:
    """Ingest and sketch what landed."""
    for file in landed(ws):
        register(ws, file)
    for known in arrivals(ws):
        sketch(ws, ingest(ws, known.key))


def test_asking_again_and_making_again_give_the_same(done: Any) -> None:
    ws = done.workspace()
    arrive(done, ws)
    decided, store = warms(ws, "bads"), done.home / "store" / "tiny"
    before = digests(store)
    for path in [
        store / "subsets" / cell.identities["subsets"]
        for cell in cells(ws, current_generation(ws), "bads")
    ]:
        shutil.rmtree(path)
    run(done.workspace())
    assert warms(done.workspace(), "bads") == decided
    assert digests(store) == before


def test_a_lost_origin_is_named(done: Any) -> None:
    ws = done.workspace()
    arrive(done, ws)
    [cell, *_] = cells(ws, current_generation(ws), "bads")
    for name in (cell.identities["subsets"], cell.selection["warm"]):
        shutil.rmtree(done.home / "store" / "tiny" / "subsets" / name)
    with pytest.raises(
        StoreError, match=r"from which this one goes on, is gone; .* reselect: cold"
    ):
        select(ws, current_generation(ws), "bads")


def test_other_settings_or_cold_begin_anew(done: Any) -> None:
    arrive(done, done.workspace())
    for changes in ({"reselect": "cold"}, {"strategies": {"bads": {"sigma": 0.06}}}):
        assert set(warms(done.workspace(**changes), "bads").values()) == {"cold"}
    more = warms(done.workspace(budgets=[5, 10, 15]), "bads")
    assert {budget for (budget, _), warm in more.items() if warm == "cold"} == {15}


def test_a_state_survives_a_file_without_pickle(tmp_path: Any) -> None:
    class Entry:
        def file(self, name: str) -> Any:
            return tmp_path / name

    state = {
        "ids": np.array(["a", "", "größer", "x" * 40]),
        "none": np.array([], np.str_),
        "weights": np.arange(4.0),
        "0.joint.fc.bias": np.float32([[1, 2]]),
        "count": np.array(3),
    }
    save_state(state, tmp_path / STATE)
    found = load_state(Entry())  # type: ignore[arg-type]
    assert found.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(found[name], value)


def test_looking_decides_nothing(done: Any) -> None:
    """Before a selection begins, what it goes on from is not settled, nor is its generation."""
    from dsel_assets.steps.status import status

    ws = done.workspace()
    done.land("c.parquet", done.rows(220, 280))
    prepare(ws)
    assert status(ws)["generation"] == 2
    folder = done.home / "store" / "tiny"
    assert len(list((folder / "generations").glob("*.json"))) == 1
    assert not list((folder / "warm").glob("*/000002-*"))
    select(ws, current_generation(ws), "bads")
    assert len(list((folder / "warm").glob("bads-*/000002-*"))) == 1
