"""Files into examples: arrivals of the pool, and the sets that evaluation reads."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from dsel_assets.data import (
    DIGEST_COLUMN,
    LEAK,
    ROW_COLUMN,
    UNREADABLE_FILE,
    Contract,
    Examples,
    UnreadableFileError,
    Validated,
    example_ids,
    file_digest,
    find_leaks,
    quarantine_table,
    read_file,
    validate,
)
from dsel_assets.resources.rows import mapped
from dsel_assets.resources.store import MANIFEST, Draft, Entry
from dsel_assets.steps.arrivals import Arrival, arrival, holds
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import TaskError

VERSION = 2

INPUTS = "inputs.safetensors"
COST = "cost"  # columns of rows.parquet, whatever the data calls them
KEPT = "kept."  # prefixes
TEXT = "text."


def contract(ws: Workspace, labelled: bool = True, in_pool: bool = True) -> Contract:
    """The schema of the task as what the readers check; costs and kept columns are the pool's."""
    schema = ws.task.pool.columns
    return Contract(
        input=schema.input,
        label=schema.label if labelled else None,
        group=schema.group,
        id=schema.id,
        kind=schema.kind,
        shape=tuple(schema.shape),
        classes=tuple(schema.classes),
        cost=schema.cost if in_pool else None,
        names=tuple(schema.keep) if in_pool else (),
        texts=tuple(schema.text) if in_pool else (),
    )


def _declared(ws: Workspace, in_pool: bool = True) -> dict[str, Any]:
    """The schema as artifacts are known by it: costs and kept columns where there are any."""
    found = ws.task.pool.columns.model_dump(mode="json")
    own = {name: found.pop(name) for name in ("cost", "keep", "text")}
    return found | ({name: value for name, value in own.items() if value} if in_pool else {})


def evaluation_set(ws: Workspace, split: str) -> Entry:
    """Target, validation or test. A row that does not meet the contract is an error here."""
    path = ws.source_path(split)
    declared = _declared(ws, in_pool=False)
    fields = {"split": split, "file": digest_of(path), "contract": declared, "version": VERSION}
    if entry := ws.store.find(ws.task.name, "target", fields):
        return entry
    asked = contract(ws, in_pool=False)
    found = validate(read_file(path, asked.declared), asked, split)
    if found.quarantine.num_rows or not len(found.examples):
        first = found.quarantine.slice(0, 1).to_pylist() or [{"row": 0, "reason": "no rows"}]
        raise TaskError(
            f"{path}: {found.quarantine.num_rows} of {found.seen} rows of {split} can't be used; "
            f"the first is row {first[0]['row']} ({first[0]['reason']}); mend the file"
        )
    with ws.store.write(ws.task.name, "target", fields) as draft:
        _write(ws, draft, found.examples, {"task": ws.task.name, "split": split})
        draft.summary = {"rows": draft.rows, "duplicates": found.duplicates}
    return draft.done


def shared_inputs(ws: Workspace, similarity: float | None = None) -> dict[str, int]:
    """How many inputs of one evaluation set stand in a later one, exactly or this near."""
    sets = {split: load_examples(evaluation_set(ws, split)) for split in ws.splits}
    return {
        f"{one} in {other}": _shared(ws, sets[one], sets[other], similarity)
        for one, other in (("target", "validation"), ("target", "test"), ("validation", "test"))
        if one in sets
    }


def _shared(ws: Workspace, one: Examples, other: Examples, similarity: float | None) -> int:
    assert one.inputs is not None and other.inputs is not None
    if similarity is None:
        return len(set(input_digests(one)) & set(input_digests(other)))
    kind = ws.task.pool.columns.kind
    return len(find_leaks(one.inputs, other.inputs, threshold=similarity, kind=kind)[0])


