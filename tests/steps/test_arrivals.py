from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from dsel_assets.steps.arrivals import arrival, arrivals, landed, register
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.pool import held_back, ingest


def register_all(ws: Any) -> list[str]:
    """Keys of what is new."""
    entered = [register(ws, file) for file in landed(ws)]
    return [known.key for known in entered if known]


def test_every_file_is_registered_once(lab: Any) -> None:
    ws = lab.workspace()
    assert register_all(ws) == ["a", "b"]
    assert register_all(ws) == []
    assert [known.key for known in arrivals(ws)] == ["a", "b"]
    assert arrival(ws, "b").path == str(lab.landing / "b.jsonl")


def test_same_content_under_another_name_is_no_arrival(lab: Any) -> None:
    ws = lab.workspace()
    register_all(ws)
    shutil.copy(lab.landing / "a.parquet", lab.landing / "again.parquet")
    assert register_all(ws) == []


def test_same_name_with_new_content_is_a_new_arrival(lab: Any) -> None:
    ws = lab.workspace()
    register_all(ws)
    old = arrival(ws, "a")
    lab.land("a.parquet", lab.rows(220, 250))
    (key,) = register_all(ws)
    assert key == f"a-{arrival(ws, key).digest[:8]}"
    assert arrival(ws, "a") == old


def test_same_stem_with_two_endings_are_two_arrivals(lab: Any) -> None:
    ws = lab.workspace()
    lab.land("a.jsonl", lab.rows(220, 250))
    assert [key.partition("-")[0] for key in register_all(ws)] == ["a", "a", "b"]
    assert len({known.key for known in arrivals(ws)}) == 3


WEIRD = [
    "größe ✓.jsonl",
    'it\'s "quoted" `$(x)`.jsonl',
    "..%2F..%2Fetc.jsonl",
    "...jsonl",
    "a|b,c;d&e...f.jsonl",
    "  spaces  .jsonl",
    "[glob]*?{x}.jsonl",
    "日本語.jsonl",
    "UPPER.JSONL",
    "x" * 240 + ".jsonl",
    "-rf.jsonl",
    "lock.jsonl",
    "new\nline.jsonl",
]


def test_weird_names_give_safe_keys(lab: Any) -> None:
    ws = lab.workspace()
    register_all(ws)
    for i, name in enumerate(WEIRD):
        lab.land("x.jsonl", lab.rows(220 + i, 221 + i)).rename(lab.landing / name)
    new = register_all(ws)
    assert len(new) == len(WEIRD) == len(set(new))
    for key in new:
        assert re.fullmatch(r"[a-z0-9_][a-z0-9_-]{0,100}", key), key
        assert ingest(ws, key).manifest["rows"] == 1
    assert len(arrivals(ws)) == 2 + len(WEIRD)


def test_a_name_that_is_no_utf8_goes_through(lab: Any) -> None:
    from dsel_assets.pipeline import run

    ws = lab.workspace(
        strategies={n: None for n in ("target_only", "skmm", "bads", "itl", "gradmatch")}
    )
    os.rename(lab.landing / "b.jsonl", os.fsencode(lab.landing) + b"/caf\xe9.jsonl")
    run(ws)
    assert [m.arrival for m in current_generation(ws).members] == ["a", "caf"]


def test_names_that_climb_out_of_the_folder() -> None:
    from dsel_assets.steps.arrivals import _key

    for path in ("s3://bucket/../../secret.parquet", "/landing/../../x/../secret.parquet"):
        assert _key(path) == "secret"
    assert _key("/landing/.jsonl") == "arrival"


def test_folders_and_other_endings_are_ignored(lab: Any) -> None:
    ws = lab.workspace()
    lab.land("sub/c.parquet", lab.rows(220, 250))
    lab.land("folder.parquet/part.parquet", lab.rows(250, 280))
    (lab.landing / "notes.txt").write_text("hello")
    (lab.landing / "c.parquet.crdownload").write_bytes(b"PAR1")
    assert register_all(ws) == ["a", "b"]


def test_a_broken_link_stops_nothing(lab: Any) -> None:
    ws = lab.workspace()
    (lab.landing / "gone.parquet").symlink_to(lab.folder / "nowhere.parquet")
    files = [file.path for file in landed(ws)]
    assert {str(lab.landing / "a.parquet"), str(lab.landing / "b.jsonl")} <= set(files)


def test_no_landing_folder_means_no_files(lab: Any) -> None:
    shutil.rmtree(lab.landing)
    assert landed(lab.workspace()) == []


def test_a_file_that_goes_before_it_is_registered(lab: Any) -> None:
    ws = lab.workspace()
    files = landed(ws)
    (lab.landing / "a.parquet").unlink()
    with pytest.raises(OSError, match=r"a\.parquet"):
        register(ws, files[0])
    assert arrivals(ws) == []


def test_a_file_that_goes_before_it_is_ingested_is_held_back(lab: Any) -> None:
    ws = lab.workspace()
    register_all(ws)
    (lab.landing / "a.parquet").unlink()
    assert held_back(ws, ingest(ws, "a")) == "the file can't be read"
    assert held_back(ws, ingest(ws, "b")) is None


@pytest.mark.parametrize("name", ["a.parquet", "other.parquet"])
def test_a_lost_file_that_comes_back_is_ingested(lab: Any, name: str) -> None:
    ws = lab.workspace()
    register_all(ws)
    content = (lab.landing / "a.parquet").read_bytes()
    (lab.landing / "a.parquet").unlink()
    ingest(ws, "a")
    (lab.landing / name).write_bytes(content)
    assert register_all(ws) == []
    entry = ingest(ws, "a")
    assert held_back(ws, entry) is None and entry.manifest["rows"] == 60
    assert ingest(ws, "a").reused


def test_a_file_overwritten_before_it_is_ingested(lab: Any) -> None:
    """The new content is an arrival of its own; what the old one held is lost, and says so."""
    ws = lab.workspace()
    register_all(ws)
    lab.land("a.parquet", lab.rows(220, 250))
    (new,) = register_all(ws)
    assert held_back(ws, ingest(ws, "a")) == "the file can't be read"
    assert ingest(ws, new).manifest["rows"] == 30


def test_unknown_key(lab: Any) -> None:
    with pytest.raises(KeyError, match="no arrival 'zzz'"):
        arrival(lab.workspace(), "zzz")


def test_two_processes_register_one_file_once(lab: Any, tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    ws = lab.workspace()
    files = landed(ws) * 8
    with ThreadPoolExecutor(8) as threads:
        entered = list(threads.map(lambda file: register(ws, file), files))
    assert sum(known is not None for known in entered) == 2
