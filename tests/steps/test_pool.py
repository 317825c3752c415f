from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dsel_assets.pipeline import run
from dsel_assets.steps.arrivals import landed, register
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.pool import evaluation_set, held_back, ingest, load_examples
from dsel_assets.task import TaskError

FEW = {"strategies": {name: None for name in ("target_only", "skmm", "bads", "itl", "gradmatch")}}


def ingested(ws: Any, key: str) -> Any:
    for file in landed(ws):
        register(ws, file)
    return ingest(ws, key)


def quarantine(entry: Any) -> list[dict[str, Any]]:
    return pq.read_table(entry.file("quarantine.parquet")).to_pylist()


def test_good_rows_are_examples_under_their_content(lab: Any) -> None:
    entry = ingested(lab.workspace(), "a")
    examples = load_examples(entry)
    assert len(examples) == len(set(examples.ids)) == entry.manifest["rows"] == 60
    np.testing.assert_allclose(
        examples.inputs, np.array([row["image"] for row in lab.rows(100, 160)]) / 255, rtol=1e-6
    )
    assert entry.summary["quarantined"] == 0


def test_a_truncated_file_is_held_back_and_others_go_on(lab: Any) -> None:
    path = lab.land("bad.parquet", lab.rows(220, 280))
    path.write_bytes(path.read_bytes()[:-200])
    ws = lab.workspace(**FEW)
    run(ws)
    entry = ingest(ws, "bad")
    assert held_back(ws, entry) == "the file can't be read"
    assert [line["reason"] for line in quarantine(entry)] == ["unreadable file"]
    assert [member.arrival for member in current_generation(ws).members] == ["a", "b"]


@pytest.mark.parametrize("content", [b"", b"PAR1", b"\x00" * 100, b"{}\n"])
def test_no_parquet_at_all(lab: Any, content: bytes) -> None:
    (lab.landing / "bad.parquet").write_bytes(content)
    ws = lab.workspace()
    assert held_back(ws, ingested(ws, "bad")) == "the file can't be read"


def test_an_empty_file_of_lines_is_fine(lab: Any) -> None:
    (lab.landing / "0.jsonl").write_text("")
    ws = lab.workspace(**FEW)
    run(ws)
    assert held_back(ws, ingest(ws, "0")) is None
    assert [member.arrival for member in current_generation(ws).members] == ["a", "b"]


def test_a_broken_line_costs_one_row(lab: Any) -> None:
    lines = (lab.landing / "b.jsonl").read_text().splitlines()
    lines[3] = lines[3][:-5]
    (lab.landing / "b.jsonl").write_text("\n".join(lines))
    ws = lab.workspace()
    entry = ingested(ws, "b")
    assert [(line["row"], line["reason"]) for line in quarantine(entry)] == [(4, "broken line")]
    assert entry.manifest["rows"] == 59 and held_back(ws, entry) is None


@pytest.mark.parametrize("split", [slice(0, 3), slice(20, 23), slice(50, 53)])
def test_copies_of_evaluation_images_are_leaks(lab: Any, split: slice) -> None:
    """Whatever label they bear; they cost rows, not the arrival."""
    copies = [row | {"label": 9 - row["label"]} for row in lab.rows(split.start, split.stop)]
    lab.land("c.jsonl", lab.rows(220, 250) + copies)
    ws = lab.workspace()
    entry = ingested(ws, "c")
    assert [(line["row"], line["reason"]) for line in quarantine(entry)] == [
        (31, "leak"),
        (32, "leak"),
        (33, "leak"),
    ]
    assert entry.manifest["rows"] == 30 and held_back(ws, entry) is None


def test_too_many_bad_rows_hold_the_arrival_back(lab: Any) -> None:
    rows = lab.rows(220, 250)
    for row in rows[:7]:
        row["label"] = 10
    lab.land("c.jsonl", rows)
    ws = lab.workspace()
    why = held_back(ws, ingested(ws, "c"))
    assert why is not None and "23% of its rows" in why and "unknown label" in why
    patient = lab.workspace(pool={"max_quarantine": 0.25})
    assert held_back(patient, ingested(patient, "c")) is None


def test_a_bad_evaluation_row_is_an_error_that_names_it(lab: Any) -> None:
    rows = lab.rows(0, 20)
    rows[6]["label"] = None
    (lab.folder / "target.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ws = lab.workspace(target={"source": str(lab.folder / "target.jsonl")})
    with pytest.raises(TaskError, match=r"1 of 20 rows of target.*row 7 \(empty\)"):
        evaluation_set(ws, "target")


def test_nothing_is_written_twice(lab: Any) -> None:
    ws = lab.workspace()
    assert not ingested(ws, "a").reused
    assert ingest(ws, "a").reused
