"""Is everything there and whole: checksums, leftovers, pointers, disk; and what to run if not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from dsel_assets.resources.store import MANIFEST, StoreError, alive
from dsel_assets.steps.cells import cells
from dsel_assets.steps.champion import champion
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.workspace import Workspace

DISTRIBUTION = "dsel-assets"
LEAST_FREE = 2**30  # bytes of disk below which the next run may fail
OF_A_GENERATION = {"pool", "gradients", "sketches", "subsets", "checkpoints", "metrics"} | {
    "label_requests"
}
NOT_ARTIFACTS = {"arrivals", "generations", "champion", "plans", "scratch", "warm"}


@dataclass(frozen=True)
class Finding:
    """What is wrong, where, and what to do."""

    problem: str
    path: str
    do: str


def examine(ws: Workspace) -> Iterator[Finding]:
    """Everything that is wrong with a task's store and the libraries; reads every byte of it."""
    root, needed = ws.store.root / ws.task.name, _needed(ws)
    kinds = (path for path in root.glob("*") if path.is_dir() and path.name not in NOT_ARTIFACTS)
    for kind in sorted(kinds):
        for folder in sorted(path for path in kind.iterdir() if path.is_dir()):
            yield from _artifact(ws, kind.name, folder, needed)
    yield from _notes(ws)
    yield from _champion(ws)
    yield from _libraries()
    free = shutil.disk_usage(ws.home if ws.home.exists() else ws.home.parent).free
    if free < LEAST_FREE:
        yield Finding(f"{free / 2**20:.0f} MiB of disk are free", str(ws.home), "make room")


def _needed(ws: Workspace) -> set[str]:
    """Identities of the current generation's artifacts: those that `dsel run` would make again."""
    try:
        generation = current_generation(ws, enter=False)
    except StoreError:
        return set()
    found = {name for member in generation.members for name in asdict(member).values()}
    return found.union(*(cell.identities.values() for cell in cells(ws, generation)))


def _artifact(ws: Workspace, kind: str, folder: Path, needed: set[str]) -> Iterator[Finding]:
    again = "delete its folder; `dsel run` makes it again"
    if kind in OF_A_GENERATION and folder.name not in needed:
        again = "restore it from a backup: `dsel run` makes only what the current generation needs"
    if ".part-" in folder.name:
        pid = folder.name.split("-")[1]
        if not (pid.isdigit() and alive(int(pid))):
            yield Finding("left by a process that was killed", str(folder), "delete it")
        return
    if not (folder / MANIFEST).exists():
        yield Finding("half-written: it has no manifest", str(folder), again)
        return
    try:
        entry = ws.store.entry(ws.task.name, kind, folder.name)
    except StoreError:
        yield Finding("its manifest can't be read", str(folder), again)
        return
    assert entry is not None
    for name in entry.damaged():
        yield Finding("missing, or other bytes than were written", str(folder / name), again)
    known = {MANIFEST, *entry.manifest["files"]}
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            yield Finding("no artifact knows this file", str(path), "look at it, then delete it")


def _notes(ws: Workspace) -> Iterator[Finding]:
    """The small JSON files: ledger, generations, what goes on from what, the catalog."""
    root = ws.store.root / ws.task.name
    folders = [root / "arrivals", root / "generations", *(root / "warm").glob("*")]
    for path in sorted(path for folder in folders for path in folder.glob("*.json")):
        if _read(path) is None:
            yield Finding("can't be read", str(path), "restore it from a backup")
    for path in sorted((ws.home / "catalog" / ws.task.name).glob("*/files.json")):
        catalog = _read(path)
        if catalog is None:
            yield Finding("can't be read", str(path), "delete its folder, then `dsel run`")
            continue
        for file in (file for files in catalog.values() for file in files):
            if not (ws.home / file).is_file():
                gone = "a view of the warehouse reads this file, and it is gone"
                yield Finding(gone, str(ws.home / file), "restore it from a backup, or `dsel run`")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError:
        return None


def _libraries() -> Iterator[Finding]:
    """Installed versions that the project does not admit."""
    for text in requires(DISTRIBUTION) or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(wanted.name)
        except PackageNotFoundError:
            there = "no version"
        if there == "no version" or not wanted.specifier.contains(there, prereleases=True):
            do = "pip install -c constraints.txt -e ."
            yield Finding(f"{there} is installed, {wanted.specifier} is needed", wanted.name, do)


def _champion(ws: Workspace) -> Iterator[Finding]:
    chosen = champion(ws)
    for kind, name in (("subsets", "selection"), ("checkpoints", "checkpoint")):
        path = ws.store.folder(ws.task.name, kind) / chosen[name] if chosen else None
        if path is not None and not (path / MANIFEST).exists():
            do = "restore it from a backup, or `dsel rollback`"
            yield Finding(f"the champion's {name} is gone", str(path), do)
