"""The ledger of arrivals: which landed files are known, each under a key of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from dsel_assets.data.readers import file_digest
from dsel_assets.resources.store import StoreError, write_json
from dsel_assets.steps.workspace import Workspace

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz")


@dataclass(frozen=True)
class Landed:
    """A file in the landing folder as it stands now."""

    path: str
    size: int
    modified: str


@dataclass(frozen=True)
class Arrival:
    """A file that was registered: its key names the partition, its digest what was in it."""

    key: str
    path: str
    digest: str
    size: int
    number: int


def landed(ws: Workspace) -> list[Landed]:
    """Files of the landing folder."""
    return files_in(ws.landing)


def files_in(folder: str) -> list[Landed]:
    """Files of a folder or URL with a known ending, by name. Folders in it are not entered."""
    import fsspec

    files, root = fsspec.core.url_to_fs(folder)
    if not files.isdir(root):
        return []
    found = []
    for info in files.ls(root, detail=True):
        if info["type"] == "file" and info["name"].lower().endswith(ENDINGS):
            path = info["name"] if "://" not in folder else files.unstrip_protocol(info["name"])
            modified = str(info.get("mtime") or info.get("LastModified") or info.get("etag") or "")
            found.append(Landed(path, int(info["size"] or 0), modified))
    return sorted(found, key=lambda file: file.path)


def arrivals(ws: Workspace) -> list[Arrival]:
    """Everything registered so far, in the order of arrival."""
    ledger = ws.store.folder(ws.task.name, "arrivals")
    found = [Arrival(**json.loads(path.read_text())) for path in ledger.glob("*.json")]
    return sorted(found, key=lambda known: known.number)


def arrival(ws: Workspace, key: str) -> Arrival:
    """The arrival with this key; KeyError when nobody registered it."""
    for known in arrivals(ws):
        if known.key == key:
            return known
    raise KeyError(f"{ws.task.name}: no arrival {key!r}; put its file into {ws.landing}")


def register(ws: Workspace, file: Landed) -> Arrival | None:
    """Enter a file into the ledger; None when the same content is there already, under any name.

    A file that comes again under a known name with other content is a new arrival: what was there
    keeps its rows, and ids that now differ go to quarantine as conflicts. A known file that was
    moved is looked for where it is now.
    """
    digest = file_digest(file.path)
    ledger = ws.store.folder(ws.task.name, "arrivals")
    ledger.mkdir(parents=True, exist_ok=True)
    with FileLock(ledger / "lock"):
        known = arrivals(ws)
        for other in known:
            if other.digest == digest:
                if other.path != file.path and not holds(other.path, digest):
                    moved = asdict(other) | {"path": file.path}
                    write_json(ledger / f"{other.key}.json", moved)
                return None
        key = _key(file.path)
        if any(other.key == key for other in known):
            key = f"{key}-{digest[:8]}"
        entered = Arrival(key, file.path, digest, file.size, 1 + len(known))
        write_json(ledger / f"{key}.json", asdict(entered))
    return entered


def deliver(ws: Workspace, file: Path) -> None:
    """Copy a file into the landing folder: under a name that nobody reads, then renamed."""
    folder = Path(ws.landing)
    if "://" in ws.landing:
        raise StoreError(f"{ws.landing} is not a folder of this machine; put {file} there yourself")
    if not file.name.lower().endswith(ENDINGS):
        raise StoreError(f"{file}: its name must end in {', '.join(ENDINGS)}")
    to = folder / file.name
    if to.exists():
        if file_digest(str(to)) == file_digest(str(file)):
            return
        raise FileExistsError(f"{to} is there already with other content; rename {file}")
    folder.mkdir(parents=True, exist_ok=True)
    part = to.with_name(f".{to.name}.part-{os.getpid()}")
    try:
        shutil.copyfile(file, part)
        part.rename(to)
    finally:
        part.unlink(missing_ok=True)


def is_new(known: Sequence[Arrival], file: Landed) -> bool:
    """Whether a file's content is in no arrival; files of a known path and size are not read."""
    if any((one.path, one.size) == (file.path, file.size) for one in known):
        return False
    if all(one.size != file.size for one in known):
        return True
    try:
        digest = file_digest(file.path)
    except OSError:
        return True
    return all(one.digest != digest for one in known)


def holds(path: str, digest: str) -> bool:
    """Whether this content lies under the path."""
    try:
        return file_digest(path) == digest
    except FileNotFoundError:
        return False


def _key(path: str) -> str:
    """The file's name without its ending, in characters safe in paths and partition keys."""
    name = Path(path).name.lower()
    for ending in sorted(ENDINGS, key=len, reverse=True):
        name = name.removesuffix(ending)
    return re.sub(r"[^a-z0-9_-]+", "-", name).strip("-")[:80] or "arrival"
