"""What the next run will take, measured on a few hundred rows; and what it took then.

The probe is the workflow itself, in a folder of its own, on two samples of what has landed: what a
stage took on both gives its fixed part and the part that grows. Seconds are those of the manifests:
of one thread where cells run side by side. Only what is missing is planned, all of it cold.

    <store>/<task>/plans/<number>.json
"""

from __future__ import annotations

import json
import tempfile
import warnings
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from dsel_assets.resources.store import MANIFEST, Entry, StoreError, write_json
from dsel_assets.selection import STRATEGIES
from dsel_assets.steps.arrivals import Landed, arrivals, is_new, landed, register
from dsel_assets.steps.cells import cells
from dsel_assets.steps.checkpoints import finetune
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.loading import pool_rows
from dsel_assets.steps.metrics import evaluate
from dsel_assets.steps.pool import find_ingested, held_back, ingest
from dsel_assets.steps.sketched import find_sketched
from dsel_assets.steps.sketches import sketch
from dsel_assets.steps.subsets import select
from dsel_assets.steps.workspace import Workspace

ROWS = (100, 400)  # of the two samples
STEPS = (20, 80)  # of a training in the probe, and of a strategy's own training
MIB = 2**20
BROKEN = (pa.ArrowInvalid, EOFError, OSError, zlib.error)
KINDS = {"ingest": ("pool",), "sketch": ("gradients", "sketches")}
TRAINED = {"finetune": "checkpoints", "evaluate": "metrics"}


@dataclass(frozen=True)
class Stage:
    """One stage: rows or cells that are missing, seconds and MiB of disk; the same as it took."""

    name: str
    missing: int
    seconds: float
    mib: float
    took_seconds: float | None = None
    took_mib: float | None = None


@dataclass(frozen=True)
class Plan:
    """What is missing, by stage.

    number: counts the plans of a task. rows: of the pool then. memory_mib: what a process of the
    probe held, with the pool's inputs and two copies of its sketches on top.
    """

    number: int
    rows: int
    memory_mib: float
    stages: list[Stage]
    took_memory_mib: float | None = None


def plan(ws: Workspace) -> Plan:
    """Measure the probe, scale it to what is missing, and write that down.

    StoreError where nothing has landed.
    """
    ws.check_files()
    ws.prepare()
    files = [file.path for file in landed(ws) if not _refused(ws, file)]
    if not files:
        raise StoreError(f"{ws.task.name}: nothing usable has landed in {ws.landing} yet")
    waiting = sum(map(_rows_of, _waiting(ws)))
    rows = waiting + _rows_there(ws)
    with tempfile.TemporaryDirectory(prefix="dsel-plan-") as folder:
        # the first of three warms up what is loaded and compiled once
        _, *probes = [
            _Probe(
                _sampled(ws, files, ROWS[i], STEPS[i], Path(folder) / str(number)),
                ws.task.budget_in == "cost",
            )
            for number, i in enumerate(tqdm((0, 0, 1), desc="probe", leave=False))
        ]
        stages = [_by_row(name, probes, waiting) for name in KINDS]
        missing = dict(_missing(ws, bool(waiting)))
        for strategy, wanted in missing.items():
            stages.append(_selecting(ws, strategy, probes, rows, wanted))
        small, large = probes
        for name, kind in TRAINED.items():
            (t1, _), (t2, mib) = small.a_cell(kind), large.a_cell(kind)
            seconds = _line(STEPS[0], t1, STEPS[1], t2, ws.task.finetune.steps)
            seconds = seconds if name == "finetune" else t2
            count = _trainings(ws, kind, missing, bool(waiting))
            stages.append(Stage(name, count, count * seconds, count * mib))
        held = rows * (large.mib_a_row("pool") + 2 * large.mib_a_row("sketches"))
        memory = large.peak + held
    number = 1 + len(list(_folder(ws).glob("*.json")))
    found = Plan(number, rows, memory, [stage for stage in stages if stage.missing])
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


def _rows_there(ws: Workspace) -> int:
    try:
        members = current_generation(ws, enter=False).members
    except StoreError:
        return 0
    pools = (ws.store.entry(ws.task.name, "pool", member.pool) for member in members)
    return sum(pool.manifest["rows"] for pool in pools if pool is not None)


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
        distinct = {cell.identities["subsets"]: (cell.seed, cell.budget) for cell in every}
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


