"""Where a task lives: its declaration, its store, and the files that the declaration names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dsel_assets.resources.store import Store
from dsel_assets.task import Source, Task, TaskError

BUNDLED = "bundled:"


def home() -> Path:
    """The folder of store, warehouse and MLflow: `DSEL_HOME`, else `.dsel` right here."""
    return Path(os.environ.get("DSEL_HOME", ".dsel")).absolute()


@dataclass(frozen=True)
class Workspace:
    """One task and the folder where everything that is made of it lies."""

    task: Task
    home: Path

    @cached_property
    def store(self) -> Store:
        """The artifacts."""
        return Store(self.home / "store")

    @property
    def landing(self) -> str:
        """Folder or URL that is watched; for a bundled data set, a folder under the home."""
        landing = self.task.pool.landing
        if not landing.startswith(BUNDLED):
            return landing
        _only_known(landing, "pool.landing")
        return str(self.home / "landing" / self.task.name)

    def prepare(self) -> None:
        """Let a bundled data set's arrivals land, once."""
        if self.task.pool.landing.startswith(BUNDLED):
            from dsel_assets.data.bundled import land

            Path(self.landing).parent.mkdir(parents=True, exist_ok=True)
            land(Path(self.landing), self.task.name)

    def source_path(self, split: str) -> str:
        """The file of target, validation or test; a bundled one is written on first use."""
        source: Source | None = getattr(self.task, split)
        if source is None:
            raise TaskError(f"{self.task.name}: {split}.source is not given")
        if not source.source.startswith(BUNDLED):
            return source.source
        _only_known(source.source, f"{split}.source")
        from dsel_assets.data.bundled import SPLITS, write_split

        name = source.source.rpartition("/")[2]
        if name not in SPLITS:
            raise TaskError(f"{self.task.name}: {split}.source: bundled are {', '.join(SPLITS)}")
        path = self.home / "bundled" / f"{name}.parquet"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_split(name, path)
        return str(path)

    def check_files(self) -> None:
        """TaskError, naming the key, for a file of the declaration that is not there."""
        import fsspec

        named = {f"{split}.source": getattr(self.task, split).source for split in self.splits}
        for key, path in (named | {"model.base": self.task.model.base}).items():
            if path.startswith(BUNDLED):
                continue
            files, root = fsspec.core.url_to_fs(path)
            if not files.exists(root):
                raise TaskError(f"{self.task.name}: {key}: there is no file {path}")

    @property
    def splits(self) -> list[str]:
        """The evaluation sets that this task has."""
        return [s for s in ("target", "validation", "test") if getattr(self.task, s) is not None]


def _only_known(source: str, key: str) -> None:
    name = source.removeprefix(BUNDLED).partition("/")[0]
    if name != "mnist5k":
        raise TaskError(f"{key}: {source!r} is not bundled; bundled:mnist5k is")
