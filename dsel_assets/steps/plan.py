"""What the next run will take; and what it took then. Only what is missing is planned.

<store>/<task>/plans/<number>.json
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq

from dsel_assets.resources.store import MANIFEST, Entry, StoreError, write_json
from dsel_assets.selection import STRATEGIES
from dsel_assets.steps.arrivals import Landed, arrivals, is_new, landed
from dsel_assets.steps.cells import cells
from dsel_assets.steps.estimate import BEFORE, KINDS, PROBE, TRAINED, Estimate, Take
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.pool import find_ingested, held_back
from dsel_assets.steps.probe import BROKEN, taken
from dsel_assets.steps.sketched import find_sketched
from dsel_assets.steps.workspace import Workspace


@dataclass(frozen=True)
class Stage:
    """One stage: rows or cells that are missing, seconds and MiB of disk; the same as it took.

    source: whether that is known from `before`, or for a part of it from the `probe`.
    """

    name: str
    missing: int
    seconds: float
    mib: float
    source: str = PROBE
    took_seconds: float | None = None
    took_mib: float | None = None


@dataclass(frozen=True)
class Plan:
    """What is missing, by stage.

    number: counts the plans of a task. rows: of the pool then. memory_mib: the most that a process
    held before, or one of the probe, with the inputs and two copies of the sketches of what it has
    not seen on top.
    """

    number: int
    rows: int
    memory_mib: float
    stages: list[Stage]
    took_memory_mib: float | None = None


def plan(ws: Workspace) -> Plan:
    """Estimate what is missing, by a probe where it must be, and write that down.

    StoreError where nothing has landed.
    """
    ws.check_files()
    ws.prepare()
    files = [file.path for file in landed(ws) if not _refused(ws, file)]
    if not files:
        raise StoreError(f"{ws.task.name}: nothing usable has landed in {ws.landing} yet")
    waiting = sum(map(_rows_of, _waiting(ws)))
    with tempfile.TemporaryDirectory(prefix="dsel-plan-") as folder:
        estimate = Estimate(ws, files, Path(folder), waiting)
        stages = [
            _stage(name, waiting, [estimate.rows(name, waiting)]) for name in KINDS if waiting
        ]
        missing = dict(_missing(ws, bool(waiting)))
        for strategy, wanted in missing.items():
            if wanted:
                takes = estimate.selections(strategy, wanted)
                stages.append(_stage(f"select {strategy}", len(wanted), takes))
        for name, kind in TRAINED.items():
            if count := _trainings(ws, kind, missing, bool(waiting)):
                stages.append(_stage(name, count, [estimate.training(name)] * count))
        memory = estimate.memory
    number = 1 + len(list(_folder(ws).glob("*.json")))
    found = Plan(number, estimate.pool, memory, stages)
    write_json(_folder(ws) / f"{number:05d}.json", asdict(found))
    return found


def last_plan(ws: Workspace) -> Plan:
    """The last plan beside what has been made since; StoreError if there is none."""
    paths = sorted(_folder(ws).glob("*.json"))
    if not paths:
        raise StoreError(f"{ws.task.name} has no plan yet; `dsel plan` makes one")
    content = json.loads(paths[-1].read_text())
    made = _Made(ws, paths[-1].stat().st_mtime)
    stages = [made.beside(Stage(**stage)) for stage in content.pop("stages")]
    return replace(Plan(**content, stages=stages), took_memory_mib=made.peak)


def _stage(name: str, missing: int, takes: list[Take]) -> Stage:
    source = PROBE if any(take.source == PROBE for take in takes) else BEFORE
    seconds, disk = (sum(column) for column in zip(*(take[:2] for take in takes), strict=True))
    return Stage(name, missing, seconds, disk, source)


def _folder(ws: Workspace) -> Path:
    return ws.store.folder(ws.task.name, "plans")


def _waiting(ws: Workspace) -> Iterator[Landed]:
    """Files that are not ingested and sketched under today's settings."""
    every = arrivals(ws)
    known = {one.path: one for one in every}
    for file in landed(ws):
        if file.path not in known and not is_new(every, file):
            continue  # a copy of what is known
        pool = find_ingested(ws, known[file.path]) if not is_new(every, file) else None
        if pool is None or not (
            held_back(ws, pool) or pool.manifest["rows"] == 0 or find_sketched(ws, pool)
        ):
            yield file


def _refused(ws: Workspace, file: Landed) -> bool:
    """Whether a file was read and is held back."""
    for one in arrivals(ws):
        if one.path == file.path and (pool := find_ingested(ws, one)) is not None:
            return held_back(ws, pool) is not None
    return False


def _rows_of(file: Landed) -> int:
    try:
        with fsspec.open(file.path, "rb", compression="infer") as content:
            if not file.path.lower().endswith(".parquet"):
                return sum(1 for line in content if line.strip())
            return int(pq.ParquetFile(content).metadata.num_rows)
    except BROKEN:  # it will be held back
        return 0


def _missing(ws: Workspace, waiting: bool) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Of each strategy the (seed, budget) of the selections that the next run makes."""
    for name in ws.task.strategies.chosen():
        selector = STRATEGIES[name]
        if waiting:
            seeds = 1 if selector.deterministic else ws.task.seeds
            budgets = ws.task.budgets[:1] if selector.whole else ws.task.budgets
            yield name, [(seed, budget) for seed in range(seeds) for budget in budgets]
            continue
        every = list(cells(ws, current_generation(ws, enter=False), name))
        gone = ws.store.missing(ws.task.name, "subsets", [cell.selection for cell in every])
        distinct: dict[str, tuple[int, int]] = {}
        for cell in every:  # the first of those that share a selection makes it
            distinct.setdefault(cell.identities["subsets"], (cell.seed, cell.budget))
        yield name, [place for identity, place in distinct.items() if identity in gone]


def _trainings(
    ws: Workspace, kind: str, missing: dict[str, list[tuple[int, int]]], waiting: bool
) -> int:
    """How many checkpoints, or metrics, the next run makes."""
    if waiting:
        seeds = {name: ws.task.seeds if STRATEGIES[name].deterministic else 1 for name in missing}
        return sum(len(wanted) * seeds[name] for name, wanted in missing.items())
    every = cells(ws, current_generation(ws, enter=False))
    made_of = [cell.checkpoint if kind == "checkpoints" else cell.metric for cell in every]
    return len(ws.store.missing(ws.task.name, kind, made_of))


class _Made:
    """What has been made since a moment."""

    def __init__(self, ws: Workspace, since: float) -> None:
        self._ws, self._since = ws, since

    def _of(self, kind: str) -> list[Entry]:
        found = self._ws.store.entries(self._ws.task.name, kind)
        return [e for e in found if (e.path / MANIFEST).stat().st_mtime > self._since]

    def beside(self, stage: Stage) -> Stage:
        """The stage with what it took, if anything was made."""
        name, _, strategy = stage.name.partition(" ")
        if strategy:
            every = [e for e in self._of("subsets") if e.manifest["fields"]["strategy"] == strategy]
        else:
            kinds = KINDS.get(name) or (TRAINED[name],)
            every = [entry for kind in kinds for entry in self._of(kind)]
        if not every:
            return stage
        seconds, disk = taken(every)
        return replace(stage, took_seconds=seconds, took_mib=disk)

    @property
    def peak(self) -> float | None:
        """MiB that the largest process held."""
        kinds = ("sketches", "subsets", "checkpoints", "metrics")
        peaks: list[Any] = [
            entry.manifest["process_peak_mib"] for kind in kinds for entry in self._of(kind)
        ]
        return max(peaks, default=None)
