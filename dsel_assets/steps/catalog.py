"""Which files the SQL models read: the store's tables under the names that the warehouse shows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from dsel_assets.resources.store import Entry, write_json
from dsel_assets.selection import STRATEGIES, Needs
from dsel_assets.steps.arrivals import Arrival, arrivals
from dsel_assets.steps.cells import SPLITS, Cell, artifacts, cells
from dsel_assets.steps.generation import Generation, sketch_seconds
from dsel_assets.steps.loading import pool_rows
from dsel_assets.steps.pool import held_back, pool_fields, with_constants
from dsel_assets.steps.workspace import Workspace

SCORES = ("accuracy", "macro_f1", "loss", "calibration_error")
OF_LATEST = ("arrivals", "quarantine")  # views of how the arrivals stand now
OF_ALL = ("generations", "pool", "gradients", "duplicates", "cells", "comparisons", "selected")
Tables = dict[str, list[Path]]


def write_catalog(ws: Workspace, generation: Generation, decided: Entry) -> None:
    """Write what a generation adds to the views: a few small tables and the paths of the others.

    The tables hold timings, so they are no artifacts with a checksum; every call makes them anew.
    """
    folder = ws.home / "catalog" / ws.task.name / f"{generation.number:05d}"
    folder.mkdir(parents=True, exist_ok=True)
    found = [
        (known, ws.store.find(ws.task.name, "pool", pool_fields(ws, known)))
        for known in arrivals(ws)
    ]
    pools = [(known, pool) for known, pool in found if pool is not None]
    own = {
        "arrivals": [_arrival_row(ws, known, pool) for known, pool in pools],
        "generations": [
            {
                "task": ws.task.name,
                "generation": generation.number,
                "position": position,
                "arrival": member.arrival,
                "pool": member.pool,
                "gradients": member.gradients,
            }
            for position, member in enumerate(generation.members)
        ],
        "cells": cell_rows(ws, generation),
    }
    paths = {name: [folder / f"{name}.parquet"] for name in (*own, "duplicates")}
    written = {name: pa.Table.from_pylist(rows) for name, rows in own.items()}
    there = pool_rows(ws, generation)
    duplicates, conflicts = there.duplicates, there.conflicts
    task = pa.array([ws.task.name] * len(duplicates), pa.string())
    number = pa.array([generation.number] * len(duplicates), pa.int64())
    duplicates = duplicates.add_column(0, "generation", number).add_column(0, "task", task)
    conflicts = conflicts.add_column(0, "arrival", conflicts["source"])
    written |= {
        "duplicates": duplicates,
        "conflicts": with_constants(conflicts, {"task": ws.task.name}),
    }
    for name, table in written.items():
        part = folder / f"{name}.parquet.part-{os.getpid()}-{uuid4().hex[:8]}"
        pq.write_table(table, part)
        part.rename(folder / f"{name}.parquet")

    def of(kind: str, identities: Iterable[str], file: str = "rows.parquet") -> list[Path]:
        return [ws.store.folder(ws.task.name, kind) / name / file for name in identities]

    paths |= {
        "comparisons": [decided.file("comparisons.parquet")],
        "selected": of(
            "subsets", dict.fromkeys(c.identities["subsets"] for c in cells(ws, generation))
        ),
        "pool": of("pool", [member.pool for member in generation.members]),
        "gradients": of("gradients", [member.gradients for member in generation.members]),
        "quarantine": [pool.path / "quarantine.parquet" for _, pool in pools]
        + of("gradients", [m.gradients for m in generation.members], "quarantine.parquet")
        + [folder / "conflicts.parquet"],
    }
    relative = {
        name: [str(path.relative_to(ws.home)) for path in files] for name, files in paths.items()
    }
    write_json(folder / "files.json", relative)


def tables(home: Path) -> Tables:
    """Files by view, of every task under a home."""
    found: Tables = {name: [] for name in OF_LATEST + OF_ALL}
    for task in sorted((home / "catalog").glob("*")):
        catalogs = [json.loads(path.read_text()) for path in sorted(task.glob("*/files.json"))]
        for number, catalog in enumerate(catalogs, start=1):
            for name in OF_ALL if number < len(catalogs) else OF_LATEST + OF_ALL:
                found[name] += [home / path for path in catalog[name]]
    found["truth"] = sorted((home / "landing").glob("*/truth/*.parquet"))
    return {name: list(dict.fromkeys(files)) for name, files in found.items()}


def cell_rows(
    ws: Workspace, generation: Generation, strategy: str | None = None
) -> list[dict[str, Any]]:
    """The cells of one strategy, or of all, with their scores and what they cost."""
    shared = sketch_seconds(ws, generation)
    return [_cell_row(ws, generation, cell, shared) for cell in cells(ws, generation, strategy)]


def _cell_row(
    ws: Workspace, generation: Generation, cell: Cell, sketch_seconds: float
) -> dict[str, Any]:
    selection, checkpoint, metric = artifacts(ws, cell)
    sketches = Needs.SKETCHES in STRATEGIES[cell.strategy].needs
    row: dict[str, Any] = {
        "task": ws.task.name,
        "generation": generation.number,
        "strategy": cell.strategy,
        "budget": cell.budget,
        "seed": cell.seed,
        "selection": selection.identity,
        "checkpoint": checkpoint.identity,
        "metric": metric.identity,
        "chosen": selection.manifest["rows"],
        "whole": STRATEGIES[cell.strategy].whole,
        "stopped": selection.summary.get("stopped", False),
        "budget_in": ws.task.budget_in,
        "cost": selection.summary.get("cost"),
        "aim": STRATEGIES[cell.strategy].aim,
        "objective": selection.summary.get("objective"),
        "objective_before": selection.summary.get("objective_before"),
        "select_seconds": selection.summary["seconds"],
        "sketch_seconds": sketch_seconds if sketches else 0.0,
        "train_seconds": checkpoint.manifest["seconds"],
    }
    for split in SPLITS:
        row |= {f"{split}_{name}": metric.summary[split][name] for name in SCORES}
    return row


def _arrival_row(ws: Workspace, known: Arrival, pool: Entry) -> dict[str, Any]:
    summary = pool.summary
    return {
        "task": ws.task.name,
        "arrival": known.key,
        "file": os.fsencode(known.path).decode(errors="backslashreplace"),
        "digest": pool.manifest["fields"]["file"],
        "seen": summary["seen"],
        "rows": summary["rows"],
        "duplicates": summary["duplicates"],
        "quarantined": summary["quarantined"],
        "held_back": held_back(ws, pool) or "",
    }
