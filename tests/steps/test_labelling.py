"""Asking for labels in rounds: what is asked, what waits, what comes back."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dsel_assets.resources.store import StoreError
from dsel_assets.steps.arrivals import arrivals, landed, register
from dsel_assets.steps.chosen import chosen_ids as asked_ids
from dsel_assets.steps.labelling import (
    load_candidates,
    next_round,
    requests_file,
    standing,
)
from dsel_assets.steps.pool import ingest
from dsel_assets.steps.sketches import sketch
from tests.conftest import write

BATCH = 8


def unlabelled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "label"} for row in rows]


def loop(lab: Any, **active: Any) -> Any:
    """A workspace whose candidates are digits 230 to 300, in two files."""
    folder = lab.folder / "candidates"
    if not folder.exists():
        write(folder / "one.parquet", unlabelled(lab.rows(230, 260)))
        write(folder / "two.jsonl", unlabelled(lab.rows(260, 300)))
    return lab.workspace(active={"candidates": str(folder), "batch": BATCH, **active})


def take_in(ws: Any) -> None:
    for file in landed(ws):
        register(ws, file)
    for known in arrivals(ws):
        sketch(ws, ingest(ws, known.key))


def answer(lab: Any, ws: Any, name: str, count: int = BATCH) -> None:
    """Fill in the labels of the newest round's first rows, as a person would, and land them."""
    truth = {tuple(np.ravel(row["image"])): row["label"] for row in lab.rows(230, 300)}
    table = pq.read_table(requests_file(standing(ws).rounds[-1])).to_pylist()[:count]
    for row in table:
        assert row["label"] is None
        row["label"] = truth[tuple(np.rint(np.array(row["image"]) * 255).astype(int))]
    write(lab.landing / name, table)
    take_in(ws)


def test_a_round_waits_until_its_rows_are_labelled(lab: Any) -> None:
    ws = loop(lab)
    take_in(ws)
    first = next_round(ws)
    assert first.manifest["rows"] == BATCH == len(set(asked_ids(first)))
    assert standing(ws).waiting == asked_ids(first) and standing(ws).labelled == []
    assert next_round(ws).identity == first.identity
    answer(lab, ws, "labelled1.jsonl", BATCH - 1)
    assert standing(ws).waiting == asked_ids(first)[-1:]
    assert next_round(ws).identity == first.identity
    answer(lab, ws, "labelled1.parquet")
    assert standing(ws).waiting == []
    second = next_round(ws)
    assert second.summary["round"] == 2 and second.summary["labelled_before"] == BATCH
    assert not set(asked_ids(first)) & set(asked_ids(second))
    # what was labelled is in the pool that the next model is trained on
    assert second.summary["pool"] == first.summary["pool"] + BATCH


