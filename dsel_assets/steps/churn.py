"""What changed from one generation to another: kept, added, dropped."""

from __future__ import annotations

from typing import Any

from dsel_assets.resources.store import Entry
from dsel_assets.steps.cells import cells
from dsel_assets.steps.generation import generation_at
from dsel_assets.steps.subsets import chosen_ids
from dsel_assets.steps.workspace import Workspace


def diff(ws: Workspace, earlier: int, later: int) -> list[dict[str, Any]]:
    """One row a strategy, budget and seed that both generations have, under today's settings.

    kept, added and dropped are ids: kept and added in the later order of choice, dropped in the
    earlier. StoreError for a generation that is not there.
    """
    before, after = (_chosen(ws, number) for number in (earlier, later))
    rows = []
    for place in (place for place in after if place in before):
        old, new = (dict.fromkeys(chosen_ids(found[place])) for found in (before, after))
        rows.append(
            dict(zip(("strategy", "budget", "seed"), place, strict=True))
            | {
                "kept": [name for name in new if name in old],
                "added": [name for name in new if name not in old],
                "dropped": [name for name in old if name not in new],
            }
        )
    return rows


def _chosen(ws: Workspace, number: int) -> dict[tuple[str, int, int], Entry]:
    found = {}
    for cell in cells(ws, generation_at(ws, number)):
        entry = ws.store.find(ws.task.name, "subsets", cell.selection)
        if entry is not None:
            found[cell.strategy, cell.budget, cell.seed] = entry
    return found
