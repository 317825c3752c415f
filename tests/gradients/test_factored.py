"""Sketches from one backward pass against sketches of per-example gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dsel_assets.gradients import (
    factored,
    factors,
    gradient_blocks,
    loss_at_drawn,
    loss_at_predicted,
    output_directions,
    outputs_along,
)
from dsel_assets.gradients.factored import sketch_blocks
from dsel_assets.models import ARCHITECTURES, LoRA, add_lora, trainable_names
from dsel_assets.sketching.logra import LoGra
from dsel_assets.sketching.tensorsketch import TensorSketch

torch.manual_seed(0)
IMAGES, LABELS = torch.rand(11, 8, 8), torch.randint(5, (11,))
TOKENS = torch.randint(20, (11, 9))


class Text(nn.Module):
    """Embedding, LayerNorm, a block with LoRA, a head on the mean token."""

    def __init__(self, norm=True):
        super().__init__()
        self.tokens = nn.Embedding(20, 12, padding_idx=3)
        self.norm = nn.LayerNorm(12) if norm else nn.Identity()
        self.lora = LoRA(nn.Linear(12, 12), 2, 4.0)
        nn.init.normal_(self.lora.up.weight)
        self.head = nn.Linear(12, 5)

    def forward(self, indices):
        x = self.norm(self.tokens(indices))
        return self.head((x + torch.tanh(self.lora(x))).mean(1))


class Shared(nn.Module):
    """One module called twice, and an embedding whose weight is the head's as well."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 12)
        self.middle = nn.Linear(12, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, indices):
        x = self.middle(torch.relu(self.middle(self.tokens(indices))))
        return self.head(x.mean(1))


def convolutions():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        nn.Conv2d(1, 4, (3, 5), padding="same", padding_mode="reflect"),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2, padding=1),
        nn.Conv2d(6, 4, (4, 3), padding=(2, 1), bias=False),
        nn.Flatten(),
        nn.Linear(4 * 5 * 8, 5),
    )


def bottleneck():
    """Frozen, trained, frozen, trained; linear layers on [B, 8, 8]; gradients that are not free."""
    return nn.Sequential(
        nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 7), nn.Flatten(), nn.Linear(56, 5)
    )


def trainable(model):
    return [
        name for name, p in model.named_parameters() if "norm" not in name and "base" not in name
    ]


CASES = {
    "mlp": (lambda: ARCHITECTURES["mlp"]((8, 8), 5), IMAGES, trainable),
    "small_cnn": (lambda: ARCHITECTURES["small_cnn"]((8, 8), 5), IMAGES, trainable),
    "convolutions": (convolutions, IMAGES, trainable),
    "text": (Text, TOKENS, trainable),
    "shared": (Shared, TOKENS, trainable),
    "bottleneck": (bottleneck, IMAGES, lambda _: ["5.bias", "2.weight", "5.weight"]),
}
every_case = pytest.mark.parametrize("case", sorted(CASES))


def built(case):
    torch.manual_seed(1)
    build, inputs, names = CASES[case]
    model = build()
    return model, inputs, names(model)


def sketches_of(model, names, D=300, kind=TensorSketch):
    parameters = [(name, model.get_parameter(name)) for name in names]
    return [kind(p.numel(), D, 1, n, columns=p[0].numel()) for n, p in parameters]


def whole(model, inputs, sketches, labels=LABELS, **given):
    blocks = list(sketch_blocks(model, inputs, labels, sketches, **given))
    norms = [b.norms for b in blocks]
    return (
        torch.cat([b.sketches for b in blocks]),
        torch.cat([b.losses for b in blocks]),
        None if None in norms else torch.cat(norms),
        [(b.rows.start, b.rows.stop) for b in blocks],
    )


def reference(model, inputs, sketches, of=None):
    """The same from gradients that exist."""
    names = [sketch.name for sketch in sketches]
    blocks = list(gradient_blocks(model, inputs, LABELS, names, of=of))
    dims = {name: model.get_parameter(name).ndim for name in names}
    formed = [sum(s(b.gradients[s.name].flatten(-dims[s.name])) for s in sketches) for b in blocks]
    return (
        torch.cat(formed),
        torch.cat([b.losses for b in blocks]),
        torch.cat([b.norms for b in blocks]),
    )


def close(got, expected, tolerance=1e-5):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    error = (got - expected).norm(dim=-1)
    assert (error <= tolerance * expected.norm(dim=-1)).all(), error


