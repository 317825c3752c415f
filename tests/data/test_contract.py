import gzip
import io
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dsel_assets.data import Contract, RawBatch, read_file, validate
from dsel_assets.data.readers import MISSING

CLASSES = ("cat", "dog", "7")
IMAGE = Contract("image", "label", "source", "id", "image", (1, 4, 5), CLASSES, "cost", ("tag",))
VECTOR = Contract("x", "y", None, None, "vector", (3,), CLASSES)
PIXELS = np.arange(20, dtype=np.uint8).reshape(4, 5) * 12
PIXELS[:, 0] = 0


def check(cells, contract=VECTOR, labels=None, batch=1000):
    """Validate a column of inputs (and labels), as JSON cells or as an Arrow array."""
    n = len(cells)
    columns = {contract.input: cells, contract.label: labels if labels is not None else [0] * n}
    columns |= {contract.cost: [0.5] * n} if contract.cost else {}
    columns |= {name: [None] * n for name in contract.names}
    columns |= {contract.group: [None] * n} if contract.group else {}
    columns |= {contract.id: [f"r{i}" for i in range(n)]} if contract.id else {}
    raw = [
        RawBatch(
            np.arange(i, min(i + batch, n)) + 1, {k: c[i : i + batch] for k, c in columns.items()}
        )
        for i in range(0, n, batch)
    ]
    result = validate(raw, contract, "file")
    assert result.seen == len(result.examples) + result.duplicates + result.quarantine.num_rows
    return result


def reasons(result):
    table = result.quarantine
    return dict(zip(table["row"].to_pylist(), table["reason"].to_pylist(), strict=True))


