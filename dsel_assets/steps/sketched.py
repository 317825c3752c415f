"""Gradients and sketches that are there: found, held against the task, read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dsel_assets.data import Examples
from dsel_assets.resources.rows import mapped
from dsel_assets.resources.store import Entry
from dsel_assets.steps.pool import load_examples
from dsel_assets.steps.space import (
    NoDimensionError,
    gradient_rows,
    gradient_space,
    sketch_dimension,
    sketch_space,
)
from dsel_assets.steps.workspace import Workspace

SKETCHES = "sketches.safetensors"
KEPT = 0.95  # share of pairs that must lie within three standard deviations of the promise
ALLOWED = 2.0  # times a dense Gaussian's error: what affd promises at worst


class Sketched(NamedTuple):
    """Both outputs of the pass; `source` says where the gradients came from this time."""

    gradients: Entry
    sketches: Entry
    source: str


def find_sketched(ws: Workspace, examples: Entry) -> Sketched | None:
    """Both outputs, if both are there."""
    try:
        fields, sketch_fields = sketched_fields(ws, examples)
    except NoDimensionError:
        return None
    gradients = ws.store.find(ws.task.name, "gradients", fields)
    sketches = ws.store.find(ws.task.name, "sketches", sketch_fields)
    return Sketched(gradients, sketches, "store") if gradients and sketches else None


def sketched_fields(ws: Workspace, examples: Entry) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the gradients and the sketches of some examples are made of."""
    made_of = {"examples": examples.identity, "version": 4}
    return made_of | {"space": gradient_space(ws)}, made_of | {"space": sketch_space(ws)}


def load_sketched(ws: Workspace, sketched: Entry, examples: Entry) -> Examples:
    """The examples that have a sketch, with it: [N, D], or [N, k, D] where outputs are sketched.

    Refuses sketches of another space or other rows.
    """
    refuse_other_space(ws, sketched, examples)
    known = load_examples(examples)
    found = known.take(rows_of(sketched, known.ids))
    return replace(found, sketches=np.array(map_sketches(ws, sketched)))


def rows_of(sketched: Entry, ids: NDArray[np.str_]) -> NDArray[np.int64]:
    """[n] of each of these sketches its row among the ids of its examples."""
    own = pq.read_table(sketched.file("ids.parquet"))["example_id"]
    place = pc.index_in(own, pa.array(ids.tolist(), pa.string()))
    if place.null_count:
        raise ValueError(f"{sketched.path}: ids.parquet names examples that its arrival lacks")
    return place.to_numpy().astype(np.int64)


def map_sketches(ws: Workspace, sketched: Entry) -> NDArray[np.float32]:
    """Sketches [N, D], or [N, k, D] where outputs are sketched, where they lie on disk."""
    rows, k = mapped(sketched.file(SKETCHES)), gradient_rows(ws)
    return rows if k is None else rows.reshape(len(rows), k, sketch_dimension(ws))


def refuse_other_space(ws: Workspace, sketched: Entry, examples: Entry) -> None:
    """ValueError, naming the field, for sketches of another space than the task's or other rows."""
    space = sketched.manifest["fields"]["space"]
    for field, expected in sketch_space(ws).items():
        if space.get(field) != expected:
            raise ValueError(
                f"{sketched.path}: these sketches have another {field}: "
                f"{space.get(field)!r}, the task asks for {expected!r}"
            )
    if sketched.manifest["fields"]["examples"] != examples.identity:
        raise ValueError(
            f"{sketched.path}: these are sketches of other examples, not {examples.path}"
        )


def broken_promise(ws: Workspace, sketched: Entry) -> str | None:
    """Why these sketches are not to be relied on, or None; measured on a few exact gradients."""
    quality, kind = sketched.summary["quality"], ws.task.sketch.kind
    if quality is None:
        return None
    advice = "take another sketch.kind, or a larger sketch.dim"
    if quality["within"] < KEPT:
        return (
            f"{quality['within']:.1%} of the inner products lie within three standard deviations "
            f"of what a {kind} sketch should keep, fewer than {KEPT:.0%}; {advice}"
        )
    if quality["rms"] > ALLOWED * quality["dense"]:
        return (
            f"the inner products' error is {quality['rms']:.3f}, more than {ALLOWED:g} times that "
            f"of a dense Gaussian sketch ({quality['dense']:.3f}); {advice}"
        )
    return None
