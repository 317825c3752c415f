"""One gradient an example, the same however the examples are cut into blocks."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsel_assets.gradients import gradient_blocks, per_example
from dsel_assets.models import ARCHITECTURES

torch.manual_seed(0)
IMAGES, LABELS = torch.rand(11, 8, 8), torch.randint(5, (11,))


def cnn():
    torch.manual_seed(1)
    return ARCHITECTURES["small_cnn"]((8, 8), 5)


def with_dropout_and_norm():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 5)
    )
    model.train()
    model(torch.rand(32, 8, 8))  # running statistics that differ from the start
    return model


def names(model):
    return [name for name, _ in model.named_parameters()]


def one_by_one(model, trainable):
    """The same by a plain loop over backward."""
    model.eval()
    gradients, losses = [], []
    for image, label in zip(IMAGES, LABELS, strict=True):
        model.zero_grad()
        loss = F.cross_entropy(model(image[None]), label[None])
        loss.backward()
        gradients.append({name: model.get_parameter(name).grad.clone() for name in trainable})
        losses.append(loss.detach())
    return {k: torch.stack([g[k] for g in gradients]) for k in trainable}, torch.stack(losses)


def whole(model, trainable, **given):
    blocks = list(gradient_blocks(model, IMAGES, LABELS, trainable, **given))
    gradients = {name: torch.cat([b.gradients[name] for b in blocks]) for name in trainable}
    return (
        gradients, torch.cat([b.losses for b in blocks]), torch.cat([b.norms for b in blocks]),
        [(b.rows.start, b.rows.stop) for b in blocks],
    )  # fmt: skip


@pytest.mark.parametrize("build", [cnn, with_dropout_and_norm])
@pytest.mark.parametrize("block", [1, 2, 4, 11, 64])
def test_gradients_are_those_of_a_loop_whatever_the_block(build, block):
    expected, losses = one_by_one(build(), names(build()))
    found, found_losses, norms, rows = whole(build(), names(build()), block=block)
    assert list(found) == names(build())
    for name, gradient in expected.items():
        assert found[name].dtype == torch.float32 and not found[name].requires_grad
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found_losses, losses)
    flat = torch.cat([gradient.flatten(1) for gradient in expected.values()], 1)
    torch.testing.assert_close(norms, flat.norm(dim=1))
    assert rows[0][0] == 0 and rows[-1][1] == len(IMAGES)
    assert all(stop == start for (_, stop), (start, _) in pairwise(rows))


def test_the_mean_of_the_gradients_is_the_gradient_of_the_mean():
    model = cnn()
    found = whole(model, names(model))[0]
    F.cross_entropy(model(IMAGES), LABELS).backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.mean(0), model.get_parameter(name).grad)


def test_only_what_is_trainable_has_a_gradient():
    model = cnn()
    some = [name for name in reversed(names(model)) if name.startswith(("10", "8"))]
    expected = one_by_one(cnn(), some)[0]
    found, _, norms, _ = whole(model, some)
    assert list(found) == some
    for name in some:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)
    flat = torch.cat([gradient.flatten(1) for gradient in expected.values()], 1)
    torch.testing.assert_close(norms, flat.norm(dim=1))


def test_a_parameter_that_asks_for_no_gradient_can_still_be_differentiated():
    model = cnn().requires_grad_(False)
    found = whole(model, ["10.bias"])[0]["10.bias"]
    torch.testing.assert_close(found, one_by_one(cnn(), ["10.bias"])[0]["10.bias"])


def test_eval_mode_is_used_and_nothing_of_the_model_changes():
    model = with_dropout_and_norm().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    first = whole(model, names(model))
    torch.manual_seed(4)
    second = whole(model.train(), names(model))
    for name in first[0]:
        torch.testing.assert_close(first[0][name], second[0][name], rtol=0, atol=0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_examples_give_no_blocks():
    assert list(gradient_blocks(cnn(), IMAGES[:0], LABELS[:0], names(cnn()))) == []


def test_norms_of_large_gradients_do_not_overflow():
    model = nn.Linear(4, 3, bias=False)
    inputs = torch.full((2, 4), 1e25)
    (block,) = gradient_blocks(model, inputs, torch.tensor([0, 1]), ["weight"])
    assert block.norms.isfinite().all()


# Memory


ERRORS = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
]


@pytest.fixture
def memory(monkeypatch):
    """Room for so many examples at once; more raise the given error. Records what was tried."""
    tried = []

    def limit(room, error):
        def limited(function, **given):
            real = torch.func.vmap(function, **given)

            def call(weights, inputs, *rest):
                tried.append(len(inputs))
                if len(inputs) > room:
                    raise error
                return real(weights, inputs, *rest)

            return call

        monkeypatch.setattr(per_example, "vmap", limited)
        return tried

    return limit


@pytest.mark.parametrize("error", ERRORS, ids=["python", "cuda", "cpu"])
def test_out_of_memory_halves_the_block_and_goes_on(memory, error):
    expected = whole(cnn(), names(cnn()), block=64)
    tried = memory(3, error)
    found = whole(cnn(), names(cnn()), block=16)
    assert tried == [11, 8, 4, 2, 2, 2, 2, 2, 1]
    assert found[3] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 11)]
    for name in names(cnn()):
        torch.testing.assert_close(found[0][name], expected[0][name], rtol=1e-4, atol=1e-6)


def test_memory_that_runs_out_in_the_norms_halves_the_block_too(monkeypatch):
    real = per_example._norms

    def limited(gradients):
        if len(gradients["10.bias"]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(gradients)

    monkeypatch.setattr(per_example, "_norms", limited)
    rows = whole(cnn(), names(cnn()), block=8)[3]
    assert rows == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 11)]


def test_memory_that_does_not_suffice_for_one_example_is_an_error(memory):
    tried = memory(0, MemoryError())
    with pytest.raises(MemoryError):
        whole(cnn(), names(cnn()), block=4)
    assert tried == [4, 2, 1]


def test_other_errors_are_not_taken_for_a_lack_of_memory(memory):
    tried = memory(0, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        whole(cnn(), names(cnn()), block=8)
    assert tried == [8]
