"""Every strategy against random, paired by seed and example; promotes a champion or keeps it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dsel_assets.evaluation import holm, paired_difference, verdict
from dsel_assets.resources.store import Entry, Store, StoreError, identity
from dsel_assets.selection import STRATEGIES
from dsel_assets.steps.cells import SPLITS, Cell, artifacts, cell_at, cells
from dsel_assets.steps.champion import BY_VERDICT, champion, crown
from dsel_assets.steps.generation import Generation, current_generation
from dsel_assets.steps.workspace import Workspace


def compare(ws: Workspace, generation: Generation) -> Entry:
    """The table `comparisons`: differences to random with their intervals, and the verdicts.

    Accuracy is compared on validation and on test. Holm's correction spans the strategies at the
    promoted budget; at other budgets the intervals and p values stand as they are, descriptive.
    """
    every = list(cells(ws, generation))
    fields = _fields(ws, generation)
    if entry := ws.store.find(ws.task.name, "verdict", fields):
        return entry
    with ws.store.write(ws.task.name, "verdict", fields) as draft:
        rows = list(_comparisons(ws, generation, every))
        pq.write_table(pa.Table.from_pylist(rows), draft.path / "comparisons.parquet")
        draft.rows = len(rows)
        draft.summary = {
            "generation": generation.number,
            "verdicts": {
                row["strategy"]: row["verdict"]
                for row in rows
                if row["split"] == "test" and row["budget"] == ws.task.promote.budget
            },
        }
    return draft.done


def find_verdict(ws: Workspace, generation: Generation) -> Entry | None:
    """The comparison of this generation, if it was made."""
    return ws.store.find(ws.task.name, "verdict", _fields(ws, generation))


def verdict_identity(ws: Workspace, generation: Generation) -> str:
    """The identity that the comparison of this generation has or will have."""
    return identity(_fields(ws, generation))


def _fields(ws: Workspace, generation: Generation) -> dict[str, Any]:
    return {
        "generation": generation.identity,
        "cells": [cell.identities for cell in cells(ws, generation)],
        "promote": ws.task.promote.model_dump(),
        "version": 1,
    }


def comparisons(decided: Entry) -> list[dict[str, Any]]:
    """The rows of a comparison: strategy, budget, split, difference, interval, verdict."""
    return pq.read_table(decided.file("comparisons.parquet")).to_pylist()


def promote(ws: Workspace, generation: Generation, decided: Entry) -> dict[str, Any] | None:
    """Make the best strategy that validation calls better the champion; else keep the one there is.

    The champion is the selection of the first seed at the promoted budget. Asking again changes
    nothing.
    """
    better = [
        row
        for row in comparisons(decided)
        if row["split"] == "validation"
        and row["budget"] == ws.task.promote.budget
        and row["verdict"] == "better"
        and not STRATEGIES[row["strategy"]].whole
    ]
    if not better:
        return champion(ws)
    best = max(better, key=lambda row: row["diff"])
    cell = cell_at(ws, generation, best["strategy"], best["budget"], seed=0)
    return crown(ws, _reign(generation, cell, decided, best), BY_VERDICT)


def promote_by_hand(
    ws: Workspace, strategy: str, budget: int, seed: int, by: str, why: str
) -> dict[str, Any]:
    """Make a selection of the current generation the champion, whatever the verdict says of it.

    What validation said stands in its evidence, beside `by` and `why`. StoreError where the
    generation is not compared yet, where the cell is not there, and where validation does not call
    it better and no reason is given.
    """
    generation = current_generation(ws, enter=False)
    decided = find_verdict(ws, generation)
    if decided is None:
        raise StoreError(
            f"{ws.task.name}: generation {generation.number} is not compared yet; `dsel run` first"
        )
    cell = cell_at(ws, generation, strategy, budget, seed)
    artifacts(ws, cell)
    said = said_of(decided, strategy, budget)
    said = said or {"verdict": f"nothing: {strategy} is what others are compared with"}
    if said["verdict"] != "better" and not why:
        raise StoreError(
            f"{ws.task.name}: of {strategy} at {budget} validation says: {said['verdict']}; "
            "give a reason (--why) to promote it nevertheless"
        )
    found = crown(ws, _reign(generation, cell, decided, said) | {"why": why}, by)
    assert found is not None
    return found


def said_of(decided: Entry, strategy: str, budget: int) -> dict[str, Any] | None:
    """What validation says of a strategy at a budget, if they were compared."""
    place = {"strategy": strategy, "budget": budget, "split": "validation"}
    return next((row for row in comparisons(decided) if place.items() <= row.items()), None)


def _reign(
    generation: Generation, cell: Cell, decided: Entry, said: Mapping[str, Any]
) -> dict[str, Any]:
    """A cell as champion, and what the verdict said of it."""
    evidence = ("verdict", "diff", "diff_low", "diff_high", "p_holm")
    return {
        "strategy": cell.strategy,
        "budget": cell.budget,
        "seed": cell.seed,
        "generation": generation.number,
        "selection": cell.identities["subsets"],
        "checkpoint": cell.identities["checkpoints"],
        "evidence": {key: said[key] for key in evidence if key in said},
        "verdict": decided.identity,
    }


def _comparisons(
    ws: Workspace, generation: Generation, every: list[Cell]
) -> Iterator[dict[str, Any]]:
    rule = ws.task.promote
    for split in SPLITS:
        for budget in ws.task.budgets:
            correct = {
                name: _correct(ws.store, ws.task.name, split, group)
                for name, group in _by_strategy(every, budget).items()
            }
            baseline = correct[rule.against]
            found = {
                name: paired_difference(values - baseline, confidence=rule.confidence)
                for name, values in correct.items()
                if name != rule.against
            }
            promoted = budget == rule.budget
            p = {name: difference.p for name, difference in found.items()}
            adjusted = holm(p) if promoted else p
            for name, difference in found.items():
                yield {
                    "task": ws.task.name,
                    "generation": generation.number,
                    "strategy": name,
                    "budget": budget,
                    "split": split,
                    "metric": rule.metric,
                    "confidence": rule.confidence,
                    "diff": difference.mean,
                    "diff_low": difference.low,
                    "diff_high": difference.high,
                    "p": difference.p,
                    "p_holm": adjusted[name],
                    "corrected": promoted,
                    "verdict": verdict(difference, adjusted[name], rule.confidence),
                }


def _by_strategy(every: list[Cell], budget: int) -> dict[str, list[Cell]]:
    groups: dict[str, list[Cell]] = {}
    for cell in every:
        if cell.budget == budget:
            groups.setdefault(cell.strategy, []).append(cell)
    return groups


def _correct(store: Store, task: str, split: str, group: list[Cell]) -> NDArray[np.float64]:
    """[seeds, examples] 1 where the prediction was right, examples in the order of the set."""
    rows = []
    for cell in group:
        path = store.get(task, "metrics", cell.metric).file("predictions.parquet")
        table = pq.read_table(path, filters=[("split", "=", split)])
        rows.append(table["predicted"].to_numpy() == table["label"].to_numpy())
    return np.array(rows, dtype=np.float64)