def encoded(pixels, format="PNG", **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


# --- inputs -----------------------------------------------------------------------------------


IMAGE_FORMS = {
    "nested": PIXELS[None].tolist(),
    "without the channel": PIXELS.tolist(),
    "flat": PIXELS.ravel().tolist(),
    "raw": PIXELS.tobytes(),
    "PNG": encoded(PIXELS),
    "hf": {"bytes": encoded(PIXELS), "path": "/etc/passwd"},
    "floats": (PIXELS / 255).tolist(),
    "some integers among floats": [[0, *row[1:]] for row in (PIXELS / 255).tolist()],
}


@pytest.mark.parametrize("form", IMAGE_FORMS)
@pytest.mark.parametrize("arrow", [False, True])
def test_every_form_of_an_image_gives_the_same_input(form, arrow):
    cells = [IMAGE_FORMS[form], None]
    result = check(pa.array(cells) if arrow else cells, IMAGE)
    assert result.examples.inputs.shape == (1, 1, 4, 5)
    assert result.examples.inputs.dtype == np.float32
    np.testing.assert_array_equal(result.examples.inputs[0, 0], PIXELS / np.float32(255))
    assert reasons(result) == {2: "empty"}


def test_integers_over_255_in_double_and_in_single_precision_are_one_value():
    values = np.arange(256)
    single = values.astype(np.float32) / np.float32(255)
    np.testing.assert_array_equal((values / 255).astype(np.float32), single)


@pytest.mark.parametrize(
    "arrow_type",
    [
        pa.list_(pa.float32()),
        pa.list_(pa.float64(), 20),
        pa.large_list(pa.float32()),
        pa.list_(pa.float16()),
        pa.list_(pa.uint8()),
        pa.list_(pa.int64(), 20),
        pa.list_(pa.list_(pa.uint8(), 5)),
        pa.list_(pa.list_(pa.list_(pa.float32()))),
        pa.list_(pa.list_(pa.list_(pa.int16(), 5), 4), 1),
    ],
    ids=str,
)
def test_arrow_lists_are_read_whole_with_bad_rows_among_them(arrow_type):
    leaf, depth = arrow_type, 0
    while hasattr(leaf, "value_type"):
        leaf, depth = leaf.value_type, depth + 1
    shape = {1: (20,), 2: (4, 5), 3: (1, 4, 5)}[depth]
    kind = np.uint8 if pa.types.is_integer(leaf) else np.float16
    rows = [
        (np.random.default_rng(i).integers(0, 200, shape)).astype(kind).tolist() for i in range(9)
    ]
    cells = [*rows[:4], None, *rows[4:]]
    column = pa.array(cells, type=arrow_type)[1:]  # a slice, as a batch of a larger file is
    result = check(column, IMAGE)
    scale = np.float32(255 if kind is np.uint8 else 1)
    expected = np.array(rows[1:], dtype=np.float32).reshape(8, 1, 4, 5) / scale
    np.testing.assert_array_equal(result.examples.inputs, expected)
    assert reasons(result) == {4: "empty"}


def test_fixed_shape_tensors_are_read():
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(np.ones((3, 4, 5), np.float32))
    np.testing.assert_array_equal(check(tensors, IMAGE).examples.inputs, np.ones((3, 1, 4, 5)))


BAD_INPUTS = [
    (None, "empty"),
    ([], "empty"),
    ([[]], "empty"),
    (MISSING, "missing column"),
    ([1.0, 2.0], "wrong shape"),
    ([1.0, 2.0, 3.0, 4.0], "wrong shape"),
    ([[1.0, 2.0], [3.0]], "wrong shape"),
    ([[1.0], 2.0, 3.0], "wrong shape"),
    ([1.0, float("nan"), 3.0], "non-finite"),
    ([1.0, float("inf"), 3.0], "non-finite"),
    ([1.0, 1e300, 3.0], "non-finite"),
    ([1, 10**400, 3], "non-finite"),
    ([1.0, None, 3.0], "wrong type"),
    ([1.0, True, 3.0], "wrong type"),
    ([True, True, True], "wrong type"),
    (["1", "2", "3"], "wrong type"),
    ([{"a": 1}, 2, 3], "wrong type"),
    ("1 2 3", "wrong type"),
    (3, "wrong type"),
    ({"bytes": [1, 2, 3]}, "wrong type"),
    (b"abc", "wrong type"),
]


@settings(max_examples=60, deadline=None)
@given(
    picks=st.lists(st.integers(-3, len(BAD_INPUTS) - 1), max_size=12),
    batch=st.integers(1, 12),
)
def test_each_bad_input_goes_to_quarantine_and_the_good_rows_stay(picks, batch):
    good = [float(i) for i in range(len(picks))]
    cells = [BAD_INPUTS[p][0] if p >= 0 else [v, 2, 3] for p, v in zip(picks, good, strict=True)]
    result = check(cells, batch=batch)
    expected = {i + 1: BAD_INPUTS[p][1] for i, p in enumerate(picks) if p >= 0}
    assert reasons(result) == expected
    kept = [v for p, v in zip(picks, good, strict=True) if p < 0]
    assert result.examples.inputs[:, 0].tolist() == kept


def test_arrow_and_json_refuse_a_row_for_the_same_reason():
    for cell, reason in BAD_INPUTS:
        try:
            column = pa.array([cell])
        except (pa.ArrowException, OverflowError, TypeError):
            continue  # no Parquet file can hold it
        if repr(column.to_pylist()) != repr([cell]):
            continue  # nor this: true among floats became 1.0
        assert reasons(check(column)) == reasons(check([cell])) == {1: reason}
    with_null = pa.array([[1.0, None, 2.0], [1.0, 2.0, 3.0]])
    assert reasons(check(with_null)) == {1: "wrong type"}


def test_bad_images_are_refused_and_cost_no_good_one():
    png, noise = encoded(PIXELS), np.random.default_rng(0).integers(0, 255, (4, 5, 3), np.uint8)
    bad = {
        "truncated": (png[:-30], "wrong type"),
        "header only": (png[:8], "wrong type"),
        "short": (b"123", "wrong shape"),
        "no bytes": (b"", "empty"),
        "null": ({"bytes": None, "path": "x.png"}, "empty"),
        "colour": (encoded(noise), "wrong shape"),
        "size": (encoded(PIXELS.T.copy()), "wrong shape"),
        "16 bit": (encoded(PIXELS.astype(np.uint16)), "wrong type"),
        "gif": (encoded(PIXELS, "GIF"), "wrong shape"),
        "integers": ([[256] * 5] * 4, "wrong type"),
        "negative": ([[-1] * 5] * 4, "wrong type"),
    }
    cells = [png, *(cell for cell, _ in bad.values()), png]
    result = check(cells, IMAGE)
    assert list(reasons(result).values()) == [reason for _, reason in bad.values()]
    assert result.examples.ids.tolist() == ["r0", f"r{len(bad) + 1}"]


def test_a_forged_size_is_refused_before_it_is_decoded():
    png = bytearray(encoded(PIXELS))
    png[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    assert reasons(check([bytes(png)], IMAGE))[1] in ("wrong type", "wrong shape")


def test_colour_images_become_channels_first():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    colour = replace(IMAGE, shape=(3, 4, 5))
    result = check([encoded(pixels), pixels.transpose(2, 0, 1).tobytes()], colour)
    np.testing.assert_array_equal(result.examples.inputs[0], result.examples.inputs[1])
    np.testing.assert_array_equal(
        result.examples.inputs[0], pixels.transpose(2, 0, 1) / np.float32(255)
    )
    jpeg = check([encoded(np.full((4, 5, 3), 200, np.uint8), "JPEG", quality=95)], colour)
    np.testing.assert_allclose(jpeg.examples.inputs, 200 / 255, atol=0.02)


def test_raw_bytes_that_begin_like_a_jpeg_are_still_pixels():
    raw = b"\xff\xd8\xff" + bytes(17)
    np.testing.assert_array_equal(
        check([raw], IMAGE).examples.inputs.ravel(), np.frombuffer(raw, np.uint8) / np.float32(255)
    )


def test_vectors_of_integers_are_taken_as_given():
    for cells in ([[1, -2, 300]], pa.array([[1, -2, 300]]), [[1, -2.0, 300]]):
        assert check(cells).examples.inputs.tolist() == [[1, -2, 300]]


# --- labels, ids, groups, columns -------------------------------------------------------------


BAD_LABELS = [
    (None, "empty"),
    (True, "wrong type"),
    (1.0, "wrong type"),
    ([1], "wrong type"),
    (b"cat", "wrong type"),
    (3, "unknown label"),
    (-1, "unknown label"),
    (10**30, "unknown label"),
    ("bird", "unknown label"),
    ("Cat", "unknown label"),
    ("1", "unknown label"),
    ("\ud800", "unknown label"),
    (MISSING, "missing column"),
]


def test_labels_are_indices_or_names_and_nothing_else():
    good = {0: 0, 2: 2, "cat": 0, "dog": 1, "7": 2}
    cells = [*good, *(cell for cell, _ in BAD_LABELS)]
    result = check([[float(i), 0, 0] for i in range(len(cells))], labels=cells)
    assert result.examples.labels.tolist() == list(good.values())
    assert result.examples.labels.dtype == np.int64
    assert list(reasons(result).values()) == [reason for _, reason in BAD_LABELS]


@pytest.mark.parametrize(
    ("column", "kept"),
    [
        (pa.array([0, 1, None], pa.int8()), [0, 1]),
        (pa.array(["cat", "7", "fish"]).dictionary_encode(), [0, 2]),
        (pa.array([True, False, True]), []),
        (pa.array([0.0, 1.0, 2.0]), []),
        (pa.array([b"cat", b"c\xff", None]).view(pa.string()), [0]),  # not UTF-8
        (pa.array([10**18, 1, 2]).cast(pa.timestamp("ns")), []),
    ],
)
def test_labels_of_every_arrow_type_end_somewhere(column, kept):
    result = check([[float(i), 0, 0] for i in range(3)], labels=column)
    assert result.examples.labels.tolist() == kept


AWKWARD_IDS = [
    "../../etc/passwd",
    "a/b",
    "q\"'; drop table x; --",
    "日本語",
    "é",
    "e\u0301",
    " ",
    "%s",
]


def records(n, **changes):
    """Good rows of the IMAGE contract."""
    rng = np.random.default_rng(7)
    return [
        {
            "image": rng.random((4, 5)).astype(np.float32).tolist(),
            "label": int(rng.integers(3)),
            "source": "v1",
            "id": f"row-{i}",
            "cost": float(i),
            "tag": i,
            **changes,
        }
        for i in range(n)
    ]


def validate_records(rows, contract=IMAGE):
    columns = {k: [row.get(k, MISSING) for row in rows] for k in contract.declared}
    result = validate([RawBatch(np.arange(len(rows)) + 1, columns)], contract, "file")
    assert result.seen == len(result.examples) + result.duplicates + result.quarantine.num_rows
    return result


def test_ids_groups_and_costs_are_data_only():
    rows = records(len(AWKWARD_IDS))
    for row, text in zip(rows, AWKWARD_IDS, strict=True):
        row |= {"id": text, "source": text}
    examples = validate_records(rows).examples
    assert examples.ids.tolist() == examples.groups.tolist() == AWKWARD_IDS
    assert examples.columns["cost"].tolist() == list(range(len(rows)))
    assert examples.columns["tag"].tolist() == [str(i) for i in range(len(rows))]


@pytest.mark.parametrize(
    ("column", "cell", "reason"),
    [
        ("id", "x" * 201, "wrong type"),
        ("id", "a\nb", "wrong type"),
        ("id", "a\x00", "wrong type"),
        ("id", "\ud800", "wrong type"),
        ("id", 7, "wrong type"),
        ("id", "", "empty"),
        ("id", None, "empty"),
        ("source", 7, "wrong type"),
        ("source", "a\tb", "wrong type"),
        ("cost", None, "empty"),
        ("cost", True, "wrong type"),
        ("cost", "3", "wrong type"),
        ("cost", -1, "wrong type"),
        ("tag", 0.5, "wrong type"),
        ("cost", float("nan"), "non-finite"),
        ("cost", 10**400, "non-finite"),
        *((name, MISSING, "missing column") for name in IMAGE.declared),
    ],
)
def test_a_bad_cell_costs_its_row_and_names_its_column(column, cell, reason):
    rows = records(3)
    rows[1][column] = cell
    result = validate_records(rows)
    assert result.examples.ids.tolist() == ["row-0", "row-2"]
    (refused,) = result.quarantine.to_pylist()
    assert (refused["source"], refused["row"], refused["reason"]) == ("file", 2, reason)
    assert repr(column) in refused["detail"]
    assert refused["example_id"] == (None if column == "id" else "row-1")


def test_texts_are_data_of_any_length():
    contract = replace(IMAGE, texts=("prompt",))
    awkward = ["x" * 100_000, "two\nlines\tand a \x00", "größer \U0001f600 {}", "", None]
    rows = records(len(awkward) + 2)
    for row, text in zip(rows, [*awkward, 7, "\ud800"], strict=True):
        row["prompt"] = text
    result = validate_records(rows, contract)
    assert result.examples.columns["prompt"].tolist() == [text or "" for text in awkward]
    refused = result.quarantine.to_pylist()
    assert [line["reason"] for line in refused] == ["wrong type"] * 2
    assert all("'prompt'" in line["detail"] and len(line["detail"]) < 200 for line in refused)


def test_unknown_groups_are_empty():
    rows = records(2)
    rows[0]["source"], rows[1]["source"] = None, ""
    assert validate_records(rows).examples.groups.tolist() == ["", ""]


def test_an_id_of_200_characters_is_fine_and_details_stay_short():
    rows = records(2)
    rows[0]["id"], rows[1]["label"] = "x" * 200, "y" * 100_000
    result = validate_records(rows)
    assert result.examples.ids.tolist() == ["x" * 200]
    assert len(result.quarantine["detail"][0].as_py()) < 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(IMAGE.declared), JSON | st.just(MISSING)), max_size=10))
