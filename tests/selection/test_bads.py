"""Weights by inference: its gradients are unbiased, its prior holds, and the target is what counts.

T4 to T7 number the tests that any implementation of the paper must pass.
"""

from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

from dsel_assets.selection import bads, infer_weights


def blobs(rows, seed=0, features=4, classes=3):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (rows,), generator=generator)
    inputs = torch.randn(rows, features, generator=generator) + 2 * labels[:, None]
    return inputs, labels


def network(features=4, classes=3, hidden=8, dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(features, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, classes)
    )


def logit(weights):
    return np.log(weights) - np.log1p(-weights)


# T4: mini-batches are unbiased

N, B, BETA, SIGMA = 6, 2, 0.4, 0.3
BATCHES = [torch.tensor(rows) for rows in combinations(range(N), B)]


def logits_after(monkeypatch, batches):
    """Logits after these batches, with the network held where it is and no noise."""
    monkeypatch.setattr(bads, "shuffled_batches", lambda *_: iter(batches))
    train, target = blobs(N), blobs(5, seed=1)
    found = infer_weights(
        network(), train, target, beta=BETA, sigma=SIGMA, steps=len(batches), batch_size=B
    )
    return found


@pytest.fixture
def still(monkeypatch):
    monkeypatch.setattr(bads, "JITTER", 0.0)
    monkeypatch.setattr(bads, "LEARNING_RATE", 0.0)
    monkeypatch.setattr(bads, "STEP", 1e-2)  # small against the bound that holds it in tiny pools


def test_mini_batch_gradients_of_the_weights_average_to_the_full_one(still, monkeypatch):
    """T4 for w, prior and data: a first step on all rows leaves beta, the second is on a batch."""
    everything = torch.arange(N)
    model, (inputs, labels) = network(), blobs(N)
    losses = F.cross_entropy(model(inputs), labels, reduction="none").detach().double().numpy()
    weight = BETA
    moved = logit(BETA) - 1e-2 * weight * (1 - weight) * losses
    weights = 1 / (1 + np.exp(-moved))
    slope = weights * (1 - weights)
    full = 1e-2 * slope * (losses + (weights.mean() - BETA) / SIGMA**2)

    def second(batch):
        # the recorded mean is over the chain's second half, which is its second step alone
        mean = logits_after(monkeypatch, [everything, batch]).mean
        return logit(mean) - moved

    np.testing.assert_allclose(second(everything), -full, rtol=1e-3)
    average = np.mean([second(batch) for batch in BATCHES], axis=0)
    np.testing.assert_allclose(average, -full * B / N, rtol=1e-3)


def test_only_the_rows_of_a_batch_move(still, monkeypatch):
    for batch in BATCHES:
        mean = logits_after(monkeypatch, [batch]).mean
        others = np.setdiff1d(np.arange(N), batch)
        np.testing.assert_allclose(mean[others], BETA, rtol=1e-6)
        assert (mean[batch] < BETA).all()


def test_mini_batch_gradients_of_the_network_average_to_the_full_one(monkeypatch):
    """T4 for theta: mean_B(w l) + mean_T(l), the target whole at every step."""
    train, target = blobs(N), blobs(5, seed=1)

    def gradient(batch):
        monkeypatch.setattr(bads, "shuffled_batches", lambda *_: iter([batch]))
        model, seen = network(), []
        for parameter in model.parameters():
            parameter.register_hook(lambda g: seen.append(g.clone()))
        infer_weights(model, train, target, beta=BETA, sigma=SIGMA, steps=1, batch_size=B)
        return {tuple(g.shape): g for g in seen}

    model = network()
    loss = BETA * F.cross_entropy(model(train[0]), train[1])
    (loss + F.cross_entropy(model(target[0]), target[1])).backward()
    found = [gradient(batch) for batch in BATCHES]
    for parameter in model.parameters():
        average = torch.stack([each[tuple(parameter.shape)] for each in found]).mean(0)
        torch.testing.assert_close(average, parameter.grad)


# T5: the prior


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("batch_size", [20, 100, 400])
def test_the_prior_pins_the_mean(beta, batch_size):
    found = infer_weights(
        network(), blobs(400), blobs(30, seed=1), beta=beta, sigma=0.02, steps=400,
        batch_size=batch_size,
    )  # fmt: skip
    assert abs(found.mean.mean() - beta) < 0.01
    assert found.diagnostics["mean_weight"] == pytest.approx(found.mean.mean())
    assert ((found.mean > 0) & (found.mean < 1)).all() and (found.sd >= 0).all()


