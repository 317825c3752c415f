"""Which files the SQL models read: the store's tables under the names that the warehouse shows."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dsel_assets.resources.store import Entry, write_json
from dsel_assets.steps.arrivals import arrival, arrivals
from dsel_assets.steps.cells import Cell, cells
from dsel_assets.steps.generation import Generation
from dsel_assets.steps.metrics import SPLITS
from dsel_assets.steps.pool import held_back, pool_fields
from dsel_assets.steps.workspace import Workspace

SCORES = ("accuracy", "macro_f1", "loss", "calibration_error")
OF_LATEST = ("arrivals", "pool", "quarantine", "gradients")  # views of how the pool stands now
OF_ALL = ("generations", "cells", "comparisons", "selected")  # views with every generation
Tables = dict[str, list[Path]]


def write_catalog(ws: Workspace, generation: Generation, decided: Entry) -> None:
    """Write what a generation adds to the views: a few small tables and the paths of the others.

    The tables hold timings, so they are no artifacts with a checksum; every call makes them anew.
    """
    folder = ws.home / "catalog" / ws.task.name / f"{generation.number:05d}"
    folder.mkdir(parents=True, exist_ok=True)
    every = list(cells(ws, generation))
    found = {
        known.key: ws.store.find(ws.task.name, "pool", pool_fields(ws, known))
        for known in arrivals(ws)
    }
    pools = {key: pool for key, pool in found.items() if pool is not None}
    own = {
        "arrivals": [_arrival_row(ws, key, pool) for key, pool in pools.items()],
        "generations": [
            {"task": ws.task.name, "generation": generation.number, "arrival": member.arrival}
            for member in generation.members
        ],
        "cells": [cell_row(ws, generation, cell) for cell in every],
    }
    paths = {name: [folder / f"{name}.parquet"] for name in own}
    for name, rows in own.items():
        part = folder / f"{name}.parquet.part"
        pq.write_table(pa.Table.from_pylist(rows), part)
        part.rename(paths[name][0])

    def of(kind: str, identities: Iterable[str], file: str = "rows.parquet") -> list[Path]:
        return [ws.store.folder(ws.task.name, kind) / name / file for name in identities]

    paths |= {
        "comparisons": [decided.file("comparisons.parquet")],
        "selected": of("subsets", dict.fromkeys(cell.identities["subsets"] for cell in every)),
        "pool": of("pool", [member.pool for member in generation.members]),
        "gradients": of("gradients", [member.gradients for member in generation.members]),
        "quarantine": [pool.path / "quarantine.parquet" for pool in pools.values()]
        + of("gradients", [m.gradients for m in generation.members], "quarantine.parquet"),
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


def cell_row(ws: Workspace, generation: Generation, cell: Cell) -> dict[str, Any]:
    """One cell with its scores and what it cost; made of the three artifacts' manifests."""
    get = ws.store.get
    selection = get(ws.task.name, "subsets", cell.selection)
    checkpoint = get(ws.task.name, "checkpoints", cell.checkpoint)
    metric = get(ws.task.name, "metrics", cell.metric)
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
        "select_seconds": selection.summary["seconds"],
        "train_seconds": checkpoint.manifest["seconds"],
    }
    for split in SPLITS:
        row |= {f"{split}_{name}": metric.summary[split][name] for name in SCORES}
    return row


def _arrival_row(ws: Workspace, key: str, pool: Entry) -> dict[str, Any]:
    summary = pool.summary
    return {
        "task": ws.task.name,
        "arrival": key,
        "file": os.fsencode(arrival(ws, key).path).decode(errors="backslashreplace"),
        "digest": pool.manifest["fields"]["file"],
        "seen": summary["seen"],
        "rows": summary["rows"],
        "duplicates": summary["duplicates"],
        "quarantined": summary["quarantined"],
        "held_back": held_back(ws, pool) or "",
    }
