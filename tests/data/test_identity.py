import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dsel_assets.data import Examples, example_ids, merge

FLOATS = st.floats(-100, 100, width=32)
ROWS = hnp.arrays(np.float32, st.tuples(st.integers(1, 8), st.just(4)), elements=FLOATS)


def make(ids, inputs=None, labels=None):
    n = len(ids)
    inputs = np.arange(n, dtype=np.float32)[:, None] if inputs is None else np.asarray(inputs)
    labels = np.zeros(n, dtype=np.int64) if labels is None else np.asarray(labels)
    digests = example_ids(inputs, [str(label) for label in labels])
    ids = digests if ids[:1] == [None] else np.array(ids, dtype=np.str_)
    columns = {"content_digest": digests}
    return Examples(ids, labels, np.array([""] * n, dtype=np.str_), inputs, columns=columns)


@settings(deadline=None)
@given(inputs=ROWS, seed=st.integers(0, 99), cut=st.integers(0, 8))
def test_an_id_depends_on_its_row_alone(inputs, seed, cut):
    labels = [str(i % 3) for i in range(len(inputs))]
    ids = example_ids(inputs, labels)
    order = np.random.default_rng(seed).permutation(len(inputs))
    np.testing.assert_array_equal(
        ids[order], example_ids(inputs[order], [labels[i] for i in order])
    )
    halves = (example_ids(inputs[part], labels[part]) for part in (slice(cut), slice(cut, None)))
    np.testing.assert_array_equal(ids, np.concatenate(list(halves)))
    others = (
        inputs.astype(np.float64),
        inputs.astype(">f4"),
        np.asfortranarray(inputs),
        np.where(inputs == 0, np.float32(-0.0), inputs),
        inputs.reshape(-1, 2, 2),
    )
    for same in others:
        np.testing.assert_array_equal(ids, example_ids(same, labels))


@settings(deadline=None)
@given(inputs=ROWS)
def test_ids_differ_where_content_differs(inputs):
    content = {(row.tobytes(), label) for row in inputs + 0.0 for label in "ab"}
    ids = np.concatenate([example_ids(inputs, [label] * len(inputs)) for label in "ab"])
    assert len(set(ids)) == len(content)
    assert all(len(i) == 32 and set(i) <= set("0123456789abcdef") for i in ids)


def test_ids_never_change():
    inputs = np.array([[0, 0.5, 1]], dtype=np.float32)
    assert example_ids(inputs, ["日本"]).tolist() == ["ac07d018d6e20b1db84427dc1a763b11"]


def test_a_label_cannot_pass_for_content():
    with_nul = example_ids(np.zeros((1, 1)), ["\x00\x00\x00\x00"])
    assert with_nul[0] != example_ids(np.zeros((1, 2)), [""])[0]
    assert example_ids(np.zeros((0, 3)), []).shape == (0,)


def test_merge_keeps_the_first_arrival_and_names_the_rest():
    a = make(["x", "y"], [[1.0], [2.0]])
    b = make(["y", "z", "x"], [[2.0], [3.0], [9.0]])
    c = make(["x", "w"], [[9.0], [4.0]])
    pool, duplicates, conflicts = merge([("a", a), ("b", b), ("c", c)])
    assert pool.ids.tolist() == ["x", "y", "z", "w"]
    assert pool.inputs.ravel().tolist() == [1, 2, 3, 4]
    assert duplicates.to_pylist() == [{"example_id": "y", "arrival": "b", "first_arrival": "a"}]
    assert conflicts["source"].to_pylist() == ["b", "c"]
    assert conflicts["example_id"].to_pylist() == ["x", "x"]
    assert set(conflicts["reason"].to_pylist()) == {"conflicting id"}


@settings(deadline=None)
@given(parts=st.lists(st.lists(st.integers(0, 5), unique=True, max_size=5), min_size=1, max_size=4))
def test_merge_accounts_for_every_row_and_redelivery_changes_nothing(parts):
    arrivals = [
        (f"{i}", make([f"id{v}" for v in part], np.array(part, np.float32).reshape(-1, 1)))
        for i, part in enumerate(parts)
    ]
    pool, duplicates, conflicts = merge(arrivals)
    assert len(pool) + duplicates.num_rows == sum(map(len, parts))
    assert conflicts.num_rows == 0
    assert list(pool.ids) == list(dict.fromkeys(f"id{v}" for part in parts for v in part))
    again, more, _ = merge([*arrivals, ("9", arrivals[0][1])])
    np.testing.assert_array_equal(again.ids, pool.ids)
    assert more.num_rows == duplicates.num_rows + len(parts[0])


def test_merge_refuses_parts_of_another_layout():
    with pytest.raises(ValueError, match="second has arrays"):
        merge([("first", make(["a"])), ("second", make(["b"], [[1.0, 2.0]]))])
    assert len(merge([])[0]) == 0
