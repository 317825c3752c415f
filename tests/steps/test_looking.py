"""Looking at what is there: status, explain, export, doctor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dsel_assets.pipeline import run
from dsel_assets.resources.store import MANIFEST, StoreError, file_sha256
from dsel_assets.steps.cells import cells
from dsel_assets.steps.chosen import chosen_ids
from dsel_assets.steps.doctor import examine
from dsel_assets.steps.explain import explain
from dsel_assets.steps.export import export
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.loading import load_pool
from dsel_assets.steps.status import status


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, finished: Callable[[Path], Any]) -> Any:
    """A finished folder that these tests only read."""
    return finished(tmp_path_factory.mktemp("seen"))


def selection(ws: Any, strategy: str, budget: int = 10, seed: int = 0) -> Any:
    for cell in cells(ws, current_generation(ws), strategy):
        if (cell.budget, cell.seed) == (budget, seed):
            return ws.store.get("tiny", "subsets", cell.selection)
    raise AssertionError


# Status


def test_a_finished_task_has_nothing_left_to_select(seen: Any) -> None:
    found = status(seen.workspace())
    assert (found["arrivals"], found["rows"], found["generation"]) == (2, 120, 1)
    assert found["to_select"] == found["not_ingested"] == [] and found["held_back"] == {}
    assert found["verdicts"].keys() >= {"skmm", "bads", "itl"}
    json.dumps(found)


def test_a_task_that_has_not_begun_says_what_it_waits_for(lab: Any) -> None:
    found = status(lab.workspace())
    assert found["generation"] is None and "no arrival is sketched" in found["why"]
    assert found["landed_and_unknown"] == 2


def test_a_changed_setting_leaves_that_strategy_to_select(seen: Any) -> None:
    found = status(seen.workspace("tiny", strategies={"itl": {"noise": 0.5}}))
    assert found["to_select"] == ["itl"]


# Explain


def test_every_chosen_example_is_explained_by_its_selections(seen: Any) -> None:
    ws = seen.workspace()
    for strategy, column in (("itl", "gain"), ("bads", "weight_mean"), ("skmm", "gain")):
        entry = selection(ws, strategy)
        for rank, name in enumerate(chosen_ids(entry)[:3], 1):
            found = explain(ws, name)
            [row] = [
                row
                for row in found["selections"]
                if (row["strategy"], row["budget"], row["seed"]) == (strategy, 10, 0)
            ]
            assert row["rank"] == rank and np.isfinite(row[column])
            assert found["arrivals"][0]["arrival"] in ("a", "b")
            assert 0 <= found["gradient"]["share_of_pool_with_smaller_norm"] < 1


def test_what_was_refused_is_explained_too(lab: Any) -> None:
    from dsel_assets.pipeline import run

    rows = [{**row, "key": f"k{i}"} for i, row in enumerate(lab.rows(100, 130))]
    for split, (start, stop) in {
        "target": (0, 20),
        "validation": (20, 50),
        "test": (50, 90),
    }.items():
        lab_rows = [{**row, "key": f"{split}{i}"} for i, row in enumerate(lab.rows(start, stop))]
        from tests.conftest import write

        write(lab.folder / f"{split}.parquet", lab_rows)
    shutil.rmtree(lab.landing)
    lab.land("one.jsonl", [*rows, {**lab.rows(200, 201)[0], "key": "k3"}])
    ws = lab.workspace(
        pool={"schema": {"id": "key"}},
        strategies=dict.fromkeys(("target_only", "skmm", "bads", "itl", "gradmatch")),
    )
    run(ws)
    found = explain(ws, "k3")
    assert found["arrivals"][0]["row"] == 4
    assert found["quarantine"][0]["reason"] == "conflicting id"


def test_an_id_that_nobody_knows_is_named(seen: Any) -> None:
    with pytest.raises(StoreError, match="no row that landed has the id 'x'"):
        explain(seen.workspace(), "x")


# Export


@pytest.mark.parametrize("form", ["parquet", "jsonl", "hf"])
def test_an_export_of_conversations(lab: Any, tmp_path: Path, form: Any) -> None:
    """Texts as messages, in the place of an input that no trainer of language models reads."""
    rows = [
        row | {"question": f"Was ist „{i}“?", "answer": f"{i}\n{{}}"}
        for i, row in enumerate(lab.rows(100, 160))
    ]
    lab.land("a.parquet", rows)
    (lab.landing / "b.jsonl").unlink()
    keep = {"schema": {"text": ["question", "answer"]}}
    ws = lab.workspace(pool=keep, strategies={"skmm": None, "bads": None, "gradmatch": None})
    run(ws)
    messages = [("user", "question"), ("assistant", "answer")]
    folder = export(ws, "itl", 10, 0, tmp_path / "out", form, messages)
    file = next(path for path in folder.rglob("*") if path.suffix in (".parquet", ".jsonl"))
    if form == "jsonl":
        found = [json.loads(line) for line in file.read_text().splitlines()]
    else:
        found = pq.read_table(file).to_pylist()
    assert len(found) == 10
    for row in found:
        i = int(row["answer"].splitlines()[0])
        assert row["messages"] == [
            {"role": "user", "content": rows[i]["question"]},
            {"role": "assistant", "content": rows[i]["answer"]},
        ]
        assert "input" not in row
    with pytest.raises(StoreError, match=r"of 'label'; pool\.schema\.text names question, answer"):
        export(ws, "itl", 10, 0, tmp_path / "other", form, [("user", "label")])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("form", ["parquet", "jsonl", "hf"])
def test_an_export_holds_the_selection_in_its_order(seen: Any, tmp_path: Path, form: Any) -> None:
    ws = seen.workspace()
    folder = export(ws, "itl", 10, 1, tmp_path / "out", form)
    file = next(path for path in folder.rglob("*") if path.suffix in (".parquet", ".jsonl"))
    if form == "jsonl":
        rows = [json.loads(line) for line in file.read_text().splitlines()]
    else:
        rows = pq.read_table(file).to_pylist()
    assert [row["id"] for row in rows] == chosen_ids(selection(ws, "itl", 10, 1))
    assert [row["rank"] for row in rows] == list(range(1, 11))
    pool = load_pool(ws, current_generation(ws))
    place = {name: i for i, name in enumerate(pool.ids.tolist())}
    for row in rows:
        np.testing.assert_array_equal(
            np.array(row["input"], np.float32), pool.inputs[place[row["id"]]].ravel()
        )
        assert row["label"] == str(pool.labels[place[row["id"]]])
        assert row["arrival"] in ("a", "b") and row["strategy"] == "itl"
    said = json.loads((folder / "manifest.json").read_text())
    assert said["selection"] == selection(ws, "itl", 10, 1).identity and said["rows"] == 10
    for name, digest in said["sha256"].items():
        assert file_sha256(folder / name) == digest


def test_an_export_appears_whole_or_not_at_all(
    seen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsel_assets.steps import export as module

    ws = seen.workspace()
    with pytest.raises(StoreError, match="no strategy 'nobody'"):
        export(ws, "nobody", 10, 0, tmp_path / "out")
    with pytest.raises(StoreError, match=r"budgets are \[5, 10\], seeds 0 to 1"):
        export(ws, "itl", 7, 0, tmp_path / "out")
    monkeypatch.setattr(module, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(ws, "itl", 10, 0, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="name a new folder"):
        export(ws, "itl", 10, 0, tmp_path / "out")


# Doctor


def test_a_finished_store_is_well(seen: Any) -> None:
    assert list(examine(seen.workspace())) == []


def test_each_kind_of_damage_is_found_and_named(done: Any) -> None:
    ws = done.workspace()
    store = done.home / "store" / "tiny"
    flipped, half, unknown = (path for path in sorted((store / "checkpoints").iterdir())[:3])
    weights = flipped / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (half / MANIFEST).unlink()
    (unknown / "notes.txt").write_text("mine")
    left = store / "subsets" / f"abc.part-{2**22 + 1}-00000000"
    left.mkdir()
    (next((store / "pool").iterdir()) / MANIFEST).write_text("{")
    shutil.rmtree(next((store / "metrics").iterdir()))
    found = {one.path: one.problem for one in examine(ws)}
    assert "other bytes" in found.pop(str(weights))
    assert "half-written" in found.pop(str(half))
    assert "no artifact knows" in found.pop(str(unknown / "notes.txt"))
    assert "killed" in found.pop(str(left))
    assert [problem for problem in found.values() if "manifest can't be read" in problem]


def test_cards_name_the_nearest_targets_with_their_own_labels(seen: Any) -> None:
    from dsel_assets.steps.explain import cards, gallery_of, portrait
    from dsel_assets.steps.loading import load_target

    ws = seen.workspace()
    generation, target = current_generation(ws), load_target(ws)
    label = dict(zip(target.ids.tolist(), target.labels.tolist(), strict=True))
    for strategy in ("itl", "skmm", "bads", "random"):
        entry = selection(ws, strategy)
        rows = cards(ws, generation, entry, 4)
        assert [row["example_id"] for row in rows] == chosen_ids(entry)[:4]
        for row in rows:
            assert row["nearest_label"] == str(label[row["nearest_target"]])
            assert row["arrival"] in ("a", "b") and -1 <= row["nearest_cosine"] <= 1
        picture = gallery_of(ws, generation, rows)
        assert picture is not None and picture.startswith(b"\x89PNG")
    name = chosen_ids(selection(ws, "itl"))[0]
    near = explain(ws, name)["nearest"]
    assert len(near) == 3 and near[0]["cosine"] >= near[1]["cosine"] >= near[2]["cosine"]
    pool = load_pool(ws, generation)
    own = pool.sketches[pool.ids == name][0]
    cosines = target.sketches @ own / np.linalg.norm(target.sketches, axis=1) / np.linalg.norm(own)
    assert near[0]["cosine"] == pytest.approx(cosines.max(), abs=1e-5)
    assert near[0]["target"] == target.ids[cosines.argmax()]
    assert portrait(ws, name).startswith(b"\x89PNG")
