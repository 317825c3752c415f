"""Several processes at the same store at once: one result, and readers never see half of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dsel_assets.pipeline import run
from dsel_assets.resources.store import MANIFEST, StoreError
from dsel_assets.resources.warehouse import Warehouse
from dsel_assets.runner import initialise
from dsel_assets.sql import load_models
from dsel_assets.steps.arrivals import arrivals, landed, register
from dsel_assets.steps.catalog import tables, write_catalog
from dsel_assets.steps.cells import missing_strategies
from dsel_assets.steps.champion import PROMOTED, champion, crown, history, rollback
from dsel_assets.steps.checkpoints import finetune
from dsel_assets.steps.doctor import examine
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.loading import pool_rows
from dsel_assets.steps.metrics import evaluate
from dsel_assets.steps.pool import ingest
from dsel_assets.steps.sketches import sketch
from dsel_assets.steps.status import status
from dsel_assets.steps.subsets import select
from dsel_assets.steps.verdict import compare, promote
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import load_task
from tests.steps.test_resume import digests

SQL = Path(__file__).parents[2] / "dbt_like_sql"
PROCESSES = 3
LONGEST = 300  # seconds that anything here may take


def begin(barrier: Any) -> None:
    """What a worker is from the start: single-threaded, and ready to wait for the others."""
    os.environ["DSEL_WORKERS"] = "1"
    torch.set_num_threads(1)
    globals()["BARRIER"] = barrier


def together(function: Callable[..., Any], given: tuple[Any, ...]) -> Any:
    globals()["BARRIER"].wait()
    return function(*given)


AtOnce = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def at_once() -> Iterator[AtOnce]:
    """Calls functions in as many processes, the last one in this, all from the same moment on."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(PROCESSES, timeout=LONGEST)
    with ProcessPoolExecutor(PROCESSES - 1, context, begin, (barrier,)) as pool:

        def call(*calls: tuple[Any, ...]) -> list[Any]:
            assert len(calls) == PROCESSES
            futures = [pool.submit(together, one, given) for one, *given in calls[:-1]]
            function, *given = calls[-1]
            barrier.wait()
            last = function(*given)
            return [*(future.result(LONGEST) for future in futures), last]

        yield call


def workspace(folder: Path) -> Any:
    return Workspace(load_task(folder / "tiny.yaml"), folder / "home")


def leftovers(home: Path) -> list[str]:
    return [str(path) for path in home.rglob("*.part*")]


# The same re-selection


def reselect(folder: Path) -> tuple[int, str]:
    """All that `pipeline.run` does, up to the verdict."""
    ws = workspace(folder)
    for file in landed(ws):
        register(ws, file)
    for known in arrivals(ws):
        sketch(ws, ingest(ws, known.key))
    generation = current_generation(ws)
    for strategy in ws.task.strategies.chosen():
        select(ws, generation, strategy)
        finetune(ws, generation, strategy)
        evaluate(ws, generation, strategy)
    decided = compare(ws, generation)
    promote(ws, generation, decided)
    (folder / f"ended-{os.getpid()}").touch()
    return generation.number, decided.identity


def working(folder: Path, writers: int) -> Iterator[None]:
    """Until so many others have ended."""
    deadline = time.monotonic() + LONGEST / 2
    while len(list(folder.glob("ended-*"))) < writers and time.monotonic() < deadline:
        yield
        time.sleep(0.1)


def look(folder: Path, writers: int) -> list[tuple[int, bool]]:
    """Status and doctor, again and again while others write; what they saw."""
    ws, seen = workspace(folder), []
    for _ in working(folder, writers):
        found = status(ws)
        assert found["held_back"] == {} and "why" not in found, found
        assert found["verdicts"] is None or not found["to_select"], found
        wrong = [one for one in examine(ws) if "MiB of disk" not in one.problem]
        assert wrong == [], wrong
        seen.append((found["generation"], found["verdicts"] is not None))
    return seen


