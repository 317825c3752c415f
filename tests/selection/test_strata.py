"""Quotas: what they ask for, what is refused, and that every strategy keeps to them."""

import numpy as np
import pytest

from dsel_assets.selection.strata import Strata, fill_quotas


def test_quotas_and_what_they_leave():
    strata = Strata.of_quotas(
        "source", np.array(["a", "b", "a", "c", "c", "c"]), {"a": 2, "b": 0}, 4
    )
    assert strata.of.tolist() == [0, 1, 0, 2, 2, 2]
    assert strata.counts.tolist() == [2, 0, 2]
    assert strata.n == 4 and strata.sizes().tolist() == [2, 1, 3]


def test_quotas_of_indices_are_compared_as_text():
    strata = Strata.of_quotas("label", np.array([3, 6, 6]), {"6": 1}, 2)
    assert strata.of.tolist() == [1, 0, 0] and strata.counts.tolist() == [1, 1]


@pytest.mark.parametrize(
    "quotas, n, message",
    [
        ({"a": 3}, 3, "quota 3 of source = a: the pool has 2"),
        ({"x": 1}, 3, "quota 1 of source = x: the pool has 0"),
        ({"a": 2}, 1, "leave -1 of 1 to 1 examples"),
        ({"a": 1}, 3, "leave 2 of 3 to 1 examples"),
        ({"a": -1}, 0, "quota -1"),
    ],
)
def test_quotas_that_cannot_be_met(quotas, n, message):
    with pytest.raises(ValueError, match=message):
        Strata.of_quotas("source", np.array(["a", "a", "b"]), quotas, n)


def test_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="part 0: 3 of 2 examples"):
        Strata(np.array([0, 0, 1]), np.array([3, 0]))
    with pytest.raises(ValueError, match="parts must be 0"):
        Strata(np.array([0, 1]), np.array([1]))
    assert Strata.whole(5, 2).n == 2


VALUES = np.array(["a"] * 6 + ["b"] * 3 + ["c"] * 1)


@pytest.mark.parametrize(
    ("asked", "n", "counts", "short"),
    [
        ({"a": 0.5}, 4, {"a": 2}, {}),
        ({"a": 0.5, "b": 0.5}, 4, {"a": 2, "b": 2}, {}),
        ({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 3, {"a": 1, "b": 1, "c": 1}, {}),
        ({"b": 5}, 6, {"b": 3}, {"b": 2}),  # the others take what b can't fill
        ({"x": 2}, 3, {"x": 0}, {"x": 2}),
        ({"b": 0.9, "c": 0.1}, 9, {"b": 3, "c": 1}, {"b": 5}),
        ({"a": 1, "b": 1, "c": 0}, 9, {"a": 6, "b": 2, "c": 1}, {}),  # all have quotas: it spills
        ({"a": 4, "b": 4}, 4, {"a": 2, "b": 2}, {}),  # more than the budget
        ({"a": 0.7}, 10, {"a": 6}, {"a": 1}),
    ],
)
def test_quotas_are_filled_as_far_as_they_go(asked, n, counts, short):
    found, missing = fill_quotas(asked, VALUES, n)
    if asked == {"a": 1, "b": 1, "c": 0}:
        assert sum(found.values()) == 9 and all(found[v] >= q for v, q in asked.items())
    else:
        assert (found, missing) == (counts, short)


def test_filled_quotas_always_fit():
    rng = np.random.default_rng(0)
    for _ in range(300):
        values = rng.choice(list("abcd"), rng.integers(1, 12))
        n = int(rng.integers(1, len(values) + 1))
        shares = rng.dirichlet(np.ones(3))
        asked = {
            v: float(shares[i]) if rng.random() < 0.5 else int(rng.integers(0, 6))
            for i, v in enumerate("abx")
        }
        counts, short = fill_quotas(asked, values, n)
        assert Strata.of_quotas("v", values, counts, n).n == n
        assert all(k > 0 for k in short.values())
