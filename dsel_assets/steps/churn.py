"""What changed from one generation to another: kept, added, dropped, and what it did."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from dsel_assets.resources.store import Entry
from dsel_assets.selection import STRATEGIES
from dsel_assets.steps.cells import cells
from dsel_assets.steps.chosen import chosen_ids
from dsel_assets.steps.generation import Generation, generation_at
from dsel_assets.steps.warm import COLD
from dsel_assets.steps.workspace import Workspace

Place = tuple[str, int, int]  # strategy, budget, seed
LATEST = 20  # generations that a picture shows


def diff(ws: Workspace, earlier: int, later: int, cold: bool = False) -> list[dict[str, Any]]:
    """One row a strategy, budget and seed that both generations have, under today's settings.

    kept, added and dropped are ids: kept and added in the later order of choice, dropped in the
    earlier. Where the strategy has an objective, `aim` names it, and `objective` is that of the
    later choice. cold: of the later selections that went on from an earlier one, also
    `shared_with_cold`, the share of them that a cold selection makes too, and `objective_cold`;
    what cold selections are not there are made. StoreError for a generation that is not there.
    """
    generation = generation_at(ws, later)
    before, after = _chosen(ws, generation_at(ws, earlier)), _chosen(ws, generation)
    begun_cold = _cold(ws, generation, after) if cold else {}
    rows = []
    for place in (place for place in after if place in before):
        old, new = (dict.fromkeys(chosen_ids(found[place])) for found in (before, after))
        row: dict[str, Any] = dict(zip(("strategy", "budget", "seed"), place, strict=True)) | {
            "kept": [name for name in new if name in old],
            "added": [name for name in new if name not in old],
            "dropped": [name for name in old if name not in new],
        }
        if aim := STRATEGIES[place[0]].aim:
            row |= {"aim": aim, "objective": after[place].summary.get("objective")}
        if other := begun_cold.get(place):
            shared = sum(name in new for name in chosen_ids(other))
            row["shared_with_cold"] = shared / max(1, len(new))
            row["objective_cold"] = other.summary.get("objective")
        rows.append(row)
    return rows


def over_generations(
    ws: Workspace, generation: Generation, strategy: str, budget: int
) -> list[dict[str, Any]]:
    """Means over the seeds of what each of the latest generations changed, under today's settings.

    kept, added, dropped, and where the strategy has an objective `objective_before` and
    `objective`. Generations that lack a selection are passed over; a strategy that takes the whole
    pool has no rows.
    """
    rows: list[dict[str, Any]] = []
    before = dict[Place, Entry]()
    if STRATEGIES[strategy].whole:
        return rows
    for number in range(max(1, generation.number - LATEST), generation.number + 1):
        found = _chosen(ws, generation_at(ws, number), strategy)
        now = {place: entry for place, entry in found.items() if place[1] == budget}
        # seeds of a deterministic strategy share their selections
        both = {
            (before[place].identity, now[place].identity): (before[place], now[place])
            for place in now
            if place in before
        }
        pairs = list(both.values())
        if pairs:
            sets = [(set(chosen_ids(old)), set(chosen_ids(new))) for old, new in pairs]
            row: dict[str, Any] = {
                "generation": number,
                "kept": fmean(len(old & new) for old, new in sets),
                "added": fmean(len(new - old) for old, new in sets),
                "dropped": fmean(len(old - new) for old, new in sets),
            }
            for name in ("objective_before", "objective"):
                known = [v for _, new in pairs if (v := new.summary.get(name)) is not None]
                row[name] = fmean(known) if len(known) == len(pairs) else None
            rows.append(row)
        before = now or before
    return rows


def _chosen(
    ws: Workspace, generation: Generation, strategy: str | None = None
) -> dict[Place, Entry]:
    found = {}
    for cell in cells(ws, generation, strategy):
        entry = ws.store.find(ws.task.name, "subsets", cell.selection)
        if entry is not None:
            found[cell.strategy, cell.budget, cell.seed] = entry
    return found


def _cold(ws: Workspace, generation: Generation, warm: dict[Place, Entry]) -> dict[Place, Entry]:
    """Cold selections beside those that went on from an earlier one."""
    from dsel_assets.steps.subsets import select  # loads torch

    went_on = {
        place: entry for place, entry in warm.items() if entry.manifest["fields"]["warm"] != COLD
    }
    cold = Workspace(ws.task.model_copy(update={"reselect": "cold"}), ws.home)
    found: dict[Place, Entry] = {}
    for strategy in dict.fromkeys(place[0] for place in went_on):
        select(cold, generation, strategy)
        found |= _chosen(cold, generation, strategy)
    return {place: found[place] for place in went_on}
