"""An artifact is there whole or not at all, whatever interrupts, races or damages it."""

import json
import multiprocessing
import os
import subprocess
import sys

import pytest

from dsel_assets.resources.store import MANIFEST, Store, StoreError, identity, write_json

FIELDS = {"strategy": "skmm", "budget": 100, "settings": {"c": 0.999, "tol": 1e-4}}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def put(store, fields=FIELDS, content="content"):
    with store.write("digits", "subsets", fields) as draft:
        (draft.path / "rows.txt").write_text(content)
        draft.rows = 3
        draft.summary = {"objective": 0.5}
    return draft.done


def dead_pid():
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


# Identity


def test_identity_ignores_the_order_of_keys_at_every_depth():
    turned = {"settings": {"tol": 1e-4, "c": 0.999}, "budget": 100, "strategy": "skmm"}
    assert identity(turned) == identity(FIELDS)


@pytest.mark.parametrize(
    "other",
    [
        {**FIELDS, "budget": 101},
        {**FIELDS, "budget": "100"},
        {**FIELDS, "budget": None},
        {**FIELDS, "settings": {}},
        {**FIELDS, "seed": None},
        {**FIELDS, "settings": [["c", 0.999], ["tol", 1e-4]]},
    ],
)
def test_identity_differs_with_any_field(other):
    assert identity(other) != identity(FIELDS)


