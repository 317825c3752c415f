"""Is everything there and whole: checksums, leftovers, pointers, disk; and what to run if not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dsel_assets.resources.store import MANIFEST, StoreError, alive
from dsel_assets.steps.champion import champion
from dsel_assets.steps.workspace import Workspace

LEAST_FREE = 2**30  # bytes of disk below which the next run may fail
NOT_ARTIFACTS = {"arrivals", "generations", "champion", "scratch", "warm"}


@dataclass(frozen=True)
class Finding:
    """What is wrong, where, and what to do."""

    problem: str
    path: str
    do: str


def examine(ws: Workspace) -> Iterator[Finding]:
    """Everything that is wrong with a task's store; reads every byte of it."""
    root = ws.store.root / ws.task.name
    for kind in sorted(path for path in root.glob("*") if path.name not in NOT_ARTIFACTS):
        for folder in sorted(path for path in kind.iterdir() if path.is_dir()):
            yield from _artifact(ws, kind.name, folder)
    yield from _ledger(root)
    yield from _champion(ws)
    yield from _catalog(ws)
    free = shutil.disk_usage(ws.home if ws.home.exists() else ws.home.parent).free
    if free < LEAST_FREE:
        yield Finding(f"{free / 2**20:.0f} MiB of disk are free", str(ws.home), "make room")


def _artifact(ws: Workspace, kind: str, folder: Path) -> Iterator[Finding]:
    again = "delete it; `dsel run` makes it again"
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
    except StoreError as error:
        yield Finding("its manifest can't be read", str(folder), str(error))
        return
    assert entry is not None
    for name in entry.damaged():
        yield Finding("missing, or other bytes than were written", str(folder / name), again)
    known = {MANIFEST, *entry.manifest["files"]}
    for path in sorted(folder.iterdir()):
        if path.name not in known:
            yield Finding("no artifact knows this file", str(path), "look at it, then delete it")


def _ledger(root: Path) -> Iterator[Finding]:
    for kind in ("arrivals", "generations"):
        for path in sorted((root / kind).glob("*.json")):
            try:
                json.loads(path.read_text())
            except ValueError:
                yield Finding("can't be read", str(path), "restore it from a backup")


def _champion(ws: Workspace) -> Iterator[Finding]:
    chosen = champion(ws)
    for kind, name in (("subsets", "selection"), ("checkpoints", "checkpoint")):
        if chosen and ws.store.entry(ws.task.name, kind, chosen[name]) is None:
            yield Finding(
                f"the champion's {name} is gone",
                str(ws.store.folder(ws.task.name, kind) / chosen[name]),
                "restore it from a backup, or run `dsel run` to compare anew",
            )


def _catalog(ws: Workspace) -> Iterator[Finding]:
    for catalog in sorted((ws.home / "catalog" / ws.task.name).glob("*/files.json")):
        for files in json.loads(catalog.read_text()).values():
            for path in files:
                if not (ws.home / path).is_file():
                    yield Finding(
                        "a view of the warehouse reads this file, and it is gone",
                        str(ws.home / path),
                        "`dsel run` makes it again, if it is of the current generation",
                    )
