"""Why this example: where it came from, what was found of it, and which selections hold it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dsel_assets.data import Examples
from dsel_assets.resources.store import Entry, StoreError
from dsel_assets.selection import attribution
from dsel_assets.steps.arrivals import arrivals
from dsel_assets.steps.cells import cells
from dsel_assets.steps.generation import Generation, current_generation, members
from dsel_assets.steps.loading import arrivals_of, load_pool, load_target, named_rows
from dsel_assets.steps.pool import pool_fields
from dsel_assets.steps.sketched import map_sketches
from dsel_assets.steps.workspace import Workspace

NEAREST = 3  # targets that are named
NOT_A_SCORE = ("task", "selection", "example_id", "rank")
ABOUT_THE_FILE = ("task", "artifact", "selection", "example_id")


def explain(ws: Workspace, example_id: str) -> dict[str, Any]:
    """What is known of one example in the current generation.

    arrivals    rows that carried it: arrival, row, label, source; of the arrivals that are not held
                back the first one's is kept
    quarantine  refusals of it: arrival, reason, detail
    gradient    loss in nats, norm, and the share of the generation whose norm is smaller
    nearest     the targets whose gradients are most like its own: id, label, cosine of the sketches
    selections  one a strategy, budget and seed that chose it: rank, weight, and every score

    StoreError if no file that landed has this id.
    """
    generation = current_generation(ws, enter=False)
    arrived = [row | {"arrival": key} for key, row in _arrived(ws, example_id)]
    carried = {row["arrival"] for row in arrived}
    refused = list(_refused(ws, generation, example_id))
    if not arrived and not refused:
        raise StoreError(f"{ws.task.name}: no row that landed has the id {example_id!r}")
    return {
        "example_id": example_id,
        "generation": generation.number,
        "arrivals": arrived,
        "quarantine": refused,
        "gradient": _gradient(ws, generation, example_id, carried),
        "nearest": _nearest(ws, generation, example_id, carried),
        "selections": list(_selections(ws, generation, example_id)),
    }


def _rows(entry: Entry, file: str, example_id: str) -> list[dict[str, Any]]:
    """Rows of a table with this id, without the columns that are the same for all."""
    path = entry.file(file)
    ids = pq.read_table(path, columns=["example_id"])["example_id"]
    if pc.index(ids, example_id).as_py() < 0:  # most tables: of these nothing else is read
        return []
    found = pq.read_table(path, filters=[("example_id", "=", example_id)])
    return found.drop_columns([n for n in ABOUT_THE_FILE if n in found.column_names]).to_pylist()


def _arrived(ws: Workspace, example_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for known in arrivals(ws):
        if pool := ws.store.find(ws.task.name, "pool", pool_fields(ws, known)):
            for row in _rows(pool, "rows.parquet", example_id):
                yield known.key, row


def _refused(ws: Workspace, generation: Generation, example_id: str) -> Iterator[dict[str, Any]]:
    pools = (ws.store.find(ws.task.name, "pool", pool_fields(ws, a)) for a in arrivals(ws))
    gradients = (gradients for _, gradients, _ in members(ws, generation))
    for entry in filter(None, (*pools, *gradients)):
        yield from _rows(entry, "quarantine.parquet", example_id)


def _gradient(
    ws: Workspace, generation: Generation, example_id: str, carried: Collection[str]
) -> dict[str, Any] | None:
    """Of the first of the arrivals that carried it."""
    own, smaller, total = None, 0, 0
    entries = [gradients for _, gradients, _ in members(ws, generation)]
    for member, entry in zip(generation.members, entries, strict=True):
        if own is None and member.arrival in carried:
            own = next(iter(_rows(entry, "rows.parquet", example_id)), None)
    if own is None:
        return None
    for entry in entries:
        norms = pq.read_table(entry.file("rows.parquet"), columns=["norm"])["norm"]
        smaller += pc.sum(pc.less(norms, own["norm"])).as_py() or 0
        total += len(norms)
    return own | {"share_of_pool_with_smaller_norm": smaller / total}


def _nearest(
    ws: Workspace, generation: Generation, example_id: str, carried: Collection[str]
) -> list[dict[str, Any]]:
    target = load_target(ws)
    if target is None:
        return []
    for member, (_, _, sketches) in zip(generation.members, members(ws, generation), strict=True):
        if member.arrival not in carried:
            continue
        ids = pq.read_table(sketches.file("ids.parquet"), columns=["example_id"])["example_id"]
        if (row := pc.index(ids, example_id).as_py()) >= 0:
            return _like(ws, map_sketches(ws, sketches)[row : row + 1], target)[0]
    return []


def _like(ws: Workspace, sketches: NDArray, target: Examples) -> list[list[dict[str, Any]]]:
    """The nearest targets of each row of sketches, the nearest first."""
    assert target.sketches is not None
    classes = ws.task.pool.columns.classes
    cosines = attribution(
        sketches.reshape(len(sketches), -1), target.sketches.reshape(len(target), -1)
    )
    return [
        [
            {"target": str(target.ids[j]), "label": classes[target.labels[j]], "cosine": float(c)}
            for j, c in ((j, row[j]) for j in np.argsort(-row, kind="stable")[:NEAREST])
        ]
        for row in cosines
    ]


def cards(
    ws: Workspace, generation: Generation, selection: Entry, count: int
) -> list[dict[str, Any]]:
    """The first picks of a selection: rank, id, class, source, arrival, nearest target, scores."""
    rows = pq.read_table(selection.file("rows.parquet")).slice(0, count).to_pylist()
    ids = [row["example_id"] for row in rows]
    chosen = load_pool(ws, generation, named_rows(ws, generation, ids), ["sketches"])
    assert chosen.sketches is not None
    target, classes = load_target(ws), ws.task.pool.columns.classes
    came = arrivals_of(ws, generation, ids)
    found = [
        {
            "rank": row["rank"],
            "example_id": row["example_id"],
            "class": classes[chosen.labels[i]],
            "source": str(chosen.groups[i]),
            "arrival": came[i],
            **{name: value for name, value in row.items() if name not in NOT_A_SCORE},
        }
        for i, row in enumerate(rows)
    ]
    if target is not None and rows:
        label = dict(zip(target.ids.tolist(), target.labels.tolist(), strict=True))
        for card, [nearest, *_] in zip(found, _like(ws, chosen.sketches, target), strict=True):
            # a strategy that has its own measure of likeness is shown by that
            card.setdefault("nearest_target", nearest["target"])
            card.setdefault("nearest_cosine", nearest["cosine"])
            card["nearest_label"] = classes[label[card["nearest_target"]]]
    return found


def _inputs(ws: Workspace, generation: Generation, ids: Sequence[str]) -> list[NDArray]:
    """Inputs of examples of the pool by id, in this order; StoreError for one not there."""
    try:
        rows = named_rows(ws, generation, ids)
    except KeyError as error:
        raise StoreError(f"the pool does not hold {error}, so there is no picture of it") from error
    found = load_pool(ws, generation, rows, ["inputs"]).inputs
    assert found is not None
    return list(found)


def _target_inputs(target: Examples, ids: Sequence[str]) -> list[NDArray]:
    assert target.inputs is not None
    place = {name: row for row, name in enumerate(target.ids.tolist())}
    return [target.inputs[place[name]] for name in ids]


def _pictured(ws: Workspace) -> bool:
    """Whether inputs are images in grey or in colours."""
    schema = ws.task.pool.columns
    shape = tuple(schema.shape)
    return schema.kind == "image" and (len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3)))


def portrait(ws: Workspace, example_id: str) -> bytes:
    """A picture of an example of the pool beside its nearest targets; StoreError for vectors."""
    from dsel_assets.evaluation.plots import gallery

    if not _pictured(ws):
        raise StoreError(f"{ws.task.name}: its inputs are no images of one or three colours")
    generation = current_generation(ws, enter=False)
    carried = {key for key, _ in _arrived(ws, example_id)}
    near = _nearest(ws, generation, example_id, carried)
    images = _inputs(ws, generation, [example_id])
    if (target := load_target(ws)) is not None:
        images += _target_inputs(target, [one["target"] for one in near])
    titles = [example_id[:8], *(f"{one['label']}: {one['cosine']:.2f}" for one in near)]
    return gallery([images], [titles])


def gallery_of(ws: Workspace, generation: Generation, rows: list[dict[str, Any]]) -> bytes | None:
    """A picture of some cards above their nearest targets; None where inputs are no pictures."""
    from dsel_assets.evaluation.plots import gallery

    if not _pictured(ws) or not rows:
        return None
    picks = _inputs(ws, generation, [row["example_id"] for row in rows])
    lines, titles = [picks], [[row["class"] for row in rows]]
    if (target := load_target(ws)) is not None:
        lines.append(_target_inputs(target, [row["nearest_target"] for row in rows]))
        titles.append([f"{r['nearest_label']}: {r['nearest_cosine']:.2f}" for r in rows])
    return gallery(lines, titles)


def _selections(ws: Workspace, generation: Generation, example_id: str) -> Iterator[dict[str, Any]]:
    for cell in cells(ws, generation):
        entry = ws.store.find(ws.task.name, "subsets", cell.selection)
        for row in _rows(entry, "rows.parquet", example_id) if entry else []:
            yield {"strategy": cell.strategy, "budget": cell.budget, "seed": cell.seed} | row
