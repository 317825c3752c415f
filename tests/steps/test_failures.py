"""What may go wrong on the way, through the real steps: each failure ends as it was agreed.

The rows are those of the field's table of failure modes. Most are tested beside what they belong to
(readers, store, sketches, strategies, tracking); here are those that take several steps. Rows about
text (labels that truncation masks, tokenizers, padding, lengths) wait for text models.
"""

from __future__ import annotations

import http.server
import resource
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dsel_assets.build import build
from dsel_assets.gradients import per_example
from dsel_assets.models import load_weights, save_weights
from dsel_assets.pipeline import run
from dsel_assets.resources.rows import read_rows
from dsel_assets.resources.tracking import Tracking, best_effort
from dsel_assets.runner import resources
from dsel_assets.selection import STRATEGIES
from dsel_assets.steps.arrivals import landed, register
from dsel_assets.steps.cells import cells
from dsel_assets.steps.checkpoints import finetune
from dsel_assets.steps.chosen import chosen_ids
from dsel_assets.steps.doctor import examine
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.loading import load_pool, load_target, pool_rows
from dsel_assets.steps.metrics import evaluate
from dsel_assets.steps.pool import evaluation_set, held_back, ingest, load_examples
from dsel_assets.steps.sketched import SKETCHES
from dsel_assets.steps.sketches import sketch
from dsel_assets.steps.status import status
from dsel_assets.steps.subsets import select
from tests.conftest import write
from tests.steps.test_resume import KINDS, digests

SQL = Path(__file__).parents[2] / "dbt_like_sql"
DEFAULT = ("random", "full", "target_only", "skmm", "bads", "itl", "gradmatch")
FEW: dict[str, Any] = {"strategies": dict.fromkeys(("target_only", "skmm", "bads", "itl"))}
SHORT = {"steps": 20, "batch_size": 16}
ALL = {name: {} for name in STRATEGIES} | {
    "bads": SHORT,
    "bads_joint": SHORT,
    "smallloss": SHORT,
    "cleanlab": SHORT | {"folds": 2},
}


def overflowing(scale: float = 1.0) -> list[list[float]]:
    """An input that is finite and whose gradient is not."""
    return [[scale * 3e38 * (-1) ** (i + j) for i in range(8)] for j in range(8)]


def arrive(ws: Any) -> None:
    """All that landed, as far as sketches."""
    for file in landed(ws):
        if known := register(ws, file):
            pool = ingest(ws, known.key)
            if held_back(ws, pool) is None:
                sketch(ws, pool)


def only(lab: Any, rows: Any) -> None:
    """Nothing has landed but these rows."""
    for path in lab.landing.iterdir():
        path.unlink()
    lab.land("a.jsonl", rows)


def selections(ws: Any, strategy: str) -> list[list[str]]:
    return [chosen_ids(entry) for entry in select(ws, current_generation(ws), strategy)]


def quarantine(entry: Any) -> list[dict[str, Any]]:
    return pq.read_table(entry.file("quarantine.parquet")).to_pylist()


def execute(task: Any, job: str, partition: str | None = None) -> Any:
    """A job in Dagster, in a history of its own."""
    defs = dg.Definitions.merge(
        build(task, SQL), dg.Definitions(resources=resources(), executor=dg.in_process_executor)
    )
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions("tiny_arrivals", [partition] if partition else [])
        return defs.resolve_job_def(f"tiny_{job}").execute_in_process(
            partition_key=partition, instance=instance, raise_on_error=False
        )


def failed(result: Any) -> set[str]:
    """Checks that did not pass, but for those that a task of this size never passes."""
    small = {"dimension_is_enough", "more_than_chance", "weights_hold"}
    found = result.get_asset_check_evaluations()
    return {check.check_name for check in found if not check.passed} - small


def told(result: Any) -> str:
    """Everything that a run's materialisations and checks say."""
    events = [*result.get_asset_materialization_events(), *result.get_asset_check_evaluations()]
    found = [
        event.materialization if hasattr(event, "materialization") else event for event in events
    ]
    return " ".join(str(value.value) for event in found for value in event.metadata.values())


# Gradients that are not finite


def test_a_row_without_a_finite_gradient_is_chosen_by_nobody(lab: Any) -> None:
    """Also not by those who take everything."""
    rows = lab.rows(100, 130)
    rows[4]["image"] = overflowing()
    only(lab, rows)
    ws = lab.workspace(budgets=[5, 40], promote={"budget": 40})
    arrive(ws)
    bad = str(load_examples(ingest(ws, "a")).ids[4])
    pool = load_pool(ws, current_generation(ws))
    assert len(pool) == 29 and bad not in pool.ids
    with pytest.warns(UserWarning, match="40 takes all 29 examples"):
        found = {strategy: selections(ws, strategy) for strategy in DEFAULT}
    assert not any(bad in ids for sets in found.values() for ids in sets)
    for name in set(DEFAULT) - {"target_only"}:
        assert max(map(len, found[name])) == 29


