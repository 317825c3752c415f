"""The sketch of a model: the sum of its tensors' sketches."""

import json
import math

import pytest
import torch

from dsel_assets.sketching import KINDS, ModelSketch, make_sketch

SHAPES = {"conv.weight": (8, 3, 3, 3), "conv.bias": (8,), "scale": (), "fc.weight": (10, 130)}
every_kind = pytest.mark.parametrize("kind", sorted(KINDS))


def gradients(batch=6, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(batch, *shape, generator=generator, dtype=dtype)
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("D", [64, 100])
def test_is_the_sum_of_its_tensors(make, D):
    g = gradients()
    expected = 0
    for name, shape in SHAPES.items():
        kind, options = make.kind, make.options
        if kind in ("tensorsketch", "logra"):
            options = {"columns": math.prod(shape[1:])}
            kind = kind if len(shape) > 1 else "tensorsketch"
        own = make_sketch(kind, math.prod(shape), D, 4, name, **options)
        expected = expected + own(g[name].reshape(6, -1))
    torch.testing.assert_close(ModelSketch(SHAPES, make.kind, D, 4, **make.options)(g), expected)


def test_adjoint(make):
    sketch = ModelSketch(SHAPES, make.kind, 100, 0, **make.options)
    g, y = gradients(), torch.randn(6, 100, dtype=torch.float64)
    back = sketch.adjoint(y)
    assert {name: t.shape[1:] for name, t in back.items()} == SHAPES
    inner = sum((g[name] * back[name]).sum() for name in SHAPES)
    torch.testing.assert_close((sketch(g) * y).sum(), inner, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"\[B, 100\]"):
        sketch.adjoint(y[:, :99])


@every_kind
def test_bits_do_not_depend_on_the_batch_or_on_the_order_of_the_dict(kind):
    sketch = ModelSketch(SHAPES, kind, 100, 0)
    g = gradients(dtype=torch.float32)
    whole = sketch(g)
    assert torch.equal(sketch({name: g[name][2:3] for name in reversed(g)}), whole[2:3])
    assert sketch({name: t[:0] for name, t in g.items()}).shape == (0, 100)


@pytest.mark.parametrize("kind", ["countsketch", "affd", "srht"])
def test_unbiased(kind):
    g = gradients(1)
    norm = sum(t.square().sum() for t in g.values())
    squares = torch.stack(
        [ModelSketch(SHAPES, kind, 64, seed)(g).square().sum() / norm for seed in range(400)]
    )
    assert abs(squares.mean() - 1) < 4 * squares.std() / 400**0.5
    assert 1.6 < 64 * squares.var() < 2.6


def test_identity_tells_order_shapes_kind_dimension_and_seed():
    def identity(shapes, kind="affd", D=64, seed=0):
        return ModelSketch(shapes, kind, D, seed).identity

    variants = [
        identity(SHAPES),
        identity(dict(reversed(SHAPES.items()))),
        identity({**SHAPES, "fc.weight": (130, 10)}),
        identity(SHAPES, kind="countsketch"),
        identity(SHAPES, D=65),
        identity(SHAPES, seed=1),
    ]
    assert len(set(variants)) == len(variants)
    sparser = ModelSketch(SHAPES, "sjlt", 64, 0, nonzeros=2).identity
    assert sparser != identity(SHAPES, kind="sjlt")
    assert identity({name: torch.Size(shape) for name, shape in SHAPES.items()}) == variants[0]
    assert json.loads(variants[0])["shapes"][0] == ["conv.weight", [8, 3, 3, 3]]


def test_errors_name_the_tensor():
    sketch = ModelSketch(SHAPES, "countsketch", 64, 0)
    g = gradients()
    with pytest.raises(ValueError, match=r"missing \['scale'\], unknown \['fc.bias'\]"):
        sketch({name.replace("scale", "fc.bias"): t for name, t in g.items()})
    with pytest.raises(ValueError, match=r"'fc.weight'.*\(6, 10, 130\), got \(6, 130, 10\)"):
        sketch({**g, "fc.weight": g["fc.weight"].mT})
    with pytest.raises(ValueError, match=r"'fc\.weight'"):
        sketch({**g, "fc.weight": g["fc.weight"][:5]})
    with pytest.raises(ValueError, match=r"conv\.weight"):
        sketch({**g, "conv.weight": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="option of countsketch: nonzeros"):
        ModelSketch(SHAPES, "countsketch", 64, 0, nonzeros=2)
    with pytest.raises(ValueError, match="no tensor"):
        ModelSketch({}, "affd", 64, 0)
