"""A generation: the set of arrivals that a selection sees, under a number that counts up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from dsel_assets.resources.store import Entry, StoreError, identity, write_json
from dsel_assets.steps.arrivals import arrivals
from dsel_assets.steps.pool import held_back, pool_fields
from dsel_assets.steps.sketched import find_sketched
from dsel_assets.steps.space import sketch_space
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


def generation_of(ws: Workspace, name: str) -> Generation | None:
    """The generation of this identity, if there is one."""
    path = ws.store.folder(ws.task.name, "generations") / f"{name}.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    return Generation(content["number"], name, tuple(Member(**m) for m in content["members"]))


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


def sketched_rows(ws: Workspace, generation: Generation) -> int:
    """Rows of all its arrivals' sketches; one that came twice counts twice."""
    return sum(sketches.manifest["rows"] for _, _, sketches in members(ws, generation))


def members(ws: Workspace, generation: Generation) -> Iterator[tuple[Entry, Entry, Entry]]:
    """Pool, gradients and sketches of each arrival, as artifacts."""
    for member in generation.members:
        yield (
            _entry(ws, "pool", member.pool),
            _entry(ws, "gradients", member.gradients),
            _entry(ws, "sketches", member.sketches),
        )


def _entry(ws: Workspace, kind: str, identity: str) -> Entry:
    entry = ws.store.entry(ws.task.name, kind, identity)
    if entry is None:
        raise StoreError(f"{ws.task.name}/{kind}/{identity} is gone; run the ingest job again")
    return entry