def test_an_arrival_of_which_much_has_no_finite_gradient_fails_a_check(lab: Any) -> None:
    rows = lab.rows(220, 250)
    for i, row in enumerate(rows[:15]):
        row["image"] = overflowing(1 - i / 100)
    lab.land("c.jsonl", rows)
    ws = lab.workspace()
    arrive(ws)
    assert sketch(ws, ingest(ws, "c")).gradients.summary["quarantined"] == 15
    assert failed(execute(lab.task(), "ingest", "c"))


def spoilt_target(lab: Any, spoilt: int) -> dict[str, Any]:
    """A target set of which the first rows have no finite gradient."""
    rows = lab.rows(0, 20)
    for i, row in enumerate(rows[:spoilt]):
        row["image"] = overflowing(1 - i / 100)
    return {"target": {"source": str(write(lab.folder / "target.jsonl", rows))}}


def test_a_target_row_without_a_finite_gradient_is_named_and_read_by_no_strategy(lab: Any) -> None:
    ws = lab.workspace(**spoilt_target(lab, 1))
    arrive(ws)
    examples = evaluation_set(ws, "target")
    (line,) = quarantine(sketch(ws, examples).gradients)
    assert (line["source"], line["row"], line["reason"]) == ("target", 1, "non-finite gradient")
    assert line["example_id"] == load_examples(examples).ids[0]
    target = load_target(ws)
    assert target is not None and len(target) == 19
    assert target.sketches is not None and np.isfinite(target.sketches).all()
    entries = select(ws, current_generation(ws), "itl")
    table = pq.read_table(entries[-1].file("rows.parquet"))
    assert np.isfinite(table["gain"].to_numpy()).all()
    assert line["example_id"] not in table["nearest_target"].to_pylist()


def test_a_target_row_without_a_finite_gradient_spoils_no_model(lab: Any) -> None:
    """Or it is refused by name, before anything is trained."""
    ws = lab.workspace(**spoilt_target(lab, 1))
    try:
        arrive(ws)
        generation = current_generation(ws)
        select(ws, generation, "random")
        entries = finetune(ws, generation, "random")
    except Exception as error:
        assert "row 1" in str(error)
    else:
        weights = load_weights(entries[0].file("weights.safetensors"))
        assert all(tensor.isfinite().all() for tensor in weights.values())
        evaluate(ws, generation, "random")


@pytest.mark.parametrize("strategy", ["itl", "bads", "gradmatch"])
def test_a_target_without_a_usable_row_is_refused(lab: Any, strategy: str) -> None:
    ws = lab.workspace(**spoilt_target(lab, 20))
    arrive(ws)
    with pytest.raises(ValueError, match=f"{strategy} needs a target set, and there is none"):
        select(ws, current_generation(ws), strategy)


def test_rows_without_a_gradient_have_no_cosine(lab: Any) -> None:
    """A base model that is certain of 0: zeros of pool and target have no direction."""
    weights = load_weights(lab.folder / "base.safetensors")
    sure = torch.zeros(10)
    sure[0] = 1000
    save_weights(weights | {"3.bias": sure}, lab.folder / "base.safetensors")
    ws = lab.workspace(budgets=[5, 200], promote={"budget": 5})
    arrive(ws)
    pool = load_pool(ws, current_generation(ws))
    target = load_target(ws)
    assert target is not None and 0 not in pool.labels and 0 not in target.labels
    with pytest.warns(UserWarning, match="takes all"):
        entries = select(ws, current_generation(ws), "gradmatch")
    rows = pq.read_table(entries[-1].file("rows.parquet"))
    assert len(rows) == len(pool) and np.isfinite(rows["score"].to_numpy()).all()
    refused = [line for key in ("a", "b") for line in quarantine(sketch(ws, ingest(ws, key))[0])]
    assert {line["reason"] for line in refused} == {"zero gradient"}
    assert len(refused) == 120 - len(pool)


# What arrives


