"""Where a task stands."""

from __future__ import annotations

from typing import Any

from dsel_assets.resources.store import StoreError
from dsel_assets.steps.arrivals import arrivals, is_new, landed
from dsel_assets.steps.cells import missing_strategies
from dsel_assets.steps.champion import champion
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.pool import find_ingested, held_back
from dsel_assets.steps.verdict import find_verdict
from dsel_assets.steps.workspace import Workspace


def status(ws: Workspace) -> dict[str, Any]:
    """Arrivals and their rows, the labels, the generation, what is missing of it, the champion.

    A task of which nothing is ingested yet has no generation; `why` then says what it waits for.
    """
    known = arrivals(ws)
    pools = {one.key: find_ingested(ws, one) for one in known}
    back = {key: held_back(ws, pool) for key, pool in pools.items() if pool}
    found: dict[str, Any] = {
        "task": ws.task.name,
        "arrivals": len(known),
        "landed_and_unknown": sum(is_new(known, file) for file in landed(ws)),
        "not_ingested": [key for key, pool in pools.items() if pool is None],
        "held_back": {key: why for key, why in back.items() if why},
        "rows": sum(p.manifest["rows"] for key, p in pools.items() if p and not back[key]),
        "generation": None,
    }
    if ws.task.active is not None:
        from dsel_assets.steps.labelling import standing

        labels = standing(ws)
        found["label_rounds"] = len(labels.rounds)
        found["labels_waiting"] = len(labels.waiting)
    try:
        generation = current_generation(ws, enter=False)
    except StoreError as error:
        return found | {"why": str(error)}
    decided = find_verdict(ws, generation)
    found |= {
        "generation": generation.number,
        "strategies": list(ws.task.strategies.chosen()),
        "to_select": list(missing_strategies(ws, generation)),
        "verdicts": decided.summary["verdicts"] if decided else None,
        "champion": champion(ws),
    }
    return found
