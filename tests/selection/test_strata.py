"""Quotas: what they ask for, what is refused, and that every strategy keeps to them."""

import numpy as np
import pytest

from dsel_assets.selection.strata import Strata


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