def test_a_batch_that_comes_again_in_other_bytes_changes_no_choice(done: Any) -> None:
    ws = done.workspace()
    fixed = ("random", "itl", "gradmatch")
    before = {strategy: selections(ws, strategy) for strategy in fixed}
    pool = load_pool(ws, current_generation(ws))
    rows = done.rows(100, 160)
    done.land("z.jsonl", rows[::-1])
    arrive(ws)
    generation = current_generation(ws)
    there = pool_rows(ws, generation)
    again, duplicates, conflicts = there.examples, there.duplicates, there.conflicts
    assert again.ids.tolist() == pool.ids.tolist()
    assert len(duplicates) == 60 and not len(conflicts)
    assert {strategy: selections(ws, strategy) for strategy in fixed} == before


def drifted(lab: Any, how: str) -> list[dict[str, Any]]:
    """An arrival whose columns are not those of the ones before."""
    rows = lab.rows(220, 250)
    for row in rows:
        if how == "a column of nulls":
            row["source"] = None
        elif how == "a new column":
            row |= {"quality": 0.5, "tags": ["x"]}
        elif how == "labels as text":
            row["label"] = str(row["label"])
        elif how == "labels as floats":
            row["label"] = float(row["label"])
        elif how == "labels of nulls":
            row["label"] = None
        elif how == "a column under another name":
            row["lable"] = row.pop("label")
    return rows


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("a column of nulls", None),
        ("a new column", None),
        ("labels as text", None),
        ("labels as floats", "wrong type"),
        ("labels of nulls", "empty"),
        ("a column under another name", "missing column"),
    ],
)
def test_drift_of_the_schema_is_coerced_by_rule_or_held_back(
    lab: Any, how: str, reason: str | None, ending: str
) -> None:
    """Whether it is the first arrival or a later one: the contract is the task's, not a file's."""
    plain = write(lab.folder / "plain.jsonl", lab.rows(220, 250))
    expected = load_examples(_of(lab.workspace("other"), lab, plain))
    lab.land(f"0.{ending}", drifted(lab, how))
    ws = lab.workspace()
    arrive(ws)
    entry = ingest(ws, "0")
    why = held_back(ws, entry)
    members = [member.arrival for member in current_generation(ws).members]
    if reason is None:
        assert why is None and members == ["0", "a", "b"]
        assert load_examples(entry).ids.tolist() == expected.ids.tolist()
    else:
        assert why is not None and f"{{'{reason}': 30}}" in why and members == ["a", "b"]
        assert all("column 'label'" in line["detail"] for line in quarantine(entry))


def _of(ws: Any, lab: Any, path: Path) -> Any:
    """What a file would be as an arrival of another task."""
    path.rename(lab.landing / "y.jsonl")
    for file in landed(ws):
        register(ws, file)
    entry = ingest(ws, "y")
    (lab.landing / "y.jsonl").unlink()
    return entry


def test_drift_of_the_schema_is_shown_column_by_column(lab: Any) -> None:
    lab.land("c.jsonl", drifted(lab, "a column under another name"))
    ws = lab.workspace()
    for file in landed(ws):
        register(ws, file)
    assert ingest(ws, "c").summary["undeclared_columns"] == ["lable"]
    said = told(execute(lab.task(), "ingest", "c"))
    assert "label" in said and "lable" in said


def test_an_arrival_without_rows_is_recorded_and_changes_nothing(lab: Any) -> None:
    ws = lab.workspace()
    arrive(ws)
    generation = current_generation(ws)
    path = lab.land("c.parquet", lab.rows(220, 221))
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    for file in landed(ws):
        register(ws, file)
    result = execute(lab.task(), "ingest", "c")
    assert result.success and not failed(result)
    events = {e.asset_key.path[-1]: e for e in result.get_asset_materialization_events()}
    assert events.keys() >= {"pool", "gradients", "sketches"}
    metadata = events["pool"].materialization.metadata
    assert metadata["rows_seen"].value == metadata["dagster/row_count"].value == 0
    assert current_generation(ws) == generation


def test_a_file_that_is_not_whole_is_told_with_its_reason(lab: Any) -> None:
    path = lab.land("c.parquet", lab.rows(220, 250))
    path.write_bytes(path.read_bytes()[:-100])
    ws = lab.workspace()
    arrive(ws)
    found = status(ws)
    assert found["held_back"] == {"c": "the file can't be read"} and found["rows"] == 120
    (line,) = quarantine(ingest(ws, "c"))
    assert line["reason"] == "unreadable file" and line["detail"]


# Pools that are poor, small, or smaller than the budget


def test_a_pool_of_one_class_stops_no_strategy(lab: Any) -> None:
    only(lab, [row for row in lab.rows(100, 400) if row["label"] == 3])
    ws = lab.workspace(strategies=ALL, budgets=[5], promote={"budget": 5})
    arrive(ws)
    assert set(load_pool(ws, current_generation(ws)).labels) == {3}
    for strategy in STRATEGIES.keys() - {"cleanlab"}:
        for ids in selections(ws, strategy):
            assert STRATEGIES[strategy].whole or len(ids) == len(set(ids)) == 5


