"""Sketched inner products of real per-example gradients, as attribution uses them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from dsel_assets.gradients import gradient_blocks
from dsel_assets.sketching import ModelSketch, make_sketch


@pytest.fixture(scope="module")
def gradients():
    """Of 150 digits, normalised, after 60 steps of an MLP 64-128-128-10 (p = 26,122)."""
    data = load_digits()
    x, y = torch.from_numpy(data.data).float() / 16, torch.from_numpy(data.target)
    torch.manual_seed(0)
    layers = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    model = nn.Sequential(*layers)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(60):
        optimiser.zero_grad()
        F.cross_entropy(model(x[step * 25 :][:25]), y[step * 25 :][:25]).backward()
        optimiser.step()
    names = [name for name, _ in model.named_parameters()]
    (block,) = gradient_blocks(model, x[:150], y[:150], names, block=150)
    return {
        name: gradient / block.norms.reshape(-1, *[1] * (gradient.ndim - 1))
        for name, gradient in block.gradients.items()
    }


def products(rows):
    """Inner products of all pairs i < j."""
    return (rows @ rows.T)[tuple(torch.triu_indices(len(rows), len(rows), 1))].numpy()


def exact(gradients):
    return products(torch.cat([g.flatten(1) for g in gradients.values()], 1))


def fidelity(gradients, kind, D, seeds=4):
    """Mean correlation with the exact inner products."""
    shapes = {name: g.shape[1:] for name, g in gradients.items()}
    found = [products(ModelSketch(shapes, kind, D, seed)(gradients)) for seed in range(seeds)]
    return mean_correlation(gradients, found)


def fidelity_of_the_whole(gradients, kind, D, seeds=4, **options):
    """The same of one operator on the flat gradient, as the paper has it."""
    flat = torch.cat([g.flatten(1) for g in gradients.values()], 1)
    made = [make_sketch(kind, flat.shape[1], D, seed, **options) for seed in range(seeds)]
    return mean_correlation(gradients, [products(sketch(flat)) for sketch in made])


def mean_correlation(gradients, found):
    return float(np.mean([np.corrcoef(exact(gradients), own)[0, 1] for own in found]))


@pytest.mark.parametrize("kind", ["countsketch", "affd", "srht", "sjlt", "tensorsketch"])
def test_correlation_reaches_the_papers_and_grows_with_the_dimension(gradients, kind):
    small, middle, large = (fidelity(gradients, kind, D) for D in (2**8, 2**10, 2**12))
    assert small > 0.95 and middle > 0.98 and large > 0.99
    assert small < middle < large


def test_the_papers_order(gradients):
    """Table 6: AFFD before AFJL, which needs about 4 times D, before QK."""
    whole = {"block": 2**15}
    affd = fidelity_of_the_whole(gradients, "affd_whole", 2**10)
    afjl = fidelity_of_the_whole(gradients, "afjl", 2**10, **whole)
    assert affd > afjl > fidelity_of_the_whole(gradients, "qk", 2**10)
    assert abs(fidelity_of_the_whole(gradients, "afjl", 2**12, **whole) - affd) < 0.01
    assert abs(fidelity(gradients, "countsketch", 2**10) - affd) < 0.01


def test_one_layer_alone_says_less_than_a_sketch_of_all(gradients):
    for name, gradient in gradients.items():
        if name.endswith("weight"):
            alone = np.corrcoef(exact(gradients), products(gradient.flatten(1)))[0, 1]
            assert alone < fidelity(gradients, "countsketch", 2**12)


def test_the_most_alike_stay_the_most_alike(gradients):
    flat = torch.cat([g.flatten(1) for g in gradients.values()], 1)
    shapes = {name: g.shape[1:] for name, g in gradients.items()}
    truth = (flat @ flat.T).fill_diagonal_(-2).topk(10).indices

    def overlap(D):
        Y = ModelSketch(shapes, "countsketch", D, 0)(gradients)
        found = (Y @ Y.T).fill_diagonal_(-2 * Y.square().sum(1).max()).topk(10).indices
        same = [len(set(a) & set(b)) for a, b in zip(truth.tolist(), found.tolist(), strict=True)]
        return np.mean(same) / 10

    assert 0.5 < overlap(2**8) < overlap(2**12)
    assert overlap(2**12) > 0.85