@every_case
@pytest.mark.parametrize("kind", [TensorSketch, LoGra])
@pytest.mark.parametrize("D", [12, 300])
def test_it_is_the_sketch_of_the_per_example_gradients(case, kind, D):
    model, inputs, names = built(case)
    sketches = sketches_of(model, names, D, kind)
    found, losses, norms, _ = whole(model, inputs, sketches)
    expected, expected_losses, expected_norms = reference(model, inputs, sketches)
    close(found, expected)
    torch.testing.assert_close(losses, expected_losses)
    if case == "shared":
        assert norms is None
    else:
        torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=0)


CLASSES = {"shared": 20}
OBJECTIVES = {
    "outputs": lambda classes: outputs_along(output_directions(classes)),
    "combined": lambda classes: outputs_along(output_directions(classes, 1)),
    "predicted": lambda _: loss_at_predicted,
    "drawn": lambda _: loss_at_drawn([str(i) for i in range(11)]),
}


@every_case
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_other_objectives_are_sketched_as_their_gradients_are(case, objective):
    model, inputs, names = built(case)
    sketches = sketches_of(model, names)
    of = OBJECTIVES[objective](CLASSES.get(case, 5))
    found, losses, norms, _ = whole(model, inputs, sketches, of=of, block=4)
    expected, expected_losses, expected_norms = reference(model, inputs, sketches, of)
    close(found, expected, 1e-4)
    torch.testing.assert_close(losses, expected_losses)
    if norms is not None:
        torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", [TensorSketch, LoGra])
@pytest.mark.parametrize("objective", [None, *OBJECTIVES])
def test_adapters_at_their_start(kind, objective):
    """down has no gradient then, and up has one of rank one."""
    model, inputs, _ = built("small_cnn")
    add_lora(model, rank=3)
    sketches = sketches_of(model, trainable_names(model, "lora"), kind=kind)
    of = OBJECTIVES[objective](5) if objective else None
    found, _, norms, _ = whole(model, inputs, sketches, of=of)
    expected, _, expected_norms = reference(model, inputs, sketches, of)
    assert found.any()
    close(found, expected)
    torch.testing.assert_close(norms, expected_norms, rtol=1e-5, atol=0)


@every_case
@pytest.mark.parametrize("block", [1, 2, 4, 64])
def test_the_block_does_not_matter(case, block):
    model, inputs, names = built(case)
    sketches = sketches_of(model, names)
    found, losses, norms, rows = whole(model, inputs, sketches, block=block)
    expected, expected_losses, expected_norms, _ = whole(model, inputs, sketches, block=11)
    close(found, expected)
    torch.testing.assert_close(losses, expected_losses)
    if norms is not None:
        torch.testing.assert_close(norms, expected_norms)
    assert rows == [(i, min(i + block, 11)) for i in range(0, 11, block)]


@every_case
def test_the_order_of_the_examples_and_of_the_sketches_does_not_matter(case):
    model, inputs, names = built(case)
    sketches = sketches_of(model, names)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    found = whole(model, inputs[order], sketches[::-1], LABELS[order])[0]
    close(found, whole(model, inputs, sketches)[0][order])


@every_case
def test_pieces_of_a_layer_do_not_matter(case, monkeypatch):
    """Examples of a convolution, tokens and rows of a norm, cut where memory says."""
    model, inputs, names = built(case)
    sketches = sketches_of(model, names)
    expected, _, expected_norms, _ = whole(model, inputs, sketches)
    monkeypatch.setattr(factors, "_CHUNK", 300)
    found, _, norms, _ = whole(model, inputs, sketches)
    close(found, expected)
    if norms is not None:
        torch.testing.assert_close(norms, expected_norms)


