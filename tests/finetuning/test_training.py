"""The same training for everyone: bits, steps, what is frozen, and who is seen when."""

from itertools import islice

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsel_assets.finetuning import predict, shuffled_batches, train


def data(rows=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (rows,), generator=generator)
    return torch.randn(rows, 4, generator=generator) + labels[:, None], labels


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


ALL = [name for name, _ in network().named_parameters()]


def run(model=None, inputs=None, labels=None, weights=None, **given):
    known_inputs, known_labels = data()
    inputs = known_inputs if inputs is None else inputs
    labels = known_labels if labels is None else labels
    weights = torch.ones(len(inputs)) if weights is None else weights
    settings = {"trainable": ALL, "steps": 30, "batch_size": 8, "lr": 1e-2, "seed": 0} | given
    return train(model or network(), inputs, labels, weights, **settings)


def equal(one, other):
    return all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


# train


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_same_seed_gives_the_same_bits(dropout):
    first = run(network(dropout))
    torch.manual_seed(99)
    torch.rand(5)
    again = run(network(dropout))
    assert equal(first, again) and first.curve == again.curve
    assert not equal(first, run(network(dropout), seed=1))


def test_it_learns():
    inputs, labels = data(200)
    model = network()
    before = F.cross_entropy(model(inputs), labels)
    found = run(model, inputs, labels, steps=300)
    assert F.cross_entropy(model(inputs), labels) < 0.8 * before
    assert found.curve[-1] < found.curve[0]
    assert (predict(model, inputs).argmax(1) == labels).float().mean() > 0.6


@pytest.mark.parametrize("steps, points", [(1, 1), (3, 3), (10, 10), (37, 10)])
def test_steps_are_counted(monkeypatch, steps, points):
    taken = []
    real = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *a, **k: (taken.append(0), real(self, *a, **k))[1]
    )
    found = run(steps=steps)
    assert len(taken) == steps and len(found.curve) == points


def test_the_number_of_steps_does_not_depend_on_the_number_of_examples():
    inputs, labels = data(400)
    for rows in (1, 5, 400):
        seen = []
        model = network()
        model.register_forward_hook(lambda _, args, __, seen=seen: seen.append(len(args[0])))
        run(model, inputs[:rows], labels[:rows], steps=12)
        assert seen == [min(8, rows)] * 12


def test_the_rate_decays_to_nothing(monkeypatch):
    rates = []
    real = torch.optim.Adam.step

    def step(self, *args, **given):
        rates.append(self.param_groups[0]["lr"])
        return real(self, *args, **given)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    run(steps=20, lr=0.1)
    assert rates[0] == 0.1 and rates == sorted(rates, reverse=True) and 0 < rates[-1] < 0.001


@pytest.mark.parametrize("trainable", [["3.weight", "3.bias"], ["0.bias"]])
def test_frozen_parameters_are_unchanged(trainable):
    start = network().state_dict()
    found = run(trainable=trainable)
    for name in ALL:
        assert torch.equal(found.weights[name], start[name]) == (name not in trainable)


def test_what_an_earlier_training_froze_is_trained_again():
    model = network()
    run(model, trainable=["3.bias"])
    assert equal(run(network()), run(_reset(model)))


def _reset(model):
    model.load_state_dict(network().state_dict())
    return model


def test_an_example_of_weight_zero_teaches_nothing():
    labels = data()[1]
    weights = torch.ones(40)
    weights[::2] = 0
    wrong = torch.where(weights == 0, (labels + 1) % 3, labels)
    assert equal(run(labels=labels, weights=weights), run(labels=wrong, weights=weights))
    assert not equal(run(labels=labels), run(labels=wrong))
    assert not equal(run(labels=labels), run(labels=labels, weights=weights))


def test_a_larger_weight_pulls_harder():
    inputs, labels = torch.zeros(2, 4), torch.tensor([0, 1])
    for heavy in (0, 1):
        model, weights = network(), torch.full((2,), 0.2)
        weights[heavy] = 1.8
        run(model, inputs, labels, weights, steps=200)
        assert predict(model, inputs)[0].argmax() == heavy


def test_weights_in_double_precision_are_welcome():
    assert equal(run(), run(weights=torch.ones(40).double()))


def test_the_model_is_trained_in_place_and_ends_in_eval_mode():
    model = network(0.5)
    found = run(model)
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, found.weights[name])
        assert not found.weights[name].requires_grad


def test_nothing_to_train_on_is_an_error():
    with pytest.raises(ValueError, match="nothing to train on"):
        run(inputs=torch.empty(0, 4), labels=torch.empty(0, dtype=torch.long))


def test_weights_on_the_way_are_copies_and_change_nothing():
    plain, watched = run(), run(keep=[0, 3, 30])
    assert set(watched.kept) == {0, 3, 30} and not plain.kept
    for name, weight in plain.weights.items():
        assert torch.equal(watched.weights[name], weight)
        assert torch.equal(watched.kept[30][name], weight)
        assert torch.equal(watched.kept[0][name], network(0.0).state_dict()[name])
    assert any(not torch.equal(watched.kept[3][n], w) for n, w in plain.weights.items())


# shuffled_batches


@pytest.mark.parametrize("rows, size", [(12, 4), (10, 4), (7, 3), (5, 5), (3, 8), (1, 4)])
def test_each_example_is_seen_once_before_any_is_seen_again(rows, size):
    batches = list(islice(shuffled_batches(rows, size, 0), 60))
    assert {len(batch) for batch in batches} == {min(size, rows)}
    stream = torch.cat(batches)
    passes = [part.tolist() for part in stream.split(rows) if len(part) == rows]
    assert all(sorted(one) == list(range(rows)) for one in passes)
    assert rows == 1 or len({tuple(one) for one in passes}) > 1


def test_batches_depend_on_the_seed_alone():
    def first(seed):
        return torch.cat(list(islice(shuffled_batches(30, 7, seed), 20)))

    one = first(5)
    torch.manual_seed(0)
    torch.rand(3)
    assert torch.equal(one, first(5)) and not torch.equal(one, first(6))


# predict


@pytest.mark.parametrize("block", [1, 7, 40, 1000])
def test_probabilities_do_not_depend_on_the_block(block):
    model, (inputs, _) = network(0.5).train(), data()
    found = predict(model, inputs, block)
    assert found.shape == (40, 3) and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found.sum(1), torch.ones(40))
    torch.testing.assert_close(found, model.eval()(inputs).softmax(-1).detach())