def ingest(ws: Workspace, key: str) -> Entry:
    """An arrival's rows that meet the contract; the others in quarantine, each with its reason.

    Rows whose input stands in target, validation or test, exactly or nearly, are quarantined as
    leaks. An unreadable file gives no rows and one line of quarantine; one that was gone or had
    changed is read as soon as it is back.
    """
    known = arrival(ws, key)
    if entry := find_ingested(ws, known):
        return entry
    fields = pool_fields(ws, known)
    if note_of_loss := ws.store.find(ws.task.name, "pool", fields):
        shutil.rmtree(note_of_loss.path)
    lost = not holds(known.path, known.digest)
    evaluation = {split: evaluation_set(ws, split) for split in ws.splits}
    try:
        if lost:
            raise UnreadableFileError(known.path, "it went or changed after it was registered")
        found = validate(read_file(known.path, contract(ws).declared), contract(ws), key)
    except UnreadableFileError as error:
        found = validate([], contract(ws), key)
        line = quarantine_table([(key, None, None, UNREADABLE_FILE, error.why)])
        found = Validated(found.examples, line, 0, 1)
    examples, leaks = without_leaks(ws, key, found.examples, evaluation)
    quarantine = pa.concat_tables([found.quarantine, leaks])
    with ws.store.write(ws.task.name, "pool", fields) as draft:
        constants = {"task": ws.task.name, "arrival": key}
        _write(ws, draft, examples, constants | {"artifact": draft.identity})
        pq.write_table(with_constants(quarantine, constants), draft.path / "quarantine.parquet")
        draft.summary = {
            "lost": lost,
            "seen": found.seen,
            "rows": len(examples),
            "duplicates": found.duplicates,
            "quarantined": quarantine.num_rows,
            "reasons": _counts(quarantine["reason"].to_pylist()),
            "undeclared_columns": list(found.extra),
            "details": _counts(_causes(found.quarantine)),
            "classes": _counts([contract(ws).classes[label] for label in examples.labels]),
            "sources": _counts(examples.groups.tolist()),
        }
    return draft.done


def missed(ws: Workspace, known: Arrival) -> int | None:
    """When an arrival's file was gone as it was to be read (ns), if it is there again."""
    entry = ws.store.find(ws.task.name, "pool", pool_fields(ws, known))
    if entry is None or not entry.summary.get("lost") or not holds(known.path, known.digest):
        return None
    return (entry.path / MANIFEST).stat().st_mtime_ns


def _causes(quarantine: pa.Table) -> list[str]:
    """Of each refused row the column that it was refused for, and why."""
    rows = quarantine.select(["reason", "detail"]).to_pylist()
    named = [(row["reason"], (row["detail"] or "").partition(":")[0]) for row in rows]
    return [f"{at}: {why}" if at.startswith("column ") else why for why, at in named]


def find_ingested(ws: Workspace, known: Arrival) -> Entry | None:
    """What `ingest` gave, unless the file was lost then and is back now."""
    entry = ws.store.find(ws.task.name, "pool", pool_fields(ws, known))
    if entry and entry.summary.get("lost") and holds(known.path, known.digest):
        return None
    return entry


def pool_fields(ws: Workspace, known: Arrival) -> dict[str, Any]:
    """What an arrival's examples are made of."""
    return {
        "arrival": known.key,
        "file": known.digest,
        "contract": _declared(ws),
        "evaluation": {split: evaluation_set(ws, split).identity for split in ws.splits},
        "leak_similarity": ws.task.pool.leak_similarity,
        "version": VERSION,
    }


def held_back(ws: Workspace, entry: Entry) -> str | None:
    """Why an arrival must not go on to gradients, or None. An empty file is fine."""
    summary = entry.summary
    if UNREADABLE_FILE in summary["reasons"]:
        return "the file can't be read"
    share = summary["quarantined"] / max(1, summary["seen"])
    if share > ws.task.pool.max_quarantine:
        return (
            f"{share:.0%} of its rows are in quarantine, more than pool.max_quarantine "
            f"({ws.task.pool.max_quarantine:.0%}): {summary['reasons']}"
        )
    return None


@lru_cache(maxsize=64)
def _load(path: str, identity: str, cost: str | None) -> Examples:
    there = pq.read_schema(f"{path}/rows.parquet").names
    read = [name for name in there if not name.startswith(TEXT)]
    rows = pq.read_table(f"{path}/rows.parquet", columns=read)
    kept = [name for name in rows.column_names if name.startswith(KEPT)]
    columns = {name.removeprefix(KEPT): np.array(rows[name], dtype=np.str_) for name in kept}
    if cost is not None:
        columns[cost] = rows[COST].to_numpy().copy()
    return Examples(
        ids=np.array(rows["example_id"].to_pylist(), dtype=np.str_),
        labels=rows["label"].to_numpy().copy(),  # Arrow's are read-only, which torch warns of
        groups=np.array(rows["source"].to_pylist(), dtype=np.str_),
        columns={
            ROW_COLUMN: rows[ROW_COLUMN].to_numpy().copy(),
            DIGEST_COLUMN: np.array(rows[DIGEST_COLUMN].to_pylist(), dtype=np.str_),
        }
        | columns,
    )


