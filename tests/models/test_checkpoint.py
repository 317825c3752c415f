"""Fresh copies of a model, what of it is trained, and its weights on disk."""

import pytest
import torch
from torch import nn

from dsel_assets.models import (
    ARCHITECTURES,
    builder,
    load_weights,
    save_weights,
    trainable_names,
)

SHAPES = {"small_cnn": (8, 12), "mlp": (5, 3)}
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def make(name, seed=0):
    torch.manual_seed(seed)
    return ARCHITECTURES[name](SHAPES[name], 4)


@architectures
def test_weights_come_back_from_disk_bit_by_bit(name, tmp_path):
    weights = make(name).state_dict()
    weights["extra.view"] = torch.arange(12.0).reshape(3, 4).T
    save_weights(weights, tmp_path / "weights.safetensors")
    found = load_weights(tmp_path / "weights.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[key], value) for key, value in weights.items())
    assert not any(value.requires_grad for value in found.values())


def test_parameters_that_require_gradients_can_be_saved(tmp_path):
    save_weights(dict(make("mlp").named_parameters()), tmp_path / "w")
    assert load_weights(tmp_path / "w").keys() == make("mlp").state_dict().keys()


@architectures
def test_a_builder_gives_the_same_model_each_time_and_never_a_shared_one(name):
    weights = {key: value.clone() for key, value in make(name).state_dict().items()}
    build = builder(name, list(SHAPES[name]), 4, weights)
    first = build()
    inputs = torch.rand(3, *SHAPES[name])
    expected = make(name)(inputs)
    assert not first.training and torch.equal(first(inputs), expected)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert torch.equal(build()(inputs), expected)
    assert expected.shape == (3, 4)


@architectures
def test_weights_of_another_shape_are_refused_by_name(name):
    weights = make(name).state_dict()
    last = list(weights)[-1]
    with pytest.raises(RuntimeError, match=last):
        builder(name, SHAPES[name], 4, weights | {last: torch.zeros(9)})()
    with pytest.raises(RuntimeError, match=last):
        builder(name, SHAPES[name], 4, {k: v for k, v in weights.items() if k != last})()


def test_the_default_model_has_as_many_parameters_as_it_says():
    model = ARCHITECTURES["small_cnn"]((28, 28), 10)
    assert sum(p.numel() for p in model.parameters()) == 26_698


@pytest.mark.parametrize("shape", [(28, 30), (7, 28)])
def test_sides_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=f"divisible by 4, not {shape[0]} x {shape[1]}"):
        ARCHITECTURES["small_cnn"](shape, 10)


# What is trained


def test_all_and_head():
    model = make("small_cnn")
    everything = [name for name, _ in model.named_parameters()]
    assert trainable_names(model, "all") == everything
    assert trainable_names(model, "head") == everything[-2:] == ["10.weight", "10.bias"]


def test_the_head_of_a_nested_model_is_its_last_layer():
    model = nn.ModuleDict({"body": make("mlp"), "head": nn.Sequential(nn.Linear(4, 2))})
    assert trainable_names(model, "head") == ["head.0.weight", "head.0.bias"]


@pytest.mark.parametrize(
    "patterns, expected",
    [
        ("*.bias", ["1.bias", "3.bias"]),
        (["3.*", "1.weight"], ["1.weight", "3.weight", "3.bias"]),
        (["3.*", "*.bias"], ["1.bias", "3.weight", "3.bias"]),
        ("*", ["1.weight", "1.bias", "3.weight", "3.bias"]),
    ],
)
def test_patterns_keep_the_order_of_the_model_and_repeat_nothing(patterns, expected):
    assert trainable_names(make("mlp"), patterns) == expected


@pytest.mark.parametrize("patterns", ["4.*", ["3.*", "4.weight"], "", "head.*"])
def test_a_pattern_that_fits_nothing_is_refused_with_what_there_is(patterns):
    with pytest.raises(ValueError, match=r"fits none of 1\.weight, 1\.bias, 3\.weight, 3\.bias"):
        trainable_names(make("mlp"), patterns)