def test_identity_is_the_same_in_another_process():
    program = (
        "import json, sys; from dsel_assets.resources.store import identity;"
        "print(identity(json.loads(sys.argv[1])))"
    )
    fields = {**FIELDS, "name": "naïve ✓"}
    for seed in ("1", "2"):
        there = subprocess.run(
            [sys.executable, "-c", program, json.dumps(fields)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONIOENCODING": "utf-8"},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert there.stdout.strip() == identity(fields)


# Writing and finding


def test_what_was_written_is_found_by_its_fields(store):
    assert store.find("digits", "subsets", FIELDS) is None
    made = put(store)
    found = store.find("digits", "subsets", dict(reversed(FIELDS.items())))
    assert found.path == made.path and found.reused and not made.reused
    assert found.identity == identity(FIELDS)
    assert found.file("rows.txt").read_text() == "content"
    assert found.summary == {"objective": 0.5}
    assert found.manifest["rows"] == 3 and found.manifest["fields"] == FIELDS
    assert found.manifest["seconds"] >= 0 and found.manifest["versions"]["python"]
    assert store.entries("digits", "subsets") == [found]


def test_tasks_and_kinds_are_apart(store):
    put(store)
    assert store.find("letters", "subsets", FIELDS) is None
    assert store.find("digits", "metrics", FIELDS) is None


def test_get_says_what_to_materialise(store):
    with pytest.raises(StoreError, match="materialise digits/subsets"):
        store.get("digits", "subsets", FIELDS)


def test_missing_counts_each_identity_once(store):
    put(store)
    other = {**FIELDS, "budget": 7}
    assert store.missing("digits", "subsets", [FIELDS, other, other]) == {identity(other)}


def test_a_foreign_file_among_the_artifacts_is_no_artifact(store):
    made = put(store)
    (made.path.parent / ".DS_Store").write_text("")
    (made.path.parent / "notes.txt").write_text("")
    assert [entry.identity for entry in store.entries("digits", "subsets")] == [made.identity]


# Atomicity


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(store, error):
    with pytest.raises(error), store.write("digits", "subsets", FIELDS) as draft:
        (draft.path / "rows.txt").write_text("half")
        raise error
    assert store.find("digits", "subsets", FIELDS) is None
    assert list(store.folder("digits", "subsets").iterdir()) == []


def test_a_summary_that_is_no_json_leaves_nothing(store):
    with pytest.raises(TypeError), store.write("digits", "subsets", FIELDS) as draft:
        draft.summary = {"value": object()}
    assert list(store.folder("digits", "subsets").iterdir()) == []


def test_nobody_sees_an_artifact_before_it_is_whole(store):
    with store.write("digits", "subsets", FIELDS) as draft:
        (draft.path / "rows.txt").write_text("half")
        assert store.find("digits", "subsets", FIELDS) is None
        assert store.entries("digits", "subsets") == []
        assert store.missing("digits", "subsets", [FIELDS]) == {identity(FIELDS)}
    assert store.find("digits", "subsets", FIELDS) is not None


def test_parts_of_dead_processes_are_swept_and_those_of_living_ones_are_not(store):
    folder = store.folder("digits", "subsets")
    dead = folder / f"{identity(FIELDS)}.part-{dead_pid()}"
    living = folder / f"{identity(FIELDS)}.part-{os.getppid()}"
    for part in (dead, living):
        part.mkdir(parents=True)
        (part / "rows.txt").write_text("half")
    put(store)
    assert not dead.exists()
    assert (living / "rows.txt").exists()


def test_a_part_left_under_the_own_pid_does_not_block(store):
    """A container's processes get the same few pids at every start."""
    left = store.folder("digits", "subsets") / f"{identity(FIELDS)}.part-{os.getpid()}"
    left.mkdir(parents=True)
    (left / "rows.txt").write_text("half")
    assert put(store).damaged() == []
    assert len(store.entries("digits", "subsets")) == 1


def test_the_first_to_finish_wins(store):
    with store.write("digits", "subsets", FIELDS) as slow:
        (slow.path / "rows.txt").write_text("slow")
        put(store, content="fast")
    assert slow.done.file("rows.txt").read_text() == "fast"
    assert slow.done.damaged() == []
    assert [path.name for path in slow.done.path.parent.iterdir()] == [identity(FIELDS)]


def _race(root, barrier, content):
    store = Store(root)
    for turn in range(20):
        barrier.wait()
        entry = put(store, {**FIELDS, "turn": turn}, content)
        assert entry.damaged() == []
        assert entry.file("rows.txt").read_text()[0] in "ab"


def test_two_processes_that_write_the_same_both_get_one_valid_entry(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2, timeout=30)
    racers = [
        context.Process(target=_race, args=(tmp_path, barrier, letter * size), daemon=True)
        for letter, size in (("a", 10), ("b", 20_000))
    ]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
    assert [racer.exitcode for racer in racers] == [0, 0]
    entries = Store(tmp_path).entries("digits", "subsets")
    assert len(entries) == 20 == len(list(entries[0].path.parent.iterdir()))
    assert not any(entry.damaged() for entry in entries)


# Damage


def test_another_size_is_noticed_when_the_file_is_asked_for(store):
    made = put(store)
    (made.path / "rows.txt").write_text("conten")
    with pytest.raises(StoreError, match=f"delete {made.path}"):
        made.file("rows.txt")


def test_a_missing_file_is_noticed(store):
    made = put(store)
    (made.path / "rows.txt").unlink()
    with pytest.raises(StoreError, match=r"rows\.txt: missing or damaged"):
        made.file("rows.txt")
    assert made.damaged() == ["rows.txt"]


def test_a_flipped_bit_is_noticed_by_the_checksum(store):
    made = put(store)
    (made.path / "rows.txt").write_text("cOntent")
    assert made.file("rows.txt").exists()
    assert store.find("digits", "subsets", FIELDS).damaged() == ["rows.txt"]


@pytest.mark.parametrize("content", [b"", b'{"rows": 1', b"\xff\xfe\x00garbage"])
def test_a_damaged_manifest_names_what_to_delete(store, content):
    made = put(store)
    (made.path / MANIFEST).write_bytes(content)
    with pytest.raises(StoreError, match=f"delete {made.path}"):
        store.find("digits", "subsets", FIELDS)


def test_a_folder_without_a_manifest_is_nothing_and_is_made_again(store):
    made = put(store)
    (made.path / MANIFEST).unlink()
    assert store.find("digits", "subsets", FIELDS) is None
    assert store.missing("digits", "subsets", [FIELDS])
    assert put(store, content="again").file("rows.txt").read_text() == "again"


# JSON files


def test_write_json_replaces_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "champion.json"
    write_json(path, {"b": 1, "a": [None, "é"]})
    assert json.loads(path.read_text()) == {"a": [None, "é"], "b": 1}
    with pytest.raises(TypeError):
        write_json(path, {"a": 1, "b": object()})
    assert json.loads(path.read_text()) == {"a": [None, "é"], "b": 1}
    assert list(path.parent.iterdir()) == [path]
