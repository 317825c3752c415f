from __future__ import annotations

import shutil
from typing import Any

import pytest

from dsel_assets.resources.store import StoreError
from dsel_assets.steps.arrivals import landed, register
from dsel_assets.steps.cells import cells, missing_strategies
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.loading import load_pool, pool_rows
from dsel_assets.steps.pool import ingest
from dsel_assets.steps.sketches import sketch

Identities = dict[tuple[str, int, int], dict[str, str]]


def arrive(ws: Any, *keys: str) -> None:
    for file in landed(ws):
        register(ws, file)
    for key in keys:
        sketch(ws, ingest(ws, key))


def identities(ws: Any) -> Identities:
    generation = current_generation(ws)
    return {(c.strategy, c.budget, c.seed): c.identities for c in cells(ws, generation)}


def differ(old: Identities, new: Identities, kind: str) -> set[str]:
    """Strategies of which a common cell has another identity."""
    return {place[0] for place in old.keys() & new.keys() if old[place][kind] != new[place][kind]}


def test_numbers_count_up_and_stay(lab: Any) -> None:
    ws = lab.workspace()
    with pytest.raises(StoreError, match="no arrival is sketched yet"):
        current_generation(ws)
    arrive(ws, "b")
    first = current_generation(ws)
    assert first.number == 1 and [m.arrival for m in first.members] == ["b"]
    assert current_generation(ws) == first
    arrive(ws, "a")
    second = current_generation(ws)
    assert second.number == 2 and [m.arrival for m in second.members] == ["a", "b"]
    assert current_generation(lab.workspace()) == second


def test_the_order_of_arrival_does_not_matter(lab: Any) -> None:
    ws, found = lab.workspace(), []
    for keys in (("a", "b"), ("b", "a")):
        arrive(ws, *keys)
        found.append((current_generation(ws).identity, load_pool(ws, current_generation(ws))))
        shutil.rmtree(lab.home)
    assert found[0][0] == found[1][0]
    assert found[0][1].ids.tolist() == found[1][1].ids.tolist()


def test_another_space_is_another_generation(done: Any) -> None:
    ws = done.workspace(sketch={"seed": 1})
    with pytest.raises(StoreError, match="arrival a was ingested under other settings"):
        current_generation(ws)
    arrive(ws, "a", "b")
    assert current_generation(ws).number == 2
    assert current_generation(done.workspace()).number == 1


def test_rows_that_come_again_count_once(lab: Any) -> None:
    lab.land("c.jsonl", lab.rows(150, 180))
    ws = lab.workspace()
    arrive(ws, "a", "b", "c")
    there = pool_rows(ws, current_generation(ws))
    found = len(there.examples), len(there.duplicates), len(there.conflicts)
    assert found == (120, 30, 0)


def test_a_setting_changes_only_its_strategy(done: Any) -> None:
    before = identities(done.workspace())
    assert len(before) == 7 * 2 * 2
    for strategy, change in {
        "skmm": {"c": 0.99},
        "bads": {"beta": 0.3},
        "itl": {"form": "library"},
        "gradmatch": {"how": "trak"},
    }.items():
        after = identities(done.workspace(strategies={strategy: change}))
        for kind in ("subsets", "checkpoints", "metrics"):
            assert differ(before, after, kind) == {strategy}


def test_another_seed_or_budget_keeps_what_there_is(done: Any) -> None:
    before = identities(done.workspace())
    for ws in (done.workspace(seeds=3), done.workspace(budgets=[5, 10, 20])):
        after = identities(ws)
        assert len(after) == 42
        assert before.items() <= after.items()
        missing = missing_strategies(ws, current_generation(ws))
        # full and target_only do not look at the budget
        assert {"random", "skmm", "bads", "itl", "gradmatch"} <= missing.keys()


def test_finetuning_otherwise_keeps_the_selections(done: Any) -> None:
    before = identities(done.workspace())
    after = identities(done.workspace(finetune={"steps": 21}))
    assert differ(before, after, "subsets") == set()
    assert differ(before, after, "checkpoints") == {place[0] for place in before}


def test_promotion_and_schedule_change_no_cell(done: Any) -> None:
    before = identities(done.workspace())
    assert before == identities(done.workspace(promote={"budget": 5}, schedule="0 7 * * 1"))
    assert before == identities(done.workspace(gradients={"block": 7}))


def test_another_target_changes_who_reads_it(done: Any) -> None:
    from dsel_assets.steps.pool import evaluation_set

    before = identities(done.workspace())
    (done.folder / "test.parquet").unlink()
    source = done.folder / "test.jsonl"
    done.land("../test.jsonl", done.rows(51, 90))
    ws = done.workspace(test={"source": str(source)})
    arrive(ws, "a", "b")
    after = identities(ws)
    assert evaluation_set(ws, "test").manifest["rows"] == 39
    # the leak guard read another test set, so all arrivals were looked at again
    assert differ(before, after, "metrics") == {place[0] for place in before}


def test_cells_that_do_not_look_at_a_budget_share_a_selection(done: Any) -> None:
    found = identities(done.workspace())
    distinct = {
        strategy: len({cell["subsets"] for place, cell in found.items() if place[0] == strategy})
        for strategy in ("random", "full", "target_only", "itl", "gradmatch")
    }
    assert distinct == {"random": 4, "full": 1, "target_only": 1, "itl": 2, "gradmatch": 2}


def test_nothing_is_missing_once_all_has_run(done: Any) -> None:
    ws = done.workspace()
    generation = current_generation(ws)
    assert missing_strategies(ws, generation) == {}
    cell = next(iter(cells(ws, generation, "itl")))
    shutil.rmtree(ws.store.get("tiny", "metrics", cell.metric).path)
    assert missing_strategies(ws, generation).keys() == {"itl"}


def test_two_tasks_of_one_home_do_not_meet(done: Any) -> None:
    ws = done.workspace("other")
    with pytest.raises(StoreError, match="other: no arrival is sketched"):
        current_generation(ws)
    arrive(ws, "a")
    assert current_generation(ws).number == 1
    assert len(current_generation(done.workspace()).members) == 2