def test_any_loss_of_one_number_an_example():
    """Of every token, weighted, in double precision; against a loop over backward."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Embedding(20, 6), nn.Linear(6, 20)).double()
    targets = torch.randint(20, TOKENS.shape)

    def loss(outputs, labels):
        return F.cross_entropy(outputs.mT, labels, reduction="none").square().sum(1)

    sketches = sketches_of(model, ["0.weight", "1.weight", "1.bias"])
    found, losses, norms, _ = whole(model, TOKENS, sketches, targets, loss=loss, block=4)
    for i in range(11):
        model.zero_grad()
        one = loss(model(TOKENS[i : i + 1]), targets[i : i + 1]).sum()
        one.backward()
        gradients = [model.get_parameter(s.name).grad.flatten() for s in sketches]
        expected = sum(s(g) for s, g in zip(sketches, gradients, strict=True))
        close(found[i], expected, 1e-12)
        torch.testing.assert_close(losses[i], one.detach())
        torch.testing.assert_close(
            norms[i].double(), torch.cat(gradients).norm(), rtol=1e-6, atol=0
        )


def test_norms_are_given_only_when_asked_for():
    model, inputs, names = built("mlp")
    assert whole(model, inputs, sketches_of(model, names), norms=False)[2] is None


@pytest.mark.parametrize("T", [1, 5, 700])
@pytest.mark.parametrize("scale", [1.0, 1e25])
def test_squared_norms_of_products(T, scale):
    """By Gram matrices when there are few tokens; a single token has |x| |d|."""
    x, d = torch.randn(4, T, 30), torch.randn(4, T, 40) * 1e-8
    exact = (d.double().mT @ x.double()).flatten(1).norm(dim=1) * scale
    found = factors.Products(x * scale, d).squared_norms().sqrt()
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=0)
    if T == 1:
        token = x.double().norm(dim=2) * d.double().norm(dim=2) * scale
        torch.testing.assert_close(found, token[:, 0], rtol=1e-6, atol=0)


def test_squared_norms_of_lookups_add_up_what_is_looked_up_twice():
    indices, d = torch.tensor([[1, 1, 0], [2, 0, 1]]), torch.randn(2, 3, 4)
    found = factors.Lookups(indices, d).squared_norms()
    first = (d[0, 0] + d[0, 1]).square().sum() + d[0, 2].square().sum()
    expected = torch.stack([first, d[1].square().sum()]).double()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_half_precision_accumulates_in_single():
    model, inputs, names = built("mlp")
    sketches = sketches_of(model, names)
    expected, _, expected_norms, _ = whole(model, inputs, sketches)
    found, losses, norms, _ = whole(model.bfloat16(), inputs.bfloat16(), sketches)
    assert found.dtype == norms.dtype == torch.float32 and losses.dtype == torch.bfloat16
    close(found, expected, 0.1)
    torch.testing.assert_close(norms, expected_norms, rtol=0.05, atol=0)


def test_eval_mode_is_used_and_nothing_of_the_model_changes():
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 5)
    )
    model[1].requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = ["1.weight", "4.bias"]
    sketches = sketches_of(model, names)
    found = whole(model.train(), IMAGES, sketches)[0]
    close(found, reference(model, IMAGES, sketches)[0])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model[1].parameters()] == [False, False]
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_not_used_or_does_not_reach_the_loss_has_no_gradient():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.lost, self.cut = (nn.Linear(8, 5) for _ in range(4))

        def forward(self, x):
            self.lost(x)
            with torch.no_grad():
                offset = self.cut(x)
            return (self.used(x) + offset).sum(1)

    model = Partly()
    names = [name for name, _ in model.named_parameters()]
    sketches = sketches_of(model, names)
    used = [sketch for sketch in sketches if sketch.name.startswith("used")]
    found, _, norms, _ = whole(model, IMAGES, sketches)
    close(found, whole(model, IMAGES, used)[0])
    assert norms is None or norms.isfinite().all()
    found = whole(model, IMAGES, [s for s in sketches if s.name.startswith(("idle", "lost"))])[0]
    assert found.shape == (11, 300) and not found.any()


def test_it_works_where_gradients_are_switched_off():
    model, inputs, names = built("mlp")
    sketches = sketches_of(model, names)
    with torch.no_grad():
        found = whole(model, inputs, sketches)[0]
    close(found, whole(model, inputs, sketches)[0])


def test_no_examples_give_no_blocks():
    model, inputs, names = built("mlp")
    assert list(sketch_blocks(model, inputs[:0], LABELS[:0], sketches_of(model, names))) == []


def test_what_is_not_finite_surfaces_in_its_example_alone():
    model, inputs, names = built("mlp")
    inputs = inputs.clone()
    inputs[4, 2, 2] = float("nan")
    found, _, norms, _ = whole(model, inputs, sketches_of(model, names))
    expected = [i != 4 for i in range(11)]
    assert found.isfinite().all(1).tolist() == norms.isfinite().tolist() == expected


# What is refused


def refused(model, inputs, names, match, error=ValueError, **given):
    with pytest.raises(error, match=match):
        whole(model, inputs, sketches_of(model, names), **given)
    assert not any(module._forward_hooks for module in model.modules())


def test_tensors_of_other_modules_are_refused_by_name():
    model = Text()
    refused(model, TOKENS, ["head.weight", "norm.bias"], r"'norm\.bias'.*'norm' \(LayerNorm\)")

    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight * 2, self.bias)

    model = nn.Sequential(nn.Flatten(), Scaled(64, 5))
    refused(model, IMAGES, ["1.weight"], r"'1\.weight', weight of module '1' \(Scaled\)")
    model = nn.Sequential(nn.Embedding(20, 6, max_norm=1.0), nn.Flatten(), nn.Linear(54, 5))
    refused(model, TOKENS, ["0.weight"], r"'0\.weight'.*'0' \(Embedding\).*max_norm")


def test_a_tensor_that_is_used_past_its_module_is_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(20, 12)

        def forward(self, indices):
            return self.tokens(indices).mean(1) @ self.tokens.weight.T

    refused(Tied(), TOKENS, ["tokens.weight"], r"'tokens\.weight' is used elsewhere")

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0].mean(1))

    names = ["head.weight", "attention.out_proj.weight"]
    refused(Attention(), IMAGES, names, r"'attention\.out_proj\.weight' is used elsewhere")


@pytest.mark.parametrize("shape", [(9,), (1, 9)])
@pytest.mark.parametrize("block", [4, 9, 64])
def test_a_layer_that_does_not_see_the_examples_is_refused(shape, block):
    """A table of 9 positions, also in blocks of 9 examples."""

    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(20, 12), nn.Embedding(9, 12)

        def forward(self, indices):
            return (self.tokens(indices) + self.positions(torch.arange(9).view(shape))).mean(1)

    names = ["tokens.weight", "positions.weight"]
    refused(Positions(), TOKENS, names, r"positions\.weight.*as its first dimension", block=block)
    flat = nn.Sequential(nn.Flatten(0, 1), nn.Linear(8, 5), nn.Unflatten(0, (-1, 8)))
    refused(flat, IMAGES, ["1.weight"], r"1\.weight.*as its first dimension", block=block)


def test_sketches_of_other_tensors_are_refused():
    model, inputs, _ = built("mlp")
    wrong = TensorSketch(64 * 128, 32, name="1.weight", columns=128)
    with pytest.raises(ValueError, match=r"'1\.weight'.*\(128, 64\).*64 rows and 128 columns"):
        whole(model, inputs, [wrong])
    right = sketches_of(model, ["1.weight"])
    for bad in ([], right * 2):
        with pytest.raises(ValueError, match="at least one tensor and of none twice"):
            whole(model, inputs, bad)
    with pytest.raises(AttributeError, match="nosuch"):
        whole(model, inputs, [TensorSketch(4, 4, name="1.nosuch")])
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        whole(model, inputs, right, block=0)


def test_sketches_of_different_dimensions_are_refused():
    model, inputs, _ = built("mlp")
    sketches = sketches_of(model, ["1.weight"], 32) + sketches_of(model, ["1.bias"], 64)
    with pytest.raises(ValueError, match=r"one dimension, got \[32, 64\]"):
        whole(model, inputs, sketches)


def test_a_loss_that_is_not_a_number_an_example_is_refused():
    model, inputs, names = built("mlp")
    refused(model, inputs, names, r"\[1\], got shape \(\)", loss=F.cross_entropy)


def test_an_input_that_changes_after_its_layer_is_refused():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x):
            x = torch.tanh(self.first(x)) * 2
            y = self.second(x)
            x += 1
            return y.mean(1)

    refused(Changing(), IMAGES, ["second.weight"], "modified in place", RuntimeError)


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
        real = factored.functional_call

        def call(model, weights, inputs):
            tried.append(len(inputs[0]))
            if len(inputs[0]) > room:
                raise error
            return real(model, weights, inputs)

        monkeypatch.setattr(factored, "functional_call", call)
        return tried

    return limit


@pytest.mark.parametrize("error", ERRORS, ids=["python", "cuda", "cpu"])
def test_out_of_memory_halves_the_block_and_goes_on(memory, error):
    model, inputs, names = built("small_cnn")
    sketches = sketches_of(model, names)
    expected = whole(model, inputs, sketches)[0]
    tried = memory(3, error)
    found, _, _, rows = whole(model, inputs, sketches, block=16)
    assert tried == [1, 11, 8, 4, 2, 2, 2, 2, 2, 1]
    assert rows == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 11)]
    close(found, expected)


def test_memory_that_does_not_suffice_for_one_example_is_an_error(memory):
    model, inputs, names = built("mlp")
    memory(0, MemoryError())
    with pytest.raises(MemoryError):
        whole(model, inputs, sketches_of(model, names), block=4)
    assert not any(module._forward_hooks for module in model.modules())
