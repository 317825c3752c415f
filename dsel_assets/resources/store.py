"""The store: every artifact is a folder of files, found by the identity of what it was made from.

    <home>/store/<task>/<kind>/<identity>/...files..., manifest.json

A folder is written under a temporary name, its manifest last, and renamed: a reader sees all of it
or nothing. Asking again for what exists returns it.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

MANIFEST = "manifest.json"
LIBRARIES = ("torch", "numpy", "pyarrow", "scikit-learn")


class StoreError(RuntimeError):
    """An artifact is missing or damaged; the message names it and says what to do."""


def identity(fields: Mapping[str, Any]) -> str:
    """20 hex digits of the SHA-256 of the fields as canonical JSON."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Entry:
    """An artifact that is there. `reused` says that asking for it made nothing."""

    path: Path
    manifest: Mapping[str, Any]
    reused: bool = True

    @property
    def identity(self) -> str:
        """The hash of what the artifact was made from."""
        return self.path.name

    @property
    def summary(self) -> Mapping[str, Any]:
        """What the maker had to say: counts, scores, diagnostics."""
        return self.manifest["summary"]

    def file(self, name: str) -> Path:
        """One of its files; StoreError when it is gone or its size has changed."""
        path = self.path / name
        size = self.manifest["files"][name]["bytes"]
        if not path.is_file() or path.stat().st_size != size:
            raise StoreError(f"{path}: missing or damaged; delete {self.path} and run again")
        return path

    def damaged(self) -> list[str]:
        """Names of files whose checksum does not match the manifest. Reads everything."""
        return [
            name
            for name, known in self.manifest["files"].items()
            if not (self.path / name).is_file() or file_sha256(self.path / name) != known["sha256"]
        ]


@dataclass
class Draft:
    """An artifact being written: put files into `path`, counts and findings into `summary`."""

    path: Path
    identity: str
    rows: int = 0
    summary: dict[str, Any] = field(default_factory=dict)
    entry: Entry | None = None

    @property
    def done(self) -> Entry:
        """The artifact, once the `with` block has ended."""
        assert self.entry is not None
        return self.entry


class Store:
    """Artifacts under one folder. Safe for several processes: the first to finish wins."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, task: str, kind: str) -> Path:
        """Where the artifacts of a kind lie."""
        return self.root / task / kind

    def find(self, task: str, kind: str, fields: Mapping[str, Any]) -> Entry | None:
        """The artifact made from exactly these fields, if it is there."""
        return self.entry(task, kind, identity(fields))

    def entry(self, task: str, kind: str, identity: str) -> Entry | None:
        """The artifact with this identity, if it is there."""
        path = self.folder(task, kind) / identity
        try:
            return Entry(path, json.loads((path / MANIFEST).read_text()))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError as error:
            raise StoreError(f"{path / MANIFEST}: {error}; delete {path} and run again") from error

    def get(self, task: str, kind: str, fields: Mapping[str, Any]) -> Entry:
        """The artifact made from these fields; StoreError when nobody has made it yet."""
        entry = self.find(task, kind, fields)
        if entry is None:
            raise StoreError(f"{task}/{kind} is not there yet; materialise {task}/{kind} first")
        return entry

    def missing(self, task: str, kind: str, wanted: Iterable[Mapping[str, Any]]) -> set[str]:
        """Identities of the wanted artifacts that are not there."""
        names = {identity(fields) for fields in wanted}
        return {name for name in names if not (self.folder(task, kind) / name / MANIFEST).exists()}

    def entries(self, task: str, kind: str) -> list[Entry]:
        """All artifacts of a kind, by identity."""
        folders = sorted(self.folder(task, kind).glob("*"))
        found = (self.entry(task, kind, path.name) for path in folders if ".part" not in path.name)
        return [entry for entry in found if entry is not None]

    @contextmanager
    def write(self, task: str, kind: str, fields: Mapping[str, Any]) -> Iterator[Draft]:
        """Write an artifact; it exists once the block has ended without an exception."""
        final = self.folder(task, kind) / identity(fields)
        self._sweep(final)
        part = final.with_name(f"{final.name}.part-{os.getpid()}-{uuid4().hex[:8]}")
        part.mkdir(parents=True)
        draft, started = Draft(part, final.name), time.perf_counter()
        try:
            yield draft
            manifest = {
                "kind": kind,
                "fields": dict(fields),
                "rows": draft.rows,
                "summary": draft.summary,
                "files": {path.name: _sealed(path) for path in sorted(part.iterdir())},
                "versions": _versions(),
                "seconds": time.perf_counter() - started,
                "process_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
            write_json(part / MANIFEST, manifest)
            try:
                part.rename(final)
            except OSError:
                if not (final / MANIFEST).exists():
                    raise
            draft.entry = Entry(final, json.loads((final / MANIFEST).read_text()), reused=False)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _sweep(self, final: Path) -> None:
        """Remove what a killed process or an interrupted deletion left under this name."""
        if final.is_dir() and not (final / MANIFEST).exists():
            shutil.rmtree(final, ignore_errors=True)
        for part in final.parent.glob(f"{final.name}.part-*"):
            if not alive(int(part.name.split("-")[1])):
                shutil.rmtree(part, ignore_errors=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file under a temporary name, sync it, rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part-{os.getpid()}-{uuid4().hex[:8]}")
    try:
        with part.open("w") as file:
            json.dump(content, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        part.rename(path)
    finally:
        part.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sealed(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}


def alive(pid: int) -> bool:
    """Whether a process of this machine has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@cache
def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}