def test_two_that_select_the_same_make_one_store(done: Any, at_once: AtOnce) -> None:
    """While a third looks: it sees the generation before or the one after, and no damage."""
    dropped = dict.fromkeys(("target_only", "skmm", "gradmatch"))
    ws = done.workspace(strategies=dropped, budgets=[10])
    run(ws)
    done.land("c.jsonl", done.rows(220, 250))
    one, two, seen = at_once(
        (reselect, done.folder), (reselect, done.folder), (look, done.folder, 2)
    )
    assert one == two and one[0] == 2
    assert missing_strategies(ws, current_generation(ws)) == {}
    assert leftovers(done.home) == [] and list(examine(ws)) == []
    store = done.home / "store" / "tiny"
    assert not list(store.glob("scratch/*/*"))
    assert len(list(store.glob("generations/*.json"))) == 2
    order = [(1, True), (2, False), (2, True)]
    assert len(seen) > 1 and seen == sorted(seen, key=order.index)
    before = digests(store)
    assert reselect(done.folder) == one and digests(store) == before


def catalog(folder: Path, times: int) -> None:
    ws = workspace(folder)
    generation = current_generation(ws)
    decided = compare(ws, generation)
    for _ in range(times):
        write_catalog(ws, generation, decided)
        assert all(path.is_file() for paths in tables(ws.home).values() for path in paths)


def test_several_write_the_catalog_of_one_generation(done: Any, at_once: AtOnce) -> None:
    done.task()
    at_once(*[(catalog, done.folder, 30)] * PROCESSES)
    assert leftovers(done.home) == []


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DSEL_WORKERS": "1", "DAGSTER_DISABLE_TELEMETRY": "true"}
FEW = {"strategies": dict.fromkeys(("target_only", "skmm", "bads", "itl", "gradmatch"))}


