"""Adapters: nothing at the start, gradients and names as they should be."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsel_assets.finetuning import train
from dsel_assets.gradients import gradient_blocks
from dsel_assets.models import (
    ARCHITECTURES,
    LoRA,
    add_lora,
    builder,
    load_weights,
    save_weights,
    trainable_names,
)

SHAPES = {"small_cnn": (8, 12), "mlp": (5, 3)}
architectures = pytest.mark.parametrize("name", ARCHITECTURES)


def make(name, seed=0):
    torch.manual_seed(seed)
    return ARCHITECTURES[name](SHAPES[name], 4).eval()


def adapted(name, **given):
    model = make(name)
    add_lora(model, **({"rank": 2, "alpha": 6.0} | given))
    return model


@architectures
def test_at_the_start_the_model_gives_what_its_base_gives(name):
    inputs = torch.rand(7, *SHAPES[name])
    assert torch.equal(adapted(name)(inputs), make(name)(inputs))


@architectures
def test_trained_it_is_a_linear_layer_of_the_sum(name):
    model, inputs = adapted(name), torch.rand(7, *SHAPES[name])
    merged = make(name)
    for path, layer in model.named_modules():
        if isinstance(layer, LoRA):
            nn.init.normal_(layer.up.weight)
            weight = merged.get_submodule(path).weight
            with torch.no_grad():
                weight += 6.0 / 2 * layer.up.weight @ layer.down.weight
    torch.testing.assert_close(model(inputs), merged(inputs), rtol=1e-4, atol=1e-4)


def test_at_the_start_only_up_has_a_gradient():
    """It is s delta (D a)', with a the layer's input and delta what arrives at its output."""
    torch.manual_seed(0)
    x, y = torch.rand(5, 3), torch.randint(4, (5,))
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4))
    a = model[:2](x).detach()
    add_lora(model, rank=2, alpha=6.0, modules=["2"])
    names = trainable_names(model, "lora")
    (block,) = gradient_blocks(model, x, y, names)
    delta = model(x).softmax(1) - F.one_hot(y, 4)
    expected = 3.0 * delta[:, :, None] * (a @ model[2].down.weight.T)[:, None]
    torch.testing.assert_close(block.gradients["2.up.weight"], expected.detach())
    assert block.gradients["2.up.weight"].any() and not block.gradients["2.down.weight"].any()


def test_what_is_drawn_depends_on_the_name_alone():
    """Not on torch's seed, nor on what else has an adapter; and torch's seed stays as it was."""
    square = [nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))) for _ in range(2)]
    torch.manual_seed(3)
    add_lora(square[0])
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    add_lora(square[1], modules=["2"])
    assert torch.equal(square[0][2].down.weight, square[1][2].down.weight)
    assert not torch.equal(square[0][2].down.weight, square[0][1].down.weight)


def test_down_is_as_wide_as_kaiming_has_it():
    """Uniform on +-1/sqrt(in), as nn.Linear's own weights."""
    layer = LoRA(nn.Linear(400, 3), 50, 1.0)
    bound = 400**-0.5
    assert layer.down.weight.abs().max() <= bound
    assert layer.down.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)


@architectures
def test_it_takes_the_place_of_linear_layers_and_of_no_others(name):
    model = adapted(name)
    linear = [path for path, m in make(name).named_modules() if type(m) is nn.Linear]
    assert [path for path, m in model.named_modules() if isinstance(m, LoRA)] == linear
    expected = [f"{path}.{part}.weight" for path in linear for part in ("down", "up")]
    assert trainable_names(model, "lora") == expected
    order = trainable_names(model, "all")
    assert [n for n in order if n in expected] == expected
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".base." in n)


def test_a_subclass_that_uses_its_weight_otherwise_is_left_alone():
    model = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.Linear(8, 2)})
    add_lora(model)
    assert type(model["b"]) is LoRA and type(model["a"].out_proj) is not LoRA


def test_patterns_choose_the_layers():
    model = adapted("small_cnn", modules=["1?"])
    assert trainable_names(model, "lora") == ["10.down.weight", "10.up.weight"]


@pytest.mark.parametrize("modules", [["fc*"], ["*", "2"], ["1.weight"]])
def test_a_pattern_that_fits_nothing_is_refused_with_what_there_is(modules):
    with pytest.raises(ValueError, match=r"model\.lora\.modules: '.*' fits none of 1, 3"):
        adapted("mlp", modules=modules)


def test_without_adapters_there_is_nothing_of_the_kind_to_train():
    with pytest.raises(ValueError, match=r"finetune\.trainable: lora.*give model\.lora"):
        trainable_names(make("mlp"), "lora")


@architectures
def test_training_them_changes_nothing_else_and_comes_back_from_disk(name, tmp_path):
    build = builder(name, SHAPES[name], 4, make(name).state_dict(), {"rank": 2})
    model, start = build(), build().state_dict()
    inputs, labels = torch.rand(20, *SHAPES[name]), torch.randint(4, (20,))
    names = trainable_names(model, "lora")
    trained = train(
        model, inputs, labels, torch.ones(20),
        trainable=names, steps=5, batch_size=10, lr=0.1, seed=0,
    )  # fmt: skip
    changed = {key for key, value in trained.weights.items() if not torch.equal(value, start[key])}
    assert changed == set(names)
    save_weights(trained.weights, tmp_path / "w")
    again = build()
    again.load_state_dict(load_weights(tmp_path / "w"))
    assert torch.equal(again(inputs), model(inputs)) and not torch.equal(
        again(inputs), build()(inputs)
    )