def test_a_pool_of_one_class_does_not_stop_cleanlab(lab: Any) -> None:
    only(lab, [row for row in lab.rows(100, 400) if row["label"] == 3])
    ws = lab.workspace(strategies={"cleanlab": ALL["cleanlab"]})
    arrive(ws)
    assert [len(ids) for ids in selections(ws, "cleanlab")] == [5, 5, 10, 10]


def test_a_target_of_classes_that_the_pool_lacks_stops_no_strategy(lab: Any) -> None:
    only(lab, [row for row in lab.rows(100, 200) if row["label"] < 5])
    target = write(lab.folder / "t.jsonl", [r for r in lab.rows(0, 20) if r["label"] >= 5])
    ws = lab.workspace(
        strategies=ALL, budgets=[5], promote={"budget": 5}, target={"source": str(target)}
    )
    arrive(ws)
    for strategy in STRATEGIES:
        for ids in selections(ws, strategy):
            assert STRATEGIES[strategy].whole or len(ids) == len(set(ids)) == 5


def test_every_budget_about_the_size_of_the_pool_goes_to_the_verdict(lab: Any) -> None:
    only(lab, lab.rows(100, 112))
    ws = lab.workspace(
        budgets=[1, 11, 12, 13], promote={"budget": 13}, finetune={"steps": 3, "batch_size": 4}
    )
    with pytest.warns(UserWarning, match=r"budgets: 13 takes all 12 examples of the pool"):
        _, rows = run(ws)
    assert {row["budget"] for row in rows} == {1, 11, 12, 13}
    for strategy in set(DEFAULT) - {"full", "target_only"}:
        sizes = [len(ids) for ids in selections(ws, strategy)]
        assert sizes == [1, 1, 11, 11, 12, 12, 12, 12]


# Memory, disk, and what changed in between


@contextmanager
def memory(fits: Callable[[torch.Tensor], bool]) -> Iterator[list[int]]:
    """A device on which some batches do not fit; records how many examples were tried at once."""
    real, tried = torch.func.vmap, list[int]()

    def limited(function: Any, **given: Any) -> Any:
        mapped = real(function, **given)

        def call(weights: Any, inputs: torch.Tensor, *rest: Any) -> Any:
            tried.append(len(inputs))
            if not fits(inputs):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return mapped(weights, inputs, *rest)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(per_example, "vmap", limited)
        yield tried


def sketched(ws: Any, key: str) -> Any:
    for file in landed(ws):
        register(ws, file)
    return sketch(ws, ingest(ws, key))


def test_sketches_made_with_little_memory_are_the_same(lab: Any) -> None:
    expected = sketched(lab.workspace("other"), "a").sketches
    with memory(lambda inputs: len(inputs) <= 9) as tried:
        found = sketched(lab.workspace(), "a").sketches
    assert tried[:4] == [60, 32, 16, 8] and set(tried[4:]) <= {8, 4}
    np.testing.assert_allclose(
        read_rows(found.file(SKETCHES)), read_rows(expected.file(SKETCHES)), rtol=1e-5, atol=1e-6
    )
    ids = [pq.read_table(entry.file("ids.parquet")) for entry in (found, expected)]
    assert ids[0] == ids[1] and found.summary["quality"]["within"] == 1


@pytest.mark.xfail(
    strict=True,
    raises=torch.OutOfMemoryError,
    reason="inputs have one shape, so no row is longer than another; text will need it",
)
def test_a_row_that_does_not_fit_into_memory_alone_is_quarantined(lab: Any) -> None:
    ws = lab.workspace()
    long = torch.tensor(lab.rows(104, 105)[0]["image"]) / 255

    def fits(inputs: torch.Tensor) -> bool:
        return not any(torch.equal(row, long) for row in inputs)

    with memory(fits):
        made = sketched(ws, "a")
    assert made.sketches.manifest["rows"] == 59
    (line,) = quarantine(made.gradients)
    assert line["row"] == 5


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A disk on which no file finds room for more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing_half_written_and_the_next_run_goes_on(
    lab: Any, finished: Callable[[Path], Any], tmp_path: Path
) -> None:
    ws = lab.workspace(**FEW)
    store = lab.home / "store" / "tiny"
    reached = []
    # an input's row is 256 bytes, a sketch's too, the model's weights 38 KB
    for size in (100, 4_000, 20_000, 38_500):
        with no_file_above(size), pytest.raises(Exception) as caught:
            run(ws)
        assert not isinstance(caught.value, AssertionError)
        assert not list(store.rglob("*.part*")) and list(examine(ws)) == []
        reached.append(sum(1 for _ in store.rglob("manifest.json")))
    assert reached == sorted(reached) and reached[-1] > 0
    run(ws)
    undisturbed = finished(tmp_path / "undisturbed").home / "store" / "tiny"
    assert digests(store, KINDS[:-1]).items() <= digests(undisturbed).items()