def test_without_the_prior_the_weights_collapse():
    inputs, labels = blobs(200)
    noise = labels[torch.randperm(200, generator=torch.Generator().manual_seed(0))]
    found = infer_weights(
        network(), (inputs, noise), blobs(30, seed=1), beta=0.5, sigma=1e6, steps=1500,
        batch_size=100,
    )  # fmt: skip
    assert found.mean.mean() < 0.1


# T6, T7: label noise


def noisy_digits(noise, kind, seed, rows=600):
    """10 clean digits a class as the target; a pool with wrong labels, and which are right."""
    data = load_digits()
    images, true = (data.data / 16).astype(np.float32), data.target
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    target = np.concatenate([order[true[order] == digit][:10] for digit in range(10)])
    pool = rng.permutation(np.setdiff1d(order, target))[:rows]
    given, wrong = true[pool].copy(), rng.random(rows) < noise
    given[wrong] = rng.integers(0, 10, wrong.sum()) if kind == "any" else (given[wrong] + 1) % 10
    as_tensors = (images[pool], given), (images[target], true[target])
    train, clean = (tuple(map(torch.from_numpy, part)) for part in as_tensors)
    return train, clean, given == true[pool]


def auroc(noise, kind, seed):
    train, target, right = noisy_digits(noise, kind, seed)
    model = network(64, 10, hidden=64, seed=seed)
    found = infer_weights(model, train, target, beta=1 - noise, seed=seed, steps=500)
    return roc_auc_score(right, found.mean)


@pytest.mark.parametrize("noise, kind, reached, lost", [(0.8, "any", 0.98, 0.05),
                                                        (0.6, "next", 0.95, 0.5)])  # fmt: skip
@pytest.mark.parametrize("seed", [0, 1])
def test_the_target_is_what_tells_right_labels_from_wrong(
    monkeypatch, noise, kind, reached, lost, seed
):
    with_target = auroc(noise, kind, seed)
    monkeypatch.setattr(bads, "META_FACTOR", 0.0)
    without = auroc(noise, kind, seed)
    assert with_target > reached
    assert without < with_target - lost


# T12 and the edges


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_same_seed_gives_the_same_bits(dropout):
    def run(seed, before):
        model = network(dropout=dropout)
        torch.manual_seed(before)
        return infer_weights(model, blobs(50), blobs(9, seed=1), seed=seed, steps=40, batch_size=16)

    one, same, other = run(7, 1), run(7, 2), run(8, 1)
    np.testing.assert_array_equal(one.mean, same.mean)
    np.testing.assert_array_equal(one.sd, same.sd)
    assert not np.array_equal(one.mean, other.mean)


@pytest.mark.parametrize("rows", [1, 2, 5, 40])
@pytest.mark.parametrize("beta", [0.05, 0.5, 0.95])
@pytest.mark.parametrize("sigma", [0.01, 0.05])
def test_a_batch_that_is_the_whole_pool_stays_stable(rows, beta, sigma):
    found = infer_weights(
        network(), blobs(rows), blobs(9, seed=1), beta=beta, sigma=sigma, steps=300, batch_size=100
    )
    assert np.isfinite(found.mean).all() and np.isfinite(found.sd).all()
    assert abs(found.mean.mean() - beta) < 0.05
    assert found.sd.max() < 0.1


@pytest.mark.parametrize("rows, steps", [(2_000, 10), (300, 1), (5_000, 3), (40, 2)])
def test_a_chain_shorter_than_a_pass_still_has_a_mean(rows, steps):
    found = infer_weights(network(), blobs(rows), blobs(9, seed=1), steps=steps, batch_size=20)
    assert found.diagnostics["samples"] >= 1
    assert np.isfinite(found.mean).all() and np.isfinite(found.sd).all()


def test_frozen_parameters_stay_and_the_model_ends_in_eval_mode():
    model = network()
    model[0].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    infer_weights(model, blobs(50), blobs(9, seed=1), steps=20, batch_size=16)
    after = model.state_dict()
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["3.weight"], after["3.weight"])
    assert not model.training


def test_beta_is_where_the_weights_begin(still):
    found = infer_weights(network(), blobs(50), blobs(9, seed=1), beta=0.3, steps=1, batch_size=10)
    assert np.isclose(found.mean, 0.3, rtol=1e-6).sum() == 40


@pytest.mark.parametrize("pool, target", [(0, 5), (5, 0)])
def test_an_empty_set_is_refused(pool, target):
    with pytest.raises(ValueError, match="at least one pool and one target example"):
        infer_weights(network(), blobs(pool), blobs(target), steps=2)


@pytest.mark.parametrize("given", [{"mode": "sgld"}, {"chains": 2}])
def test_what_is_not_there_yet_is_refused(given):
    with pytest.raises(ValueError, match="mode='paper' with one chain"):
        infer_weights(network(), blobs(5), blobs(5), steps=2, **given)
