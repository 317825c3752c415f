"""Killed in the middle, a run goes on and ends with the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dsel_assets.pipeline import run
from dsel_assets.resources.store import MANIFEST, Store, StoreError, file_sha256

RUN = """
import sys
from pathlib import Path
from dsel_assets.pipeline import run
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import load_task
run(Workspace(load_task(sys.argv[1]), Path(sys.argv[2])))
"""
KINDS = ("pool", "gradients", "sketches", "subsets", "checkpoints", "metrics", "verdict")


def digests(store: Path, kinds: tuple[str, ...] = KINDS) -> dict[str, str]:
    """SHA-256 of every file but the manifests, which hold timings."""
    return {
        str(path.relative_to(store)): file_sha256(path)
        for kind in kinds
        for path in (store / kind).rglob("*")
        if path.is_file() and path.name != MANIFEST
    }


def count(store: Path, kind: str) -> int:
    return len(list(store.glob(f"{kind}/*/{MANIFEST}")))


@pytest.mark.parametrize(("kind", "at_least"), [("sketches", 1), ("checkpoints", 5)])
def test_killed_and_run_again(
    lab: Any, finished: Callable[[Path], Any], tmp_path: Path, kind: str, at_least: int
) -> None:
    undisturbed = finished(tmp_path / "undisturbed").home / "store" / "tiny"
    lab.task()
    store = lab.home / "store" / "tiny"
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(lab.folder / "tiny.yaml"), str(lab.home)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while count(store, kind) < at_least and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert count(store, "verdict") == 0, "it was too fast to be killed"
    run(lab.workspace())
    assert digests(store) == digests(undisturbed)


def test_lost_artifacts_are_made_again_bit_by_bit(done: Any) -> None:
    store = done.home / "store" / "tiny"
    before = digests(store)
    for kind in KINDS[1:]:
        for path in list((store / kind).iterdir())[::2]:
            shutil.rmtree(path)
    run(done.workspace())
    assert digests(store) == before


def test_several_processes_make_what_one_makes(
    lab: Any, finished: Callable[[Path], Any], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("DSEL_WORKERS", "2")
    run(lab.workspace())
    undisturbed = finished(tmp_path / "undisturbed").home / "store" / "tiny"
    assert digests(lab.home / "store" / "tiny") == digests(undisturbed)


def test_what_a_killed_process_left_is_no_artifact(tmp_path: Path) -> None:
    store, fields = Store(tmp_path), {"a": 1}
    with store.write("t", "k", fields) as draft:
        (draft.path / "x").write_text("x")
    name = draft.done.identity
    folder = store.folder("t", "k")
    shutil.rmtree(folder / name)
    # a container that starts again gives its process the same id
    for pid in (os.getpid(), 2**22 + 1):
        left = folder / f"{name}.part-{pid}-00000000"
        left.mkdir()
        (left / "x").write_text("half")
    assert store.find("t", "k", fields) is None and store.entries("t", "k") == []
    with store.write("t", "k", fields) as draft:
        (draft.path / "x").write_text("x")
    assert draft.done.file("x").read_text() == "x"
    assert not list(folder.glob(f"*.part-{2**22 + 1}*"))


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ZeroDivisionError), store.write("t", "k", {"a": 1}) as draft:
        (draft.path / "x").write_text("x")
        _ = 1 / 0
    assert list(store.folder("t", "k").iterdir()) == []


def test_the_first_writer_wins(tmp_path: Path) -> None:
    store, fields = Store(tmp_path), {"a": 1}
    with store.write("t", "k", fields) as one, store.write("t", "k", fields) as two:
        (one.path / "x").write_text("one")
        (two.path / "x").write_text("two")
    assert one.done.file("x").read_text() == two.done.file("x").read_text() == "two"
    assert len(list(store.folder("t", "k").iterdir())) == 1


def test_a_damaged_file_is_named(done: Any) -> None:
    store = Store(done.home / "store")
    entry = store.entries("tiny", "checkpoints")[0]
    path = entry.path / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert entry.damaged() == ["weights.safetensors"]
    path.write_bytes(content[:-1])
    with pytest.raises(StoreError, match=r"weights\.safetensors: missing or damaged; delete"):
        entry.file("weights.safetensors")


def test_a_damaged_manifest_is_named(done: Any) -> None:
    store = Store(done.home / "store")
    entry = store.entries("tiny", "metrics")[0]
    (entry.path / MANIFEST).write_text("{")
    with pytest.raises(StoreError, match=r"delete .* and run again"):
        store.entry("tiny", "metrics", entry.identity)