@lru_cache(maxsize=4)  # the evaluation sets, which every arrival is held against
def _load_inputs(path: str, identity: str) -> NDArray[np.float32]:
    return load_file(f"{path}/{INPUTS}")["inputs"]


def load_rows(entry: Entry) -> Examples:
    """The examples of an arrival or an evaluation set without their inputs."""
    entry.file("rows.parquet")
    cost = entry.manifest["fields"]["contract"].get("cost")
    return _load(str(entry.path), entry.identity, cost)


def load_examples(entry: Entry) -> Examples:
    """The examples of an arrival or an evaluation set."""
    entry.file(INPUTS)
    inputs = _load_inputs(str(entry.path), entry.identity)
    return replace(load_rows(entry), inputs=inputs)


def map_inputs(entry: Entry) -> NDArray[np.float32]:
    """The inputs [n, ...] of an arrival or an evaluation set, where they lie on disk."""
    return mapped(entry.file(INPUTS), "inputs")


def _write(ws: Workspace, draft: Draft, examples: Examples, constants: dict[str, str]) -> None:
    schema, classes = ws.task.pool.columns, ws.task.pool.columns.classes
    assert examples.inputs is not None
    cost = examples.columns.get(schema.cost or "", pa.nulls(len(examples), pa.float64()))
    named = [(KEPT, name) for name in schema.keep] + [(TEXT, name) for name in schema.text]
    names = {
        f"{prefix}{name}": pa.array(examples.columns[name].tolist(), pa.string())
        for prefix, name in named
        if name in examples.columns
    }
    rows = pa.table(
        {
            "example_id": examples.ids,
            ROW_COLUMN: examples.columns[ROW_COLUMN],
            "label": examples.labels,
            "label_name": [classes[label] for label in examples.labels],
            "source": examples.groups,
            DIGEST_COLUMN: examples.columns[DIGEST_COLUMN],
            COST: cost,
        }
        | names
    )
    pq.write_table(with_constants(rows, constants), draft.path / "rows.parquet")
    save_file({"inputs": np.ascontiguousarray(examples.inputs)}, draft.path / INPUTS)
    draft.rows = len(examples)


def input_digests(examples: Examples) -> NDArray[np.str_]:
    """[N] what an example would be known by if it had no label."""
    assert examples.inputs is not None
    return example_ids(examples.inputs, [""] * len(examples))


def without_leaks(
    ws: Workspace, key: str, examples: Examples, evaluation: dict[str, Entry]
) -> tuple[Examples, pa.Table]:
    """The examples that stand in no evaluation set, exactly or nearly; the others as quarantine."""
    clean, refused = np.ones(len(examples), dtype=bool), []
    for split, entry in evaluation.items():
        known = load_examples(entry)
        assert examples.inputs is not None and known.inputs is not None
        rows, match, similarity = find_leaks(
            examples.inputs,
            known.inputs,
            threshold=ws.task.pool.leak_similarity,
            kind=ws.task.pool.columns.kind,
        )
        for row, other, cosine in zip(rows, match, similarity, strict=True):
            if clean[row]:
                clean[row] = False
                detail = f"{split} {known.ids[other]}, similarity {cosine:.3f}"
                number = int(examples.columns[ROW_COLUMN][row])
                refused.append((key, number, str(examples.ids[row]), LEAK, detail))
    return examples.take(clean), quarantine_table(refused)


def with_constants(table: pa.Table, constants: dict[str, str]) -> pa.Table:
    """The table with these text columns, one value each, in front."""
    for name, value in reversed(constants.items()):
        table = table.add_column(0, name, pa.array([value] * len(table), pa.string()))
    return table


def _counts(values: list[str]) -> dict[str, int]:
    return dict(sorted(Counter(values).items()))


@lru_cache(maxsize=64)
def _digest_as_of(path: str, size: int, modified: int) -> str:
    return file_digest(path)


def digest_of(path: str) -> str:
    """SHA-256 of a file; `UnreadableFileError` when it is not there."""
    try:
        if "://" not in path:
            status = os.stat(path)
            return _digest_as_of(path, status.st_size, status.st_mtime_ns)
        return file_digest(path)
    except FileNotFoundError as error:
        raise UnreadableFileError(path, "it is not there (any more)") from error
