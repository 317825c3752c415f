"""What was chosen, read and judged."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dsel_assets.resources.store import Entry
from dsel_assets.selection import STRATEGIES
from dsel_assets.steps.cells import cells
from dsel_assets.steps.generation import Generation
from dsel_assets.steps.loading import pool_rows
from dsel_assets.steps.workspace import Workspace


def chosen_ids(entry: Entry) -> list[str]:
    """The ids of a selection, in the order of choice."""
    return pq.read_table(entry.file("rows.parquet"), columns=["example_id"])[
        "example_id"
    ].to_pylist()


def quota_rows(entry: Entry) -> list[dict[str, Any]]:
    """What each quota asked, got and cost; nothing where there are none, or of another seed."""
    if "quotas.parquet" not in entry.manifest["files"]:
        return []
    return pq.read_table(entry.file("quotas.parquet")).to_pylist()


PER_PICK = ("gain", "variance_left", "worst_variance_left")


def per_pick(entry: Entry) -> dict[str, list[float]]:
    """What a greedy choice about targets says of each pick; nothing for other strategies."""
    file = entry.file("rows.parquet")
    if not set(PER_PICK) <= set(pq.read_schema(file).names):
        return {}
    table = pq.read_table(file, columns=list(PER_PICK))
    return {name: table[name].to_pylist() for name in PER_PICK}


def alarms(ws: Workspace, generation: Generation) -> list[dict[str, Any]]:
    """Of each strategy that watches itself and each budget, in how many seeds an alarm was on."""
    from dsel_assets.selection.guards import ALARMS

    found: dict[tuple[str, int], list[Entry]] = {}
    for cell in cells(ws, generation):
        entry = ws.store.get(ws.task.name, "subsets", cell.selection)
        if ALARMS.keys() <= entry.summary.keys():
            found.setdefault((cell.strategy, cell.budget), []).append(entry)
    return [
        {"strategy": strategy, "budget": budget, "seeds": len(entries)}
        | {name: sum(entry.summary[name] for entry in entries) for name in ALARMS}
        | {
            name: float(np.mean([entry.summary[name] for entry in entries]))
            for name in ("mean_weight", "weight_loss_correlation", "outside_share_top")
        }
        for (strategy, budget), entries in found.items()
    ]


COLLAPSED = 0.7  # share of one class or source in a choice that is worth a warning


def collapsed(ws: Workspace, generation: Generation) -> list[dict[str, Any]]:
    """Choices of which one class or source takes most, but less than half as much of the pool."""
    pool = pool_rows(ws, generation).examples
    classes = np.array(ws.task.pool.columns.classes)
    values = {"class": classes[pool.labels], "source": pool.groups}
    rows, seen = [], set[str]()
    for cell in cells(ws, generation):
        entry = ws.store.get(ws.task.name, "subsets", cell.selection)
        if STRATEGIES[cell.strategy].whole or entry.identity in seen:
            continue
        seen.add(entry.identity)
        chosen = np.isin(pool.ids, chosen_ids(entry))
        for name, column in values.items():
            value, share = _most(column[chosen])
            there = float(np.mean(column == value))
            if share > COLLAPSED and there < share / 2:
                place = {"strategy": cell.strategy, "budget": cell.budget, "seed": cell.seed}
                rows.append(place | {"of": name, "value": value, "share": share, "pool": there})
    return rows


def _most(values: NDArray[np.str_]) -> tuple[str, float]:
    """The most frequent value and its share."""
    if len(values) == 0:
        return "", 0.0
    found, counts = np.unique(values, return_counts=True)
    return str(found[counts.argmax()]), float(counts.max() / len(values))


CHANCE = 3.0  # standard deviations by which chance alone hardly departs


def beyond_chance(ws: Workspace, generation: Generation) -> list[dict[str, Any]]:
    """Of each strategy and budget, whether anything but chance seems to have chosen.

    What two seeds both choose is compared with what two uniform draws would (hypergeometric), and
    where a strategy reports how many uniform draws do as well as its subsets, that counts too.
    `chosen` is False where neither tells it from a uniform draw. Strategies without a seed, and
    budgets of which a strategy takes the whole pool, are left out.
    """
    groups: dict[tuple[str, int], list[Entry]] = {}
    for cell in cells(ws, generation):
        selector = STRATEGIES[cell.strategy]
        if cell.strategy != "random" and not (selector.whole or selector.deterministic):
            entry = ws.store.get(ws.task.name, "subsets", cell.selection)
            groups.setdefault((cell.strategy, cell.budget), []).append(entry)
    rows, found = len(pool_rows(ws, generation).examples), []
    for (strategy, budget), entries in groups.items():
        sets = [set(chosen_ids(entry)) for entry in entries]
        n = float(np.mean([len(ids) for ids in sets]))  # under a cost budget they differ a little
        if n in (0, rows):
            continue
        pairs = list(combinations(sets, 2))
        shared = float(np.mean([len(a & b) for a, b in pairs]))
        chance = n * n / rows
        sd = np.sqrt(chance * (1 - n / rows) ** 2 * rows / (rows - 1) / len(pairs))
        as_good = [e.summary["uniform_as_good"] for e in entries if "uniform_as_good" in e.summary]
        better = bool(as_good) and float(np.mean(as_good)) < 0.5
        found.append(
            {
                "strategy": strategy,
                "budget": budget,
                "shared_by_two_seeds": shared,
                "by_chance": chance,
                "uniform_as_good": float(np.mean(as_good)) if as_good else None,
                "chosen": bool(abs(shared - chance) > CHANCE * sd or better),
            }
        )
    return found