def test_another_base_model_makes_all_stale_and_status_says_so(done: Any) -> None:
    ws = done.workspace()
    before = {cell.metric["checkpoint"] for cell in cells(ws, current_generation(ws))}
    weights = load_weights(done.folder / "base.safetensors")
    moved = {name: tensor + 1e-3 for name, tensor in weights.items()}
    save_weights(moved, done.folder / "base.safetensors")
    changed = done.workspace(**FEW)
    found = status(changed)
    assert found["generation"] is None and "ingested under other settings" in found["why"]
    run(changed)
    generation = current_generation(changed)
    assert generation.number == 2 and status(changed)["to_select"] == []
    after = {cell.metric["checkpoint"] for cell in cells(changed, generation)}
    assert not before & after


def test_one_operator_for_every_arrival(lab: Any) -> None:
    """The same rows, sketched days apart and in other company, are the same vectors."""
    ws = lab.workspace()
    first = read_rows(sketched(ws, "a").sketches.file(SKETCHES))
    lab.land("c.jsonl", lab.rows(150, 180))
    later = read_rows(sketched(lab.workspace(), "c").sketches.file(SKETCHES))
    np.testing.assert_allclose(later[:10], first[50:], rtol=1e-5, atol=1e-6)


# Choices and what is said of them


def test_a_choice_that_collapses_to_one_class_is_a_warning(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row for row in lab.rows(0, 20) if row["label"] == 3]
    target = write(lab.folder / "t.jsonl", rows)
    changes: dict[str, Any] = FEW | {
        "target": {"source": str(target)},
        "budgets": [10],
        "finetune": {"steps": 3},
    }
    monkeypatch.setenv("DSEL_MLFLOW_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    ws = lab.workspace(**changes)
    run(ws)
    pool = load_pool(ws, current_generation(ws))
    labels = dict(zip(pool.ids.tolist(), pool.labels.tolist(), strict=True))
    found = Counter(labels[name] for ids in selections(ws, "gradmatch") for name in ids)
    assert len(set(labels.values())) == 10 and found.most_common(1)[0][0] == 3
    assert found[3] / found.total() > 0.7
    resources()["warehouse"].initialise()
    result = execute(lab.task(**changes), "compare")
    assert result.success  # it warns, it does not stop
    assert failed(result)


def test_no_choice_depends_on_validation_or_test(lab: Any) -> None:
    """Their rows are kept out of the pool; whatever else they hold, the same is chosen."""
    found = []
    for name, fewer in (("tiny", 0), ("other", 15)):
        test = write(lab.folder / f"{name}-test.jsonl", lab.rows(50 + fewer, 90))
        validation = write(lab.folder / f"{name}-validation.jsonl", lab.rows(20 + fewer, 50))
        ws = lab.workspace(name, test={"source": str(test)}, validation={"source": str(validation)})
        arrive(ws)
        found.append({strategy: selections(ws, strategy) for strategy in DEFAULT})
    assert found[0] == found[1]


# MLflow


class Busy(http.server.BaseHTTPRequestHandler):
    """Too many requests, whatever is asked; says how many seconds to wait."""

    wait = "0"

    def do_GET(self) -> None:
        self.send_response(429)
        self.send_header("Retry-After", self.wait)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow is a server that limits the rate."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("DSEL_MLFLOW_URI", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


def test_a_tracker_that_limits_the_rate_fails_no_run(done: Any, busy: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = execute(done.task(), "select", "random")
    assert result.success and "metrics" in {
        event.asset_key.path[-1] for event in result.get_asset_materialization_events()
    }


def test_a_tracker_that_limits_the_rate_holds_up_nothing(
    tmp_path: Path, busy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere it may say an hour; meanwhile every process of this home would wait."""
    monkeypatch.setattr(Busy, "wait", "3")
    tracking = Tracking.at(tmp_path)
    _ = tracking._client
    started = time.monotonic()
    with pytest.warns(UserWarning, match="not in MLflow: a cell"), best_effort("a cell"):
        tracking.log_cells("tiny", 1, [], {})
    assert time.monotonic() - started < 2