def _sampled(ws: Workspace, files: Sequence[str], rows: int, steps: int, folder: Path) -> Workspace:
    """The task on the first rows of its files, in a home of its own, with shorter trainings."""
    landing = folder / "landing"
    landing.mkdir(parents=True)
    left = rows
    for number, path in enumerate(reversed(files)):
        left -= _head(path, left, landing / f"{number}{''.join(Path(path).suffixes[-2:])}")
        if left <= 0:
            break
    task, n = ws.task, min(ws.task.budgets[-1], ROWS[0] // 2)
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


class _Probe:
    """The workflow on a sample: its artifacts tell what they took.

    cost: what an example costs on average, in the unit of the task's budgets.
    """

    def __init__(self, ws: Workspace, in_cost: bool) -> None:
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
            self.selected = {}
            for strategy in ws.task.strategies.chosen():
                entries = select(ws, generation, strategy)
                self.selected[strategy] = [entry.manifest["seconds"] for entry in entries]
                if strategy == "random":
                    finetune(ws, generation, strategy)
                    evaluate(ws, generation, strategy)
        self.budgets, column = ws.task.budgets, ws.task.pool.columns.cost
        costs = None if column is None else pool_rows(ws, generation).examples.columns[column]
        self.cost = float(costs.mean()) if costs is not None and in_cost else 1.0
        self.rows = sum(entry.manifest["rows"] for entry in self._of("pool"))

    def _of(self, kind: str) -> list[Entry]:
        """Artifacts of the sample, not of evaluation sets."""
        found = self._ws.store.entries(self._ws.task.name, kind)
        target = {e.identity for e in self._ws.store.entries(self._ws.task.name, "target")}
        return [e for e in found if e.manifest["fields"].get("examples") not in target]

    def row(self, kinds: Sequence[str]) -> tuple[float, float]:
        """Seconds and MiB of all of these kinds."""
        every = [entry for kind in kinds for entry in self._of(kind)]
        return sum(e.manifest["seconds"] for e in every), sum(map(_mib, every))

    def mib_a_row(self, kind: str) -> float:
        """Disk that a row takes."""
        return self.row([kind])[1] / max(1, self.rows)

    def a_cell(self, kind: str) -> tuple[float, float]:
        """Seconds and MiB of one."""
        seconds, mib = self.row([kind])
        return seconds / len(self._of(kind)), mib / len(self._of(kind))

    @cached_property
    def peak(self) -> float:
        """MiB that a process held."""
        every = self._ws.store.entries(self._ws.task.name, "subsets")
        return max(float(entry.manifest["process_peak_mib"]) for entry in every)


def _by_row(name: str, probes: Sequence[_Probe], rows: int) -> Stage:
    """A stage that grows with the rows."""
    small, large = probes
    (s1, m1), (s2, m2) = small.row(KINDS[name]), large.row(KINDS[name])
    seconds = _line(small.rows, s1, large.rows, s2, rows)
    return Stage(name, rows, seconds, _line(small.rows, m1, large.rows, m2, rows))


def _selecting(
    ws: Workspace,
    strategy: str,
    probes: Sequence[_Probe],
    rows: int,
    wanted: Sequence[tuple[int, int]],
) -> Stage:
    """The selections of a strategy: the first of a seed, and others, which may share its work.

    Those that train grow with the steps, not with the rows. Each quota is priced by one more
    selection of the first seed, where the strategy has an objective.
    """
    small, large = probes
    selector, steps = STRATEGIES[strategy], ws.task.settings(strategy).get("steps")
    sizes, quotas = small.budgets, sum(map(len, ws.task.quotas.values()))
    seconds, begun = 0.0, set[int]()
    for seed, budget in wanted:
        which = int(seed in begun)
        begun.add(seed)
        n = min(int(budget / large.cost), rows)
        more = 1 + quotas if seed == 0 and selector.aim and not selector.whole else 1
        t1, t2 = (probe.selected[strategy][which] for probe in probes)
        if steps is not None:
            seconds += _line(STEPS[0], t1, STEPS[1], t2, max(steps, STEPS[1]))  # quotas share it
        else:
            w1, w2 = (selector.work(probe.rows, sizes[which]) for probe in probes)
            seconds += more * _line(w1, t1, w2, t2, selector.work(rows, n))
    each = large.a_cell("subsets")[1]
    return Stage(f"select {strategy}", len(wanted), seconds, each * len(wanted))


def _line(x1: float, y1: float, x2: float, y2: float, x: float) -> float:
    """The line through two points, at x; where it would fall, in proportion to the second."""
    if x == 0:
        return 0.0
    slope = (y2 - y1) / (x2 - x1) if x2 > x1 else 0.0
    if slope <= 0:
        return y2 * max(1.0, x / x2)
    return max(0.0, y2 - slope * x2) + slope * x


def _mib(entry: Entry) -> float:
    return sum(file["bytes"] for file in entry.manifest["files"].values()) / MIB


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
        took = sum(entry.manifest["seconds"] for entry in every)
        return replace(stage, took_seconds=took, took_mib=sum(map(_mib, every)))

    @property
    def peak(self) -> float | None:
        """MiB that the largest process held."""
        kinds = ("sketches", "subsets", "checkpoints", "metrics")
        peaks: list[Any] = [
            entry.manifest["process_peak_mib"] for kind in kinds for entry in self._of(kind)
        ]
        return max(peaks, default=None)
