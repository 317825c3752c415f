"""After an arrival a strategy goes on from its last selection, and asking again changes nothing."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest

from dsel_assets.pipeline import run
from dsel_assets.resources.store import StoreError
from dsel_assets.steps.cells import cells
from dsel_assets.steps.generation import current_generation, generation_at
from dsel_assets.steps.subsets import select
from dsel_assets.steps.warm import STATE, load_state, save_state
from tests.steps.test_resume import digests


def warms(ws: Any, strategy: str) -> dict[tuple[int, int], str]:
    found = cells(ws, current_generation(ws), strategy)
    return {(cell.budget, cell.seed): cell.selection["warm"] for cell in found}


def arrive(lab: Any, ws: Any) -> None:
    lab.land("c.parquet", lab.rows(220, 280))
    run(ws)


def test_the_first_generation_is_cold(done: Any) -> None:
    ws = done.workspace()
    assert set(warms(ws, "bads").values()) == set(warms(ws, "skmm").values()) == {"cold"}


def test_the_next_one_goes_on_where_the_strategy_can(done: Any) -> None:
    ws = done.workspace()
    arrive(done, ws)
    first = generation_at(ws, 1)
    for strategy in ("bads", "skmm"):
        for cell in cells(ws, first, strategy):
            before = cell.identities["subsets"]
            assert warms(ws, strategy)[cell.budget, cell.seed] == before
    for entry in select(ws, current_generation(ws), "bads"):
        assert entry.summary["steps"] == 10  # a quarter of the chain's
    for entry in select(ws, current_generation(ws), "skmm"):
        assert "kept" in entry.summary
    for strategy in ("random", "itl", "gradmatch"):
        assert set(warms(ws, strategy).values()) == {"cold"}


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
    from dsel_assets.steps.arrivals import landed, register
    from dsel_assets.steps.pool import ingest
    from dsel_assets.steps.sketches import sketch
    from dsel_assets.steps.status import status

    ws = done.workspace()
    done.land("c.parquet", done.rows(220, 280))
    for file in landed(ws):
        register(ws, file)
    sketch(ws, ingest(ws, "c"))
    assert status(ws)["generation"] == 2
    folder = done.home / "store" / "tiny"
    assert len(list((folder / "generations").glob("*.json"))) == 1
    assert not list((folder / "warm").glob("*/000002-*"))
    select(ws, current_generation(ws), "bads")
    assert len(list((folder / "warm").glob("bads-*/000002-*"))) == 1
