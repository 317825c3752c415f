"""A generation: the set of arrivals that a selection sees, under a number that counts up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from filelock import FileLock

from dsel_assets.data import NON_FINITE_GRADIENT, Examples, merge
from dsel_assets.resources.store import Entry, StoreError, identity, write_json
from dsel_assets.steps.arrivals import arrivals
from dsel_assets.steps.pool import evaluation_set, held_back, load_examples, pool_fields
from dsel_assets.steps.sketches import find_sketched, load_sketched, sketch, sketch_space
from dsel_assets.steps.workspace import Workspace


@dataclass(frozen=True)
class Member:
    """An arrival as a generation sees it, by the identities of its artifacts."""

    arrival: str
    pool: str
    gradients: str
    sketches: str


@dataclass(frozen=True)
class Generation:
    """Its number, the identity of what it is made of, and its arrivals by key."""

    number: int
    identity: str
    members: tuple[Member, ...]


class NothingSketchedError(StoreError):
    """There is no generation yet."""


def current_generation(ws: Workspace, enter: bool = True) -> Generation:
    """The generation of all arrivals that are sketched and not held back.

    enter: a new one is written down, under the next number; those who only look leave it at that
    number. NothingSketchedError before the first arrival is sketched.
    """
    found = tuple(_members(ws))
    if not found:
        raise NothingSketchedError(
            f"{ws.task.name}: no arrival is sketched yet; run the ingest job first"
        )
    fields = {"members": [asdict(member) for member in found], "space": sketch_space(ws)}
    folder = ws.store.folder(ws.task.name, "generations")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{identity(fields)}.json"
    with FileLock(folder / "lock"):
        if not path.exists():
            number = 1 + len(list(folder.glob("*.json")))
            if not enter:
                return Generation(number, path.stem, found)
            write_json(path, {"number": number, **fields})
    return Generation(json.loads(path.read_text())["number"], path.stem, found)


def generation_at(ws: Workspace, number: int) -> Generation:
    """The generation of this number; StoreError if there is none."""
    paths = ws.store.folder(ws.task.name, "generations").glob("*.json")
    known = {content["number"]: (path.stem, content) for path, content in _contents(paths)}
    if number not in known:
        there = ", ".join(map(str, sorted(known))) or "none yet"
        raise StoreError(f"{ws.task.name} has no generation {number}; there are {there}")
    name, content = known[number]
    return Generation(number, name, tuple(Member(**member) for member in content["members"]))


def _contents(paths: Iterable[Path]) -> Iterator[tuple[Path, dict[str, Any]]]:
    return ((path, json.loads(path.read_text())) for path in paths)


def _members(ws: Workspace) -> list[Member]:
    found = []
    before = _seen_before(ws)
    for known in arrivals(ws):
        pool = ws.store.find(ws.task.name, "pool", pool_fields(ws, known))
        if pool and (pool.manifest["rows"] == 0 or held_back(ws, pool)):
            continue
        made = find_sketched(ws, pool) if pool else None
        if made is None and known.key in before:
            raise StoreError(
                f"{ws.task.name}: arrival {known.key} was ingested under other settings; ingest it "
                "again (`dsel run` does), or a selection would quietly do without it"
            )
        if pool and made:
            found.append(
                Member(known.key, pool.identity, made.gradients.identity, made.sketches.identity)
            )
    return found


def _seen_before(ws: Workspace) -> set[str]:
    """Arrivals that an earlier generation had; a new one may still wait for its turn."""
    folder = ws.store.folder(ws.task.name, "generations")
    return {
        member["arrival"]
        for path in folder.glob("*.json")
        for member in json.loads(path.read_text())["members"]
    }


def sketch_seconds(ws: Workspace, generation: Generation) -> float:
    """What the one pass for gradients and sketches took over all arrivals, whoever uses it."""
    return sum(sketches.manifest["seconds"] for _, _, sketches in members(ws, generation))


def load_pool(ws: Workspace, generation: Generation) -> tuple[Examples, pa.Table, pa.Table]:
    """The generation's examples with their sketches; duplicates and conflicts across arrivals.

    Of an id that arrives twice the first arrival's row is kept.
    """
    return _load_pool(_Key(ws, generation))


def load_target(ws: Workspace) -> Examples | None:
    """The target set with its sketches, or None where the task has none."""
    if ws.task.target is None:
        return None
    target = evaluation_set(ws, "target")
    return load_sketched(ws, sketch(ws, target).sketches, target)


def training_target(ws: Workspace) -> Examples:
    """The target set as finetuning reads it: without rows that would spoil a model.

    Their gradient is not finite; one that is zero does no harm.
    """
    entry = evaluation_set(ws, "target")
    examples = load_examples(entry)
    refused = pq.read_table(sketch(ws, entry).gradients.file("quarantine.parquet")).to_pylist()
    spoilt = [row["example_id"] for row in refused if row["reason"] == NON_FINITE_GRADIENT]
    return examples.take(~np.isin(examples.ids, np.array(spoilt, np.str_)))


def members(ws: Workspace, generation: Generation) -> Iterator[tuple[Entry, Entry, Entry]]:
    """Pool, gradients and sketches of each arrival, as artifacts."""
    for member in generation.members:
        yield (
            _entry(ws, "pool", member.pool),
            _entry(ws, "gradients", member.gradients),
            _entry(ws, "sketches", member.sketches),
        )


def arrival_of(ws: Workspace, generation: Generation, ids: Iterable[str]) -> dict[str, str]:
    """The arrival that each of these ids came with first."""
    wanted, found = pa.array(list(ids), pa.string()), dict[str, str]()
    for member, (pool, _, _) in zip(generation.members, members(ws, generation), strict=True):
        there = pq.read_table(pool.file("rows.parquet"), columns=["example_id"])["example_id"]
        for name in there.filter(pc.is_in(there, wanted)).to_pylist():
            found.setdefault(name, member.arrival)
    return found


@dataclass(frozen=True)
class _Key:
    ws: Workspace
    generation: Generation

    @property
    def names(self) -> tuple[object, ...]:
        return self.ws.home, self.ws.task.name, self.generation.identity

    def __hash__(self) -> int:
        return hash(self.names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.names == other.names


@lru_cache(maxsize=1)
def _load_pool(key: _Key) -> tuple[Examples, pa.Table, pa.Table]:
    parts = [
        (member.arrival, load_sketched(key.ws, sketches, pool))
        for member, (pool, _, sketches) in zip(
            key.generation.members, members(key.ws, key.generation), strict=True
        )
    ]
    examples, duplicates, conflicts = merge(parts)
    return examples, duplicates, conflicts


def _entry(ws: Workspace, kind: str, identity: str) -> Entry:
    entry = ws.store.entry(ws.task.name, kind, identity)
    if entry is None:
        raise StoreError(f"{ws.task.name}/{kind}/{identity} is gone; run the ingest job again")
    return entry