def dsel(lab: Any, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "dsel_assets.cli", *words, str(lab.folder / "tiny.yaml")],
        env=os.environ | ENVIRONMENT | {"DAGSTER_HOME": str(lab.folder / "dagster")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_commands_at_once_both_succeed(lab: Any, instance: Any) -> None:
    changes = FEW | {"budgets": [5], "promote": {"budget": 5}}
    (lab.landing / "b.jsonl").unlink()
    lab.task(**changes)
    initialise(instance)
    both = [dsel(lab, "run"), dsel(lab, "run")]
    said = [process.communicate(timeout=LONGEST) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    ws = lab.workspace(**changes)
    assert current_generation(ws).number == 1 and list(examine(ws)) == []
    assert leftovers(lab.home) == []
    with Warehouse(lab.home / "warehouse.duckdb").connect(read_only=True) as connection:
        rows = connection.execute("select strategy, seeds from leaderboard").fetchall()
    assert sorted(rows) == [("full", 2), ("random", 2)]


# The warehouse


def rewrite(folder: Path, times: int) -> int:
    """Views and tables of one generation, then of two, and so on."""
    warehouse, models = Warehouse(folder / "home" / "warehouse.duckdb"), load_models(SQL)
    both = tables(folder / "home")
    first = {
        name: [path for path in paths if "/00002/" not in str(path)] for name, paths in both.items()
    }
    for turn in range(times):
        warehouse.publish_views(both if turn % 2 else first)
        for model in models:
            if model.name in ("candidates", "leaderboard", "cost"):
                assert warehouse.build(model.name, model.text, {}).published
    (folder / f"ended-{os.getpid()}").touch()
    return times


def read(folder: Path, writers: int) -> list[tuple[tuple[int, int], ...]]:
    """What a person with a read-only connection sees of the tables meanwhile."""
    warehouse, seen = Warehouse(folder / "home" / "warehouse.duckdb"), []
    for _ in working(folder, writers):
        for table in ("leaderboard", "cost"):
            with warehouse.connect(read_only=True) as connection:
                query = f"select generation, count(*) from {table} group by 1 order by 1"
                seen.append(tuple(connection.execute(query).fetchall()))
    return seen


def test_who_reads_the_warehouse_sees_whole_tables(done: Any, at_once: AtOnce) -> None:
    """Of one generation or of two, while two processes publish views and tables."""
    done.land("c.jsonl", done.rows(220, 250))
    run(done.workspace(**FEW))
    Warehouse(done.home / "warehouse.duckdb").initialise()
    rewrite(done.folder, 2)
    for ended in done.folder.glob("ended-*"):
        ended.unlink()
    *_, seen = at_once((rewrite, done.folder, 6), (rewrite, done.folder, 6), (read, done.folder, 2))
    assert len(seen) >= 2 and set(seen) <= {((1, 14),), ((1, 14), (2, 4))}


# Arrivals


def ingest_all(folder: Path, turn: int) -> tuple[list[str], list[int], str]:
    """What this process registered, the generations it saw, and the last one."""
    ws = workspace(folder)
    files = landed(ws)
    entered = [register(ws, file) for file in files[turn:] + files[:turn]]
    known, numbers = arrivals(ws), []
    for one in known[turn:] + known[:turn]:
        sketch(ws, ingest(ws, one.key))
        numbers.append(current_generation(ws).number)
    return [one.key for one in entered if one], numbers, current_generation(ws).identity


def test_twenty_arrivals_and_three_that_ingest_them(lab: Any, at_once: AtOnce) -> None:
    for path in lab.landing.iterdir():
        path.unlink()
    for i in range(20):
        lab.land(f"{i:02d}.jsonl", lab.rows(100 + 5 * i, 105 + 5 * i))
    ws = lab.workspace()
    found = at_once(*((ingest_all, lab.folder, 7 * turn) for turn in range(PROCESSES)))
    entered = [key for keys, _, _ in found for key in keys]
    assert sorted(entered) == [f"{i:02d}" for i in range(20)]
    assert [known.number for known in arrivals(ws)] == list(range(1, 21))
    generation = current_generation(ws)
    assert {identity for *_, identity in found} == {generation.identity}
    assert len(generation.members) == 20
    there = pool_rows(ws, generation)
    assert len(there.examples) == 100 and not len(there.duplicates)
    numbers = [
        json.loads(path.read_text())["number"]
        for path in ws.store.folder("tiny", "generations").glob("*.json")
    ]
    assert sorted(numbers) == list(range(1, len(numbers) + 1)) and max(numbers) == generation.number
    for kind in ("pool", "gradients", "sketches"):
        assert len(list((lab.home / "store" / "tiny" / kind).glob(f"*/{MANIFEST}"))) == 20
    assert all(seen == sorted(seen) for _, seen, _ in found)
    assert leftovers(lab.home) == []


# The champion


def move(folder: Path, name: str, times: int) -> int:
    """Promotions under a name of one's own, each followed by a rollback but the third ones."""
    ws, made = workspace(folder), 0
    for turn in range(times):
        chosen = {
            "strategy": name,
            "budget": 10,
            "generation": 1,
            "selection": f"{name}{turn}",
            "checkpoint": f"{name}{turn}",
            "evidence": {"diff": 0.1},
            "verdict": f"{name}{turn}",
        }
        crown(ws, chosen, name)
        made += 1
        if turn % 3:
            try:
                rollback(ws, name)
            except StoreError:  # others were faster
                continue
            made += 1
    return made


def replayed(moves: Sequence[Any]) -> list[str]:
    """The reigns, if every rollback was about the champion of its moment."""
    reigns: list[str] = []
    for line in moves:
        if line["move"] == PROMOTED:
            reigns.append(line["selection"])
        else:
            assert reigns.pop() == line["selection"]
    return reigns


def test_promotions_and_rollbacks_at_once_keep_one_history(lab: Any, at_once: AtOnce) -> None:
    ws = lab.workspace()
    made = at_once(*((move, lab.folder, name, 12) for name in "xyz"))
    moves = history(ws)
    lines = (ws.store.folder("tiny", "champion") / "promotions.jsonl").read_text().splitlines()
    assert len(moves) == len(lines) == sum(made)
    assert sum(line["move"] == PROMOTED for line in moves) == 36
    reigns = replayed(moves)
    now = champion(ws)
    assert (now and now["selection"]) == (reigns[-1] if reigns else None)


def take_back(folder: Path) -> str | None:
    try:
        now = rollback(workspace(folder), "me")
    except StoreError:
        return "there was none"
    return now["selection"] if now else None


def test_three_rollbacks_at_once_take_back_three(lab: Any, at_once: AtOnce) -> None:
    ws = lab.workspace()
    move(lab.folder, "x", 1)
    for name in "yz":
        move(lab.folder, name, 1)
    found = at_once(*[(take_back, lab.folder)] * PROCESSES)
    assert sorted(map(str, found)) == ["None", "x0", "y0"]
    assert champion(ws) is None and replayed(history(ws)) == []