def test_no_cell_of_json_stops_the_others(changes):
    rows = records(len(changes) + 1)
    for row, (column, cell) in zip(rows, changes, strict=False):
        row[column] = cell
    result = validate_records(rows)
    assert result.examples.ids[-1] == f"row-{len(changes)}"
    assert np.isfinite(result.examples.inputs).all()
    assert len(set(result.examples.ids)) == len(result.examples)


# --- files ------------------------------------------------------------------------------------


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


@pytest.mark.parametrize("own_ids", [True, False])
def test_file_formats_give_the_same_examples(tmp_path, own_ids):
    contract = IMAGE if own_ids else replace(IMAGE, id=None)
    rows = records(20)
    results = [
        validate(read_file(write(tmp_path / name, rows), contract.declared), contract, name)
        for name in ("x.parquet", "x.jsonl", "x.jsonl.gz")
    ]
    for result in results:
        assert result.seen == 20
        assert result.extra == (() if own_ids else ("id",))
        for field in ("ids", "labels", "groups", "inputs"):
            np.testing.assert_array_equal(
                getattr(result.examples, field), getattr(results[0].examples, field)
            )


def test_a_column_that_the_file_lacks_quarantines_every_row(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "label"} for row in records(5)]
    for name in ("x.parquet", "x.jsonl"):
        result = validate(read_file(write(tmp_path / name, rows), IMAGE.declared), IMAGE, name)
        assert Counter(result.quarantine["reason"].to_pylist()) == {"missing column": 5}
        assert all("'label'" in detail for detail in result.quarantine["detail"].to_pylist())
        assert result.examples.inputs.shape == (0, 1, 4, 5)


