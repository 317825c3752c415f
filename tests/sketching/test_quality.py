"""The measure of distortion: exact small cases, and promises kept and broken."""

import numpy as np
import pytest
import torch

from dsel_assets.sketching import make_sketch
from dsel_assets.sketching.quality import gram, gram_error


def rows(n=40, p=3000, seed=0):
    """Rows that have a part in common, so that inner products vary."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(p, generator=generator)
    shares = torch.rand(n, 1, generator=generator)
    return shares * common + torch.randn(n, p, generator=generator)


def test_gram():
    x = rows(6, 30)
    torch.testing.assert_close(gram(x), x.double() @ x.double().T)
    named = {"a": x[:, :10].reshape(6, 2, 5), "b": x[:, 10:11], "c": x[:, 11:]}
    torch.testing.assert_close(gram(named), gram(x))
    torch.testing.assert_close(gram({"a": x[:, :10].half()}), gram(x[:, :10].half()))
    assert gram(x.half()).dtype == torch.float64
    assert gram(rows(6, 60)[:, ::2]).shape == (6, 6)


def test_by_hand():
    exact = torch.tensor([[4.0, 1.0, 0.0], [1.0, 1.0, 2.0], [0.0, 2.0, 9.0]])
    sketched = exact.clone()
    sketched[0, 1] += 0.5
    sketched[1, 2] -= 0.6
    error = gram_error(exact, sketched, 8, 2.0)  # reads the upper triangle
    assert error["rms"] == pytest.approx(((0.25**2 + 0.2**2) / 3) ** 0.5)
    truth, found = [1, 0, 2], [1.5, 0, 1.4]
    assert error["correlation"] == pytest.approx(np.corrcoef(truth, found)[0, 1])
    assert error["within"] == 1
    # the deviation of pair (0, 1) is sqrt(2 / 16 * (4 + 1)) = 0.79
    for D, within in [(8, 1), (8 * 23**2, 1 / 3)]:
        assert gram_error(exact, sketched, D, 2.0)["within"] == pytest.approx(within)
    sketched[0, 1] = 1 + 3 * (2 / 16 * 5) ** 0.5 * 1.001
    assert gram_error(exact, sketched, 8, 2.0)["within"] == pytest.approx(2 / 3)
    assert gram_error(exact, exact, 8, 2.0) == {
        "rms": 0,
        "dense": pytest.approx(((1 + (1 / 4 + 0 + 4 / 9) / 3) / 8) ** 0.5),
        "correlation": pytest.approx(1),
        "within": 1,
    }


@pytest.mark.parametrize("kind", ["gaussian", "countsketch", "affd"])
def test_a_sketch_keeps_its_promise(kind):
    x = rows()
    exact, curve = gram(x), []
    for D in (32, 128, 512):
        S = make_sketch(kind, x.shape[1], D)
        error = gram_error(exact, gram(S(x)), D, S.variance)
        assert error["within"] > 0.98
        # the root mean square over pairs is that of one variance, about 2 / (2 D)
        assert 0.4 < error["rms"] * D**0.5 < 1.6
        curve.append((error["rms"], -error["correlation"]))
    assert curve == sorted(curve, reverse=True)


def test_a_broken_sketch_does_not():
    x = rows()
    exact, S = gram(x), make_sketch("countsketch", 3000, 256)
    sketched = S(x)
    assert gram_error(exact, gram(2 * sketched), 256, 2.0)["within"] < 0.5
    assert gram_error(exact, gram(sketched[torch.randperm(40)]), 256, 2.0)["within"] < 0.9
    noise = torch.randn(40, 256) * exact.diagonal().mean().sqrt() / 16
    broken = gram_error(exact, gram(noise), 256, 2.0)
    assert broken["within"] < 0.9 and abs(broken["correlation"]) < 0.4


def test_scale_order_and_dtype_do_not_matter():
    x = rows()
    S = make_sketch("countsketch", 3000, 64)
    first = gram_error(gram(x), gram(S(x)), 64, 2.0)
    order = torch.randperm(40)
    for other in (x * 1e6, x * 1e-6, x[order], x.double()):
        assert gram_error(gram(other), gram(S(other)), 64, 2.0) == pytest.approx(first, rel=1e-4)
    scale = torch.rand(40, 1) + 0.1
    other = gram_error(gram(x * scale), gram(S(x * scale)), 64, 2.0)
    assert other["rms"] == pytest.approx(first["rms"], rel=1e-4)
    assert other["within"] == first["within"]


def test_zero_rows_and_what_is_not_finite():
    x = rows()
    x[3] = 0
    S = make_sketch("countsketch", 3000, 64)
    error = gram_error(gram(x), gram(S(x)), 64, 2.0)
    assert error["within"] > 0.98 and 0 < error["rms"] < 1
    assert gram_error(gram(x), gram(S(x)), 64, float("inf"))["within"] == 1
    zero = gram_error(torch.zeros(3, 3), torch.zeros(3, 3), 64, 2.0)
    assert zero["rms"] == 0 and zero["within"] == 1 and np.isnan(zero["correlation"])
    assert np.isnan(gram_error(torch.eye(2), torch.eye(2), 64, 2.0)["correlation"])
    sketched = S(x)
    sketched[0] = float("nan")
    error = gram_error(gram(x), gram(sketched), 64, 2.0)
    assert np.isnan(error["rms"]) and np.isnan(error["correlation"]) and error["within"] < 0.96


def test_refusals():
    eye = torch.eye(3)
    for exact, sketched in [
        (eye, torch.eye(2)),
        (eye[:2], eye[:2]),
        (eye[:1, :1], eye[:1, :1]),
        (eye[:0, :0], eye[:0, :0]),
    ]:
        with pytest.raises(ValueError, match="n >= 2"):
            gram_error(exact, sketched, 4, 2.0)
    for D, variance in [(0, 2.0), (4, 0.0), (4, float("nan"))]:
        with pytest.raises(ValueError, match="positive"):
            gram_error(eye, eye, D, variance)