def test_a_share_may_begin_the_next_round_and_the_rest_goes_on_waiting(lab: Any) -> None:
    ws = loop(lab, wait_for=0.5)
    take_in(ws)
    first = next_round(ws)
    answer(lab, ws, "half.parquet", BATCH // 2)
    second = next_round(ws)
    assert second.summary["waiting_before"] == BATCH // 2
    assert standing(ws).waiting == asked_ids(first)[BATCH // 2 :] + asked_ids(second)


def test_rows_that_nobody_can_label_do_not_stop_the_rounds(lab: Any) -> None:
    """Of ten rows a round the last two never come back."""
    ws = loop(lab, batch=10, wait_for=0.8)
    take_in(ws)
    for number in range(1, 5):
        assert next_round(ws).summary["round"] == number
        answer(lab, ws, f"most{number}.parquet", 7)
        assert next_round(ws).summary["round"] == number
        answer(lab, ws, f"enough{number}.parquet", 8)
    assert len(standing(ws).waiting) == 8


def test_waiting_rows_count_as_observed_wherever_their_file_is(lab: Any) -> None:
    ws = loop(lab, wait_for=0.5)
    take_in(ws)
    next_round(ws)
    answer(lab, ws, "half.parquet", BATCH // 2)
    second = asked_ids(next_round(ws))
    [newest] = [e for e in standing(ws).rounds if e.summary["round"] == 2]
    shutil.rmtree(newest.path)
    waiting = set(standing(ws).waiting)
    rows = unlabelled(lab.rows(230, 300))
    known, _ = load_candidates(ws)
    pixels = (tuple(np.rint(x.ravel() * 255).astype(int)) for x in known.inputs)
    of = dict(zip(pixels, known.ids, strict=True))
    shutil.rmtree(lab.folder / "candidates")
    left = [row for row in rows if of[tuple(np.ravel(row["image"]))] not in waiting]
    write(lab.folder / "candidates" / "left.parquet", left)
    assert len(left) == 70 - len(waiting) and asked_ids(next_round(ws)) == second


def test_without_an_arrival_the_base_model_and_the_target_ask(lab: Any) -> None:
    shutil.rmtree(lab.landing)
    ws = loop(lab)
    first = next_round(ws)
    assert first.summary["pool"] == 0 and len(asked_ids(first)) == BATCH
    answer(lab, ws, "first.parquet")
    assert next_round(ws).summary["pool"] == BATCH


def test_the_same_rows_are_asked_for_whatever_the_files_are_called(lab: Any) -> None:
    ws = loop(lab)
    take_in(ws)
    first = asked_ids(next_round(ws))
    shutil.rmtree(lab.home / "store" / "tiny" / "label_requests")
    shutil.rmtree(lab.folder / "candidates")
    rows = unlabelled(lab.rows(230, 300))
    write(lab.folder / "candidates" / "all.jsonl", rows[::-1] + rows[:5])
    assert asked_ids(next_round(ws)) == first


def test_rows_of_the_pool_and_of_the_evaluation_sets_are_not_asked_for(lab: Any) -> None:
    folder = lab.folder / "candidates"
    write(folder / "known.parquet", unlabelled(lab.rows(100, 110) + lab.rows(45, 60)))
    write(folder / "broken.jsonl", [{"image": [1, 2], "source": "x"}])
    write(folder / "new.parquet", unlabelled(lab.rows(230, 240)))
    ws = loop(lab, batch=50)
    take_in(ws)
    newest = next_round(ws)
    new, _ = load_candidates(ws)
    assert len(asked_ids(newest)) == 10 and set(asked_ids(newest)) < set(new.ids)
    assert newest.summary["candidates_refused"] == {"leak": 15, "wrong shape": 1}


def test_it_ends_when_no_candidate_or_no_round_is_left(lab: Any) -> None:
    ws = loop(lab, batch=40, rounds=2)
    take_in(ws)
    for number in (1, 2):
        assert next_round(ws).summary["round"] == number
        answer(lab, ws, f"labels{number}.parquet", 40)
    assert next_round(ws).summary["round"] == 2  # 70 candidates: 40, then 30
    assert len(standing(ws).labelled) == 70


def test_no_candidate_at_all_is_said(lab: Any) -> None:
    ws = lab.workspace(active={"candidates": str(lab.folder / "nowhere")})
    with pytest.raises(StoreError, match="holds no row that lacks a label"):
        next_round(ws)


def test_ids_of_the_data_are_kept(lab: Any) -> None:
    folder = lab.folder / "candidates"
    rows = [{**row, "key": f"k{i}"} for i, row in enumerate(lab.rows(230, 250))]
    write(folder / "one.parquet", unlabelled(rows))
    shutil.rmtree(lab.landing)
    for split in ("target", "validation", "test"):
        table = pq.read_table(lab.folder / f"{split}.parquet").to_pylist()
        write(
            lab.folder / f"{split}.parquet",
            [{**row, "key": f"{split}{i}"} for i, row in enumerate(table)],
        )
    ws = lab.workspace(
        active={"candidates": str(folder), "batch": 5}, pool={"schema": {"id": "key"}}
    )
    first = next_round(ws)
    assert set(asked_ids(first)) <= {row["key"] for row in rows}
    answer(lab, ws, "labelled.parquet", 5)
    assert standing(ws).waiting == [] and len(standing(ws).labelled) == 5


def test_a_candidate_file_that_is_not_whole_costs_only_itself(lab: Any) -> None:
    ws = loop(lab)
    whole, _ = load_candidates(ws)
    path = lab.folder / "candidates" / "one.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    left, refused = load_candidates(ws)
    assert len(whole) == 70 and len(left) == 40 and refused == {"unreadable file": 1}
