"""The workflow on a sample of what has landed, in a folder of its own: what it takes."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from dsel_assets.resources.store import Entry
from dsel_assets.steps.arrivals import landed, register
from dsel_assets.steps.checkpoints import finetune
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.loading import pool_rows
from dsel_assets.steps.metrics import evaluate
from dsel_assets.steps.pool import held_back, ingest
from dsel_assets.steps.sketches import sketch
from dsel_assets.steps.subsets import select
from dsel_assets.steps.workspace import Workspace

ROWS = (100, 400)  # of the two samples
MIB = 2**20
STEPS = (20, 80)  # of a training in the probe, and of a strategy's own training
BROKEN = (pa.ArrowInvalid, EOFError, OSError, zlib.error)


def probes(ws: Workspace, files: Sequence[str], folder: Path) -> list[Probe]:
    """The smaller and the larger sample of these files, each run in a folder below this one.

    The first of three runs warms up what is loaded and compiled once.
    """
    in_cost = ws.task.budget_in == "cost"
    _, *found = [
        Probe(_sampled(ws, files, ROWS[i], STEPS[i], folder / str(number)), in_cost)
        for number, i in enumerate(tqdm((0, 0, 1), desc="probe", leave=False))
    ]
    return found


def _sampled(ws: Workspace, files: Sequence[str], rows: int, steps: int, folder: Path) -> Workspace:
    """The task on the first rows of its files, in a home of its own, with shorter trainings."""
    landing = folder / "landing"
    landing.mkdir(parents=True)
    left = rows
    for number, path in enumerate(reversed(files)):
        left -= _head(path, left, landing / f"{number}{''.join(Path(path).suffixes[-2:])}")
        if left <= 0:
            break
    task, n = ws.task, min(ws.task.budgets[-1], rows // 2)
    strategies = {
        name: settings.model_copy(update={"steps": min(steps, settings.steps)})
        for name, settings in task.strategies.chosen().items()
        if hasattr(settings, "steps")
    }
    changes = {
        "pool": task.pool.model_copy(update={"landing": str(landing), "max_quarantine": 1.0}),
        "budgets": [max(1, n // 2), n],
        "budget_in": "examples",
        "quotas": {},
        "seeds": 1,
        "finetune": task.finetune.model_copy(update={"steps": steps}),
        "strategies": task.strategies.model_copy(update=strategies),
    }
    return Workspace(task.model_copy(update=changes), folder / "home")


def _head(path: str, rows: int, to: Path) -> int:
    """Copy the first rows of a file; how many there were. Of a broken file, none."""
    try:
        with fsspec.open(path, "rb", compression="infer") as content:
            if not path.lower().endswith(".parquet"):
                lines = [line for line, _ in zip(content, range(rows), strict=False)]
                to.with_suffix("" if to.suffix == ".gz" else to.suffix).write_bytes(b"".join(lines))
                return len(lines)
            batch = next(pq.ParquetFile(content).iter_batches(batch_size=rows), None)
    except BROKEN:
        return 0
    if batch is not None:
        pq.write_table(pa.Table.from_batches([batch]), to)
    return 0 if batch is None else batch.num_rows


class Probe:
    """The workflow on a sample: its artifacts tell what they took.

    Attributes:
        rows: of the sample's pool.
        budgets: in the order in which they are selected, the largest first.
        selected: by strategy its selections, in that order.
        cost: what an example costs on average, in the unit of the task's budgets.
    """

    def __init__(self, ws: Workspace, in_cost: bool) -> None:
        """in_cost: budgets are."""
        self._ws = ws
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            for file in landed(ws):
                known = register(ws, file)
                if known is None:  # a copy of another
                    continue
                pool = ingest(ws, known.key)
                if pool.manifest["rows"] and held_back(ws, pool) is None:
                    sketch(ws, pool)
            generation = current_generation(ws)
            self.selected: dict[str, list[Entry]] = {}
            for strategy in ws.task.strategies.chosen():
                self.selected[strategy] = select(ws, generation, strategy)[::-1]
                if strategy == "random":
                    finetune(ws, generation, strategy)
                    evaluate(ws, generation, strategy)
        self.budgets, column = ws.task.budgets[::-1], ws.task.pool.columns.cost
        costs = None if column is None else pool_rows(ws, generation).examples.columns[column]
        self.cost = float(costs.mean()) if costs is not None and in_cost else 1.0
        self.rows = sum(entry.manifest["rows"] for entry in self.of(["pool"]))

    def of(self, kinds: Sequence[str]) -> list[Entry]:
        """Artifacts of the sample, not of evaluation sets."""
        store, task = self._ws.store, self._ws.task.name
        target = {entry.identity for entry in store.entries(task, "target")}
        found = (entry for kind in kinds for entry in store.entries(task, kind))
        return [e for e in found if e.manifest["fields"].get("examples") not in target]

    def mib_a_row(self, kind: str) -> float:
        """Disk that a row takes."""
        return taken(self.of([kind]))[1] / max(1, self.rows)

    def a_cell(self, kind: str) -> tuple[float, float]:
        """Seconds and MiB of one."""
        every = self.of([kind])
        seconds, disk = taken(every)
        return seconds / len(every), disk / len(every)

    @cached_property
    def peak(self) -> float:
        """MiB that a process held."""
        every = self._ws.store.entries(self._ws.task.name, "subsets")
        return max(float(entry.manifest["process_peak_mib"]) for entry in every)


def taken(entries: Iterable[Entry]) -> tuple[float, float]:
    """Seconds that artifacts took together, and their MiB of disk."""
    seconds = disk = 0.0
    for entry in entries:
        seconds += entry.manifest["seconds"]
        disk += sum(file["bytes"] for file in entry.manifest["files"].values()) / MIB
    return seconds, disk