def test_a_file_without_rows_is_a_valid_arrival(tmp_path):
    (tmp_path / "x.jsonl").touch()
    result = validate(read_file(str(tmp_path / "x.jsonl"), IMAGE.declared), IMAGE, "x")
    assert (result.seen, len(result.examples), result.quarantine.num_rows) == (0, 0, 0)
    assert result.examples.inputs.shape == (0, 1, 4, 5)
    assert set(result.examples.columns) == {"cost", "tag", "row", "content_digest"}


def test_duplicates_are_dropped_and_conflicts_quarantined(tmp_path):
    rows = records(6)
    rows[2] = dict(rows[0])  # the same row again
    rows[3] = rows[3] | {"id": "row-1"}  # another input under a known id
    rows[4] = rows[0] | {"label": (rows[0]["label"] + 1) % 3}  # another label under a known id
    lines = [json.dumps(row) for row in rows]
    lines.insert(3, "{broken")
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    result = validate(read_file(str(tmp_path / "x.jsonl"), IMAGE.declared), IMAGE, "x")
    assert result.examples.ids.tolist() == ["row-0", "row-1", "row-5"]
    assert result.duplicates == 1
    assert result.seen == 7
    assert reasons(result) == {4: "broken line", 5: "conflicting id", 6: "conflicting id"}
    assert result.quarantine["example_id"].to_pylist() == [None, "row-1", "row-0"]


def test_a_refused_row_does_not_take_its_id_with_it():
    rows = records(2)
    rows[0] |= {"id": "same", "label": "fish"}
    rows[1] |= {"id": "same"}
    result = validate_records(rows)
    assert result.examples.ids.tolist() == ["same"]
    assert reasons(result) == {1: "unknown label"}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "text"},
        {"shape": ()},
        {"shape": (0, 4)},
        {"classes": ()},
        {"classes": ("a", "a")},
        {"label": "image"},
        {"names": ("content_digest",)},
    ],
)
def test_impossible_contracts_are_refused(change):
    with pytest.raises(
        ValueError, match="columns" if {"label", "names"} & set(change) else next(iter(change))
    ):
        replace(IMAGE, **change)
