"""The generator against Random123's known answers, and its helpers against their definitions."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from dsel_assets.sketching import philox as px

ONES = 0xFFFFFFFF
# Random123, kat_vectors, philox4x32 10
KNOWN = [
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([ONES] * 4, (ONES, ONES), [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
KEY = px.stream_key(3, "conv.weight", "test")


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert px.philox(torch.tensor(counter), key).tolist() == answer


def test_lanes_are_independent_of_each_other():
    counters = torch.randint(2**32, (5, 3, 4), generator=torch.Generator().manual_seed(0))
    together = px.philox(counters, KEY)
    assert together.shape == counters.shape
    assert (together >= 0).all() and (together < 2**32).all()
    assert torch.equal(together[4, 2], px.philox(counters[4, 2], KEY))


@pytest.mark.parametrize("draw", [px.words, px.signs, px.normals])
@pytest.mark.parametrize(("start", "count"), [(0, 1), (1, 1), (3, 70), (31, 34), (64, 5), (7, 0)])
def test_a_piece_equals_the_same_piece_of_the_whole(draw, start, count):
    assert torch.equal(draw(KEY, start, count), draw(KEY, 0, 200)[start:][:count])


def test_words_count_beyond_32_bits():
    start = 4 * (2**32 - 1) + 2
    word = px.philox(torch.tensor([0, 1, 0, 0]), KEY)
    assert (px.words(KEY, start, 6)[2:] == word).all()


def test_every_part_of_the_key_matters_and_none_runs_into_another():
    keys = {
        px.stream_key(seed, name, stream)
        for seed in (0, 1, -1, 2**70)
        for name in ("", "a", "ab", 'a", "b')
        for stream in ("", "b", "signs")
    }
    assert len(keys) == 4 * 4 * 3


def test_key_is_the_same_in_another_process():
    code = (
        "from dsel_assets.sketching.philox import stream_key; "
        "print(stream_key(3, 'conv.weight', 'test'))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert other.strip() == str(KEY)


def test_distributions():
    n = 200_000
    assert abs(px.signs(KEY, 0, n).double().mean()) < 4 / n**0.5
    assert set(px.signs(KEY, 0, n).tolist()) == {-1, 1}
    assert stats.kstest(px.normals(KEY, 0, n), "norm").pvalue > 1e-3
    pairs = px.normals(KEY, 0, n).reshape(-1, 2)
    assert abs((pairs[:, 0] * pairs[:, 1]).mean()) < 4 / len(pairs) ** 0.5
    counts = np.bincount(px.integers(KEY, 0, n, 12), minlength=12)
    assert len(counts) == 12 and stats.chisquare(counts).pvalue > 1e-3


def test_permutations_are_that_and_uniform():
    drawn = px.permutations(KEY, 0, 3000, 6)
    assert torch.equal(drawn.sort(dim=1).values, torch.arange(6).expand(3000, 6))
    assert stats.chisquare(np.bincount(drawn[:, 0], minlength=6)).pvalue > 1e-3
    assert torch.equal(px.permutations(KEY, 7, 5, 6), drawn[7:12])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_integers_are_equal_on_cuda_and_the_normals_nearly():
    for draw in (px.words, px.signs):
        assert torch.equal(draw(KEY, 5, 1000, "cuda").cpu(), draw(KEY, 5, 1000))
    torch.testing.assert_close(
        px.normals(KEY, 5, 1000, "cuda").cpu(), px.normals(KEY, 5, 1000), rtol=1e-13, atol=1e-13
    )
