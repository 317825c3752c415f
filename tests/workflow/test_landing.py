"""Files that land in every bad way, as the arrival sensor sees them from tick to tick."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator
from typing import Any

import dagster as dg
import fsspec
import pytest

from dsel_assets import runner
from dsel_assets.steps.arrivals import Landed, arrivals, landed, register
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.loading import load_pool
from dsel_assets.steps.pool import held_back, ingest
from dsel_assets.steps.sketches import sketch
from dsel_assets.steps.status import status
from tests.conftest import write
from tests.steps.test_arrivals import WEIRD
from tests.workflow.test_automation import Sensor, definitions


@pytest.fixture
def sensor(lab: Any, instance: Any) -> Sensor:
    return Sensor(lab, instance)


def settled(sensor: Sensor) -> dict[str, str | None]:
    """What two ticks ask for: by then a file that stands still is taken."""
    return sensor.tick() | sensor.tick()


def restarted(sensor: Sensor, cursor: str | None) -> Sensor:
    """The daemon in another process, which knows the cursor and nothing else."""
    again = Sensor(sensor.lab, sensor.instance)
    again.cursor = cursor
    return again


def work(sensor: Sensor, *keys: str) -> dict[str, str | None]:
    """Ingest jobs of these arrivals; why each was held back."""
    ws, found = sensor.lab.workspace(), {}
    for key in keys:
        job = sensor.defs.resolve_job_def("tiny_ingest")
        done = job.execute_in_process(
            partition_key=key, instance=sensor.instance, raise_on_error=False
        )
        found[key] = held_back(ws, ingest(ws, key))
        assert done.success == (found[key] is None)
    return found


def take(lab: Any, *keys: str) -> None:
    """The same without Dagster."""
    ws = lab.workspace()
    for key in keys:
        entry = ingest(ws, key)
        if held_back(ws, entry) is None:
            sketch(ws, entry)


def rows_of(lab: Any, **changes: Any) -> list[str]:
    ws = lab.workspace(**changes)
    return sorted(load_pool(ws, current_generation(ws)).ids.tolist())


# Again, copied, moved


def test_what_was_cleared_away_and_is_delivered_again_asks_for_nothing(sensor: Sensor) -> None:
    settled(sensor)
    path = sensor.lab.landing / "a.parquet"
    content, known = path.read_bytes(), arrivals(sensor.lab.workspace())
    path.unlink()
    assert settled(sensor) == {}
    for name in ("a.parquet", "A (1).parquet"):
        (sensor.lab.landing / name).write_bytes(content)
        assert settled(sensor) == {}
    assert [one.digest for one in arrivals(sensor.lab.workspace())] == [o.digest for o in known]


def test_two_copies_that_land_together_are_one_arrival(sensor: Sensor) -> None:
    sensor.lab.land("d.jsonl", sensor.lab.rows(220, 230))
    shutil.copy(sensor.lab.landing / "d.jsonl", sensor.lab.landing / "c.jsonl")
    assert settled(sensor).keys() == {"a", "b", "c"}
    assert settled(sensor) == {}


def test_a_file_that_is_renamed_before_its_run_is_read_where_it_is(sensor: Sensor) -> None:
    settled(sensor)
    (sensor.lab.landing / "a.parquet").rename(sensor.lab.landing / "z.parquet")
    assert settled(sensor) == {}
    assert ingest(sensor.lab.workspace(), "a").manifest["rows"] == 60


def test_a_rename_into_place_is_seen_whole(sensor: Sensor) -> None:
    settled(sensor)
    part = sensor.lab.land("c.jsonl", sensor.lab.rows(220, 240)).rename(
        sensor.lab.landing / "c.jsonl.part"
    )
    hidden = sensor.lab.landing / ".c.jsonl.x7Gq2b"  # as rsync calls what it has not finished
    shutil.copy(part, hidden)
    for _ in range(3):
        assert sensor.tick() == {}
    part.rename(sensor.lab.landing / "c.jsonl")
    assert sensor.tick() == {}
    assert sensor.tick().keys() == {"c"}
    hidden.rename(sensor.lab.landing / "c.jsonl")  # delivered again, under the same name
    assert settled(sensor) == {}
    assert ingest(sensor.lab.workspace(), "c").manifest["rows"] == 20


def test_a_rename_over_a_known_file_is_a_new_arrival(sensor: Sensor) -> None:
    take(sensor.lab, *settled(sensor))
    other = write(sensor.lab.folder / "next.parquet", sensor.lab.rows(220, 280))
    other.rename(sensor.lab.landing / "a.parquet")
    assert sensor.tick() == {}
    (key,) = sensor.tick()
    take(sensor.lab, key)
    assert len(rows_of(sensor.lab)) == 180


# Gone in between


def test_a_file_that_goes_before_its_run_stops_no_other(sensor: Sensor) -> None:
    settled(sensor)
    (sensor.lab.landing / "a.parquet").unlink()
    assert work(sensor, "a", "b") == {"a": "the file can't be read", "b": None}
    assert [m.arrival for m in current_generation(sensor.lab.workspace()).members] == ["b"]
    assert settled(sensor) == {}


def test_a_file_that_comes_back_after_its_run_is_asked_for_again(sensor: Sensor) -> None:
    before = settled(sensor)
    path = sensor.lab.landing / "a.parquet"
    content = path.read_bytes()
    path.unlink()
    assert work(sensor, "a") == {"a": "the file can't be read"}
    assert settled(sensor) == {}
    path.write_bytes(content)
    again = settled(sensor)
    assert again.keys() == {"a"} and again["a"] != before["a"]  # or the daemon launches nothing
    assert work(sensor, "a") == {"a": None}


# Growing


@pytest.mark.parametrize("run_in_the_pause", [True, False])
def test_a_writer_that_pauses_too_long_loses_nothing(
    sensor: Sensor, run_in_the_pause: bool
) -> None:
    """Half a file stood still and was taken; the whole one brings the rest, and no row twice."""
    lab = sensor.lab
    whole = write(lab.folder / "whole.jsonl", lab.rows(220, 250)).read_bytes()
    half = whole.index(b"\n", len(whole) // 2) + 40  # in the middle of a line
    (lab.landing / "c.jsonl").write_bytes(whole[:half])
    asked = list(settled(sensor))
    if run_in_the_pause:
        take(lab, *asked)
    with (lab.landing / "c.jsonl").open("ab") as file:
        file.write(whole[half:])
    assert sensor.tick() == {}
    (key,) = sensor.tick()
    take(lab, *asked, key)
    shutil.copy(lab.folder / "whole.jsonl", lab.landing / "c.jsonl")
    assert settled(sensor) == {}
    assert len(set(rows_of(lab))) == len(rows_of(lab)) == 150
    assert ingest(lab.workspace(), key).manifest["rows"] == 30
    back = status(lab.workspace())["held_back"]
    assert back == ({} if run_in_the_pause else {"c": "the file can't be read"})


def test_a_file_that_grows_between_the_look_and_the_reading(lab: Any) -> None:
    ws = lab.workspace()
    lab.land("c.jsonl", lab.rows(220, 230))
    before = [file for file in landed(ws) if file.path.endswith("c.jsonl")]
    lab.land("c.jsonl", lab.rows(220, 240))
    entered = register(ws, before[0])
    assert entered is not None and ingest(ws, "c").manifest["rows"] == 20
    assert [register(ws, file) for file in landed(ws)][2] is None
    assert len(arrivals(ws)) == 3


def test_no_tick_ever_takes_a_file_that_is_being_written(sensor: Sensor) -> None:
    """Written line by line, with a tick after any of them, it is one arrival of all its rows."""
    lab = sensor.lab
    settled(sensor)
    lines = write(lab.folder / "c.jsonl", lab.rows(220, 232)).read_bytes().splitlines(True)
    with (lab.landing / "c.jsonl").open("wb", buffering=0) as file:
        for line in lines:
            file.write(line[:50])
            assert sensor.tick() == {}
            file.write(line[50:])
            assert sensor.tick() == {}
    assert settled(sensor).keys() == {"c"}
    assert ingest(lab.workspace(), "c").manifest["rows"] == 12


# The daemon starts again


def test_a_kept_cursor_goes_on_from_any_tick(sensor: Sensor) -> None:
    sensor.tick()
    second = restarted(sensor, sensor.cursor)
    asked = second.tick()
    assert asked.keys() == {"a", "b"}
    third = restarted(sensor, second.cursor)
    assert settled(third) == {}
    sensor.lab.land("c.jsonl", sensor.lab.rows(220, 230))
    third.tick()
    assert restarted(sensor, third.cursor).tick().keys() == {"c"}


def test_a_lost_cursor_before_the_run_asks_under_the_same_run_keys(sensor: Sensor) -> None:
    """Dagster launches no second run for a key that it knows."""
    asked, known = settled(sensor), arrivals(sensor.lab.workspace())
    for _ in range(3):
        assert settled(restarted(sensor, None)) == asked
    assert arrivals(sensor.lab.workspace()) == known


def test_a_lost_cursor_after_the_run_ingests_nothing_twice(sensor: Sensor) -> None:
    asked = settled(sensor)
    take(sensor.lab, "a")
    sensor.instance.report_runless_asset_event(
        dg.AssetMaterialization(["tiny", "sketches"], partition="a")
    )
    assert settled(restarted(sensor, None)) == {"b": asked["b"]}
    store = sensor.lab.home / "store" / "tiny"
    before = {path: path.stat().st_mtime_ns for path in store.rglob("manifest.json")}
    take(sensor.lab, "a")
    assert {path: path.stat().st_mtime_ns for path in store.rglob("manifest.json")} == before


def test_a_cursor_that_is_older_than_the_files_takes_them_as_new(sensor: Sensor) -> None:
    """The daemon was down while everything was delivered, and again with other times."""
    settled(sensor)
    cursor = sensor.cursor
    for name in ("a.parquet", "b.jsonl"):
        os.utime(sensor.lab.landing / name, (10**9, 10**9))
    sensor.lab.land("c.jsonl", sensor.lab.rows(220, 230))
    assert settled(restarted(sensor, cursor)).keys() == {"c"}


# Empty, odd, many


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "jsonl.gz"])
def test_a_file_of_no_bytes_that_is_filled_later(sensor: Sensor, ending: str) -> None:
    lab = sensor.lab
    (lab.landing / f"c.{ending}").write_bytes(b"")
    take(lab, *settled(sensor))
    assert [m.arrival for m in current_generation(lab.workspace()).members] == ["a", "b"]
    unreadable = {} if ending == "jsonl" else {"c": "the file can't be read"}
    assert status(lab.workspace())["held_back"] == unreadable
    if ending == "jsonl.gz":
        return
    lab.land(f"c.{ending}", lab.rows(220, 230))
    (key,) = settled(sensor)
    take(lab, key)
    assert len(rows_of(lab)) == 130 and status(lab.workspace())["held_back"] == unreadable


def test_files_of_no_bytes_are_one_arrival(sensor: Sensor) -> None:
    settled(sensor)
    for name in ("c.jsonl", "d.jsonl", "e.parquet"):
        (sensor.lab.landing / name).touch()
    assert settled(sensor).keys() == {"c"}
    assert settled(sensor) == {}


def test_odd_names_are_partitions(sensor: Sensor) -> None:
    lab = sensor.lab
    for i, name in enumerate(WEIRD):
        lab.land("x.jsonl", lab.rows(220 + i, 221 + i)).rename(lab.landing / name)
    asked = settled(sensor)
    assert len(asked) == 2 + len(WEIRD) and settled(sensor) == {}
    assert settled(restarted(sensor, None)) == asked


@pytest.fixture
def bucket(lab: Any) -> Iterator[str]:
    """A landing place whose names have no limits, such as object stores have."""
    files = fsspec.filesystem("memory")  # one for the whole process, whoever wrote there before
    if files.exists("/landing"):
        files.rm("/landing", recursive=True)
    files.makedirs("/landing")
    yield "memory://landing"
    files.rm("/landing", recursive=True)


NAMES = [
    "x" * 300 + ".jsonl",
    "x" * 300 + "y.jsonl",
    "a b.jsonl",
    "a|b.jsonl",
    "größe.jsonl",
    'it\'s "so".jsonl',
    "a..b.jsonl",
    "a%2F..%2Fb.jsonl",
    "a#b.jsonl",
]


def test_odd_names_at_a_url_are_read(lab: Any, bucket: str) -> None:
    ws = lab.workspace(pool={"landing": bucket})
    files = fsspec.filesystem("memory")
    for i, name in enumerate(NAMES):
        path = write(lab.folder / "one.jsonl", lab.rows(220 + i, 221 + i))
        files.pipe(f"/landing/{name}", path.read_bytes())
    entered = [register(ws, file) for file in landed(ws)]
    keys = [known.key for known in entered if known]
    assert len(keys) == len(set(keys)) == len(NAMES)
    for key in keys:
        assert re.fullmatch(r"[a-z0-9_][a-z0-9_-]{0,100}", key), key
        assert ingest(ws, key).manifest["rows"] == 1
    assert [register(ws, file) for file in landed(ws)] == [None] * len(NAMES)


def test_names_that_look_like_patterns_are_names(lab: Any, bucket: str) -> None:
    ws = lab.workspace(pool={"landing": bucket})
    names = ["a[1].jsonl", "a1.jsonl", "what?.jsonl", "whatx.jsonl", "all*.jsonl", "alls.jsonl"]
    for i, name in enumerate(names):
        path = write(lab.folder / "one.jsonl", lab.rows(220 + i, 221 + i))
        fsspec.filesystem("memory").pipe(f"/landing/{name}", path.read_bytes())
    entered = [register(ws, file) for file in landed(ws)]
    assert len({known.digest for known in entered if known}) == len(names)


def test_a_name_that_a_url_cannot_spell_stops_no_other(
    lab: Any, instance: Any, bucket: str
) -> None:
    """To fsspec it is a chain of file systems; it stays where it is, and the log says so."""
    content = write(lab.folder / "one.jsonl", lab.rows(220, 221)).read_bytes()
    for name in ("a::b.jsonl", "c.jsonl"):
        fsspec.filesystem("memory").pipe(f"/landing/{name}", content)
    sensor = Sensor(lab, instance)
    sensor.defs = definitions(lab.task(pool={"landing": bucket}))
    assert settled(sensor).keys() == {"c"} and settled(sensor) == {}


def test_a_file_that_cannot_be_read_does_not_end_a_run(
    lab: Any, instance: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gone since it was listed, say; the others are entered."""
    gone = Landed(str(lab.landing / "c.jsonl"), 10, "1.0")
    monkeypatch.setattr(runner, "landed", lambda ws: [gone, *landed(ws)])
    assert runner._Jobs(lab.task(), instance).register()
    assert [known.key for known in arrivals(lab.workspace())] == ["a", "b"]


def test_a_hundred_files_in_one_tick(sensor: Sensor) -> None:
    lab = sensor.lab
    for i in range(100):
        # half of the names differ only in what a key leaves out
        name = f"batch {i:03d}.jsonl" if i % 2 else f"batch {'#' * (i + 1)}.jsonl"
        lab.land(name, lab.rows(220 + i, 221 + i))
    sensor.tick()
    started = time.monotonic()
    asked = sensor.tick()
    assert time.monotonic() - started < 10
    known = arrivals(lab.workspace())
    assert len(asked) == len(set(asked.values())) == 102
    assert asked.keys() == {one.key for one in known}
    assert [one.number for one in known] == list(range(1, 103))
    started = time.monotonic()
    assert settled(sensor) == {} == settled(restarted(sensor, sensor.cursor))
    assert time.monotonic() - started < 5
    assert status(lab.workspace())["landed_and_unknown"] == 0


def test_two_ticks_at_once_enter_a_file_once(sensor: Sensor) -> None:
    """Two daemons on one landing folder: both ask, under one run key."""
    first, second = restarted(sensor, None), restarted(sensor, None)
    first.tick(), second.tick()
    assert first.tick() == second.tick()
    assert len(arrivals(sensor.lab.workspace())) == 2
