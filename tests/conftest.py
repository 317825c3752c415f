"""A tiny selection task in a temporary folder: 8 x 8 digits, an MLP, every strategy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["DAGSTER_DISABLE_TELEMETRY"] = "true"

Row = dict[str, Any]

TASK: dict[str, Any] = {
    "pool": {"schema": {"group": "source", "shape": [8, 8], "classes": 10}},
    "model": {"name": "mlp"},
    "finetune": {"steps": 20, "batch_size": 16},
    "sketch": {"dim": 64},
    "spectrum": {"examples": 32, "eigenvalues": 4, "iterations": 8},
    "strategies": {
        "random": {},
        "full": {},
        "target_only": {},
        "skmm": {},
        "bads": {"steps": 40, "batch_size": 20},
        "itl": {},
        "gradmatch": {},
    },
    "budgets": [5, 10],
    "seeds": 2,
    "schedule": "0 6 * * 1",
    "promote": {"budget": 10},
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also what takes minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--run-slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes: --run-slow"))


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, mapping by mapping; what is None goes."""
    both = dict(base)
    for key, value in changes.items():
        old = both.get(key)
        both[key] = (
            merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return {key: value for key, value in both.items() if value is not None}


@dataclass(frozen=True)
class Lab:
    """A folder with a landing folder, evaluation sets, a base model and a home."""

    folder: Path
    digits: Sequence[Row]

    @property
    def landing(self) -> Path:
        return self.folder / "landing"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def rows(self, start: int, stop: int) -> list[Row]:
        """Digits by position; 0-39 are target and evaluation sets, from 100 on the pool."""
        return [dict(row) for row in self.digits[start:stop]]

    def land(self, name: str, rows: Sequence[Row]) -> Path:
        """Put rows into the landing folder, as Parquet or JSONL by the name's ending."""
        return write(self.landing / name, rows)

    def task(self, name: str = "tiny", **changes: Any) -> Any:
        """The task, with changes in its declaration; also written as YAML beside the home."""
        from dsel_assets.task import load_task

        own = {
            "pool": {"landing": str(self.landing)},
            "model": {"base": str(self.folder / "base.safetensors")},
        } | {
            split: {"source": str(self.folder / f"{split}.parquet")}
            for split in ("target", "validation", "test")
        }
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(merged(merged(TASK, own), changes)))
        return load_task(path)

    def workspace(self, name: str = "tiny", **changes: Any) -> Any:
        from dsel_assets.steps.workspace import Workspace

        return Workspace(self.task(name, **changes), self.home)


def write(path: Path, rows: Sequence[Row]) -> Path:
    """Rows as Parquet or JSONL, by the name's ending."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the project's databases, nor starts processes."""
    monkeypatch.setenv("DSEL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DSEL_WORKERS", "1")
    for name in ("DAGSTER_HOME", "DSEL_MLFLOW_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def digits() -> list[Row]:
    """400 of scikit-learn's 8 x 8 digits as rows; no two of them nearly the same."""
    from sklearn.datasets import load_digits

    from dsel_assets.data import near_duplicates

    images, labels = load_digits(return_X_y=True)
    images = (images[:460] * 15).astype(np.uint8).reshape(-1, 8, 8)
    first = near_duplicates(images.astype(np.float32) / 255)
    apart = np.flatnonzero(first == np.arange(len(first)))[:400]
    return [
        {"image": images[i].tolist(), "label": int(labels[i]), "source": f"vendor{i % 2}"}
        for i in apart
    ]


@pytest.fixture(scope="session")
def furnished(tmp_path_factory: pytest.TempPathFactory, digits: list[Row]) -> Path:
    """Evaluation sets, a base model and two arrivals; no home yet."""
    import torch

    from dsel_assets.models import ARCHITECTURES, save_weights

    folder = tmp_path_factory.mktemp("furnished")
    write(folder / "target.parquet", digits[:20])
    write(folder / "validation.parquet", digits[20:50])
    write(folder / "test.parquet", digits[50:90])
    write(folder / "landing" / "a.parquet", digits[100:160])
    write(folder / "landing" / "b.jsonl", digits[160:220])
    torch.manual_seed(0)
    save_weights(ARCHITECTURES["mlp"]((8, 8), 10).state_dict(), folder / "base.safetensors")
    return folder


@pytest.fixture
def lab(tmp_path: Path, furnished: Path, digits: list[Row]) -> Lab:
    """The furnished folder, copied: nothing was ingested yet."""
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    return Lab(tmp_path, digits)


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory, furnished: Path, digits: list[Row]
) -> Callable[[Path], Lab]:
    """Copies a folder in which the whole pipeline has run once; nobody changes the original."""
    from dsel_assets.pipeline import run

    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(furnished, folder, dirs_exist_ok=True)
    lab = Lab(folder, digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSEL_WORKERS", "1")
        run(lab.workspace())

    def copy(to: Path) -> Lab:
        shutil.copytree(folder, to, dirs_exist_ok=True)
        return Lab(to, digits)

    return copy


@pytest.fixture
def done(tmp_path: Path, finished: Callable[[Path], Lab]) -> Lab:
    """A folder in which the whole pipeline has run once."""
    return finished(tmp_path)


@pytest.fixture(scope="session")
def original(
    tmp_path_factory: pytest.TempPathFactory, furnished: Path, digits: list[Row]
) -> tuple[Lab, Any]:
    """A folder in which Dagster has run all jobs, and the outcome: one arrival is held back."""
    import dagster as dg

    from dsel_assets.runner import initialise, run

    folder = tmp_path_factory.mktemp("ran")
    shutil.copytree(furnished, folder, dirs_exist_ok=True)
    lab = Lab(folder, digits)
    broken = lab.land("a0.parquet", lab.rows(220, 250))
    broken.write_bytes(broken.read_bytes()[:-100])
    (folder / "dagster").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DSEL_WORKERS", "1")
        patch.setenv("DSEL_HOME", str(lab.home))
        with dg.instance_for_test(temp_dir=str(folder / "dagster")) as instance:
            initialise(instance)
            outcome = run(lab.task(), instance)
    return lab, outcome


@pytest.fixture
def ran(tmp_path: Path, original: tuple[Lab, Any]) -> Lab:
    """A copy of the folder in which Dagster has run all jobs."""
    shutil.copytree(original[0].folder, tmp_path, dirs_exist_ok=True)
    return Lab(tmp_path, original[0].digits)


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[Any]:
    """A Dagster instance in the test's folder; with `ran`, the one that ran."""
    import dagster as dg

    (tmp_path / "dagster").mkdir(exist_ok=True)
    with dg.instance_for_test(temp_dir=str(tmp_path / "dagster")) as instance:
        yield instance
