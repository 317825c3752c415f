"""What is differentiated: the loss at some label, or the outputs."""

import pytest
import torch
from torch.nn import functional as F

from dsel_assets.gradients import (
    gradient_blocks,
    loss_at_drawn,
    loss_at_predicted,
    output_directions,
    outputs_along,
)
from dsel_assets.models import ARCHITECTURES

torch.manual_seed(0)
N, C = 11, 5
IMAGES, LABELS = torch.rand(N, 8, 8), torch.randint(C, (N,))
IDS = [f"example {i}" for i in range(N)]
Z = 5.0  # standard deviations; beyond it by chance less than once in a million


def cnn():
    torch.manual_seed(1)
    return ARCHITECTURES["small_cnn"]((8, 8), C).eval()


def flat(gradients):
    """[B, p] or [B, k, p] of tensors by name, in the model's order."""
    names = [name for name, _ in cnn().named_parameters()]
    dims = {name: cnn().get_parameter(name).ndim for name in names}
    return torch.cat([gradients[n].flatten(-dims[n]) for n in names], -1)


def rows(of=None, inputs=IMAGES, labels=LABELS, **given):
    model = cnn()
    names = [name for name, _ in model.named_parameters()]
    blocks = list(gradient_blocks(model, inputs, labels, names, of=of, **given))
    return (
        torch.cat([flat(b.gradients) for b in blocks]),
        torch.cat([b.losses for b in blocks]),
        torch.cat([b.norms for b in blocks]),
    )


def jacobian():
    """[N, C, p], one logit at a time."""
    model = cnn()
    found = []
    for image in IMAGES:
        logits = model(image[None])[0]
        gradients = [torch.autograd.grad(o, model.parameters(), retain_graph=True) for o in logits]
        found.append(torch.stack([torch.cat([g.flatten() for g in one]) for one in gradients]))
    return torch.stack(found)


OBJECTIVES = {
    "outputs": outputs_along(output_directions(C)),
    "combined": outputs_along(output_directions(C, 2)),
    "predicted": loss_at_predicted,
    "drawn": loss_at_drawn(IDS),
}
every = pytest.mark.parametrize("name", OBJECTIVES)


# Outputs


@pytest.mark.parametrize("block", [1, 4, 64])
def test_rows_of_the_outputs_are_the_jacobian(block):
    found = rows(OBJECTIVES["outputs"], block=block)[0]
    torch.testing.assert_close(found, jacobian(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_combinations_are_the_directions_times_the_jacobian(k):
    directions = output_directions(C, k)
    assert directions.shape == (k, C)
    found = rows(outputs_along(directions))[0]
    torch.testing.assert_close(found, directions @ jacobian(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [1, 4])
def test_the_combinations_are_unbiased(k):
    """R'R has ones on its diagonal, and off it the mean of k independent signs."""
    seeds = 2000
    drawn = torch.stack([output_directions(C, k, seed) for seed in range(seeds)])
    moments = drawn.mT @ drawn
    torch.testing.assert_close(moments.diagonal(dim1=1, dim2=2), torch.ones(seeds, C))
    off = moments[:, ~torch.eye(C, dtype=torch.bool)]
    assert (off.mean(0).abs() < Z * (k * seeds) ** -0.5).all()
    assert ((off.var(0) * k - 1).abs() < Z * (2 / seeds) ** 0.5).all()


def test_without_a_number_every_output_stands_for_itself():
    torch.testing.assert_close(output_directions(C), torch.eye(C))


# Labels


def test_the_gradient_at_a_label_is_that_of_the_outputs_along_p_minus_e():
    logits = cnn()(IMAGES).detach()
    predicted = logits.argmax(1)
    along = logits.softmax(1) - F.one_hot(predicted, C)
    expected = (along[:, None] @ jacobian())[:, 0]
    found = rows(loss_at_predicted)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, rows(labels=predicted)[0], rtol=0, atol=0)


def drawn_labels(logits, ids, seed=0):
    """The class whose logit alone gets a negative gradient."""
    logits = logits.clone().requires_grad_()
    loss_at_drawn(ids, seed)(logits, torch.arange(len(logits))).sum().backward()
    return logits.grad.argmin(1)


def test_labels_are_drawn_by_the_softmax():
    """Frequencies of 20,000 ids against the probabilities; what has none is never drawn."""
    n, p = 20_000, torch.tensor([0.05, 0.0, 0.3, 0.6, 0.05])
    ids = [str(i) for i in range(n)]
    labels = drawn_labels(p.log().expand(n, -1), ids)
    count = labels.bincount(minlength=C)
    assert count[1] == 0
    assert ((count - n * p).abs() <= Z * (n * p * (1 - p)).sqrt()).all()


def test_a_drawn_label_is_the_examples_own():
    """In another order, beside others, with another position: the same; for another seed not."""
    torch.manual_seed(0)
    logits, ids = torch.randn(300, C), [f"{i:x}" for i in range(300)]
    labels = drawn_labels(logits, ids)
    some = torch.randperm(300)[:100]
    assert torch.equal(drawn_labels(logits[some], [ids[i] for i in some]), labels[some])
    assert not torch.equal(drawn_labels(logits, ids, seed=1), labels)
    assert not torch.equal(drawn_labels(logits, ids[::-1]), labels)


def test_gradients_at_drawn_labels_have_the_fisher_information_for_their_moment():
    """E (g'v)^2 = v'J'(diag p - pp')Jv over 4,000 ids of one example, along 20 directions v."""
    torch.manual_seed(0)
    n = 4000
    model = torch.nn.Linear(6, C).double()
    x = torch.randn(6).double()
    names = [name for name, _ in model.named_parameters()]
    ids = [str(i) for i in range(n)]
    (block,) = gradient_blocks(
        model,
        x.expand(n, -1),
        torch.zeros(n, dtype=torch.long),
        names,
        of=loss_at_drawn(ids),
        block=n,
    )
    found = torch.cat([block.gradients[name].flatten(1) for name in names], 1)
    logits = model(x)
    J = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(o, model.parameters(), None, True)])
            for o in logits
        ]
    )
    p = logits.softmax(0).detach()
    fisher = J.T @ (p.diag() - p.outer(p)) @ J
    v = torch.randn(J.shape[1], 20).double()
    squares = (found @ v).square()
    expected = (v * (fisher @ v)).sum(0)
    assert ((squares.mean(0) - expected).abs() < Z * squares.std(0) / n**0.5).all()
    assert (found.mean(0).abs() < Z * found.std(0) / n**0.5 + 1e-9).all()  # scores have mean 0


# All of them


@every
@pytest.mark.parametrize("block", [1, 2, 7])
def test_the_block_does_not_matter(name, block):
    expected = rows(OBJECTIVES[name])
    for found, whole in zip(rows(OBJECTIVES[name], block=block), expected, strict=True):
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)


@every
def test_losses_are_those_at_the_true_labels_and_norms_of_what_is_differentiated(name):
    found, losses, norms = rows(OBJECTIVES[name])
    expected = F.cross_entropy(cnn()(IMAGES), LABELS, reduction="none")
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(norms, found.flatten(1).norm(dim=1))


@every
def test_what_is_not_finite_surfaces_in_its_example_alone(name):
    inputs = IMAGES.clone()
    inputs[4, 2, 2] = float("nan")
    _, losses, norms = rows(OBJECTIVES[name], inputs)
    expected = [i != 4 for i in range(N)]
    assert losses.isfinite().tolist() == norms.isfinite().tolist() == expected


@every
def test_out_of_memory_halves_the_block_and_goes_on_with_the_same_examples(name):
    calls = 0

    def limited(outputs, positions):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        return OBJECTIVES[name](outputs, positions)

    expected = rows(OBJECTIVES[name], block=4)[0]
    found = rows(limited, block=4)[0]
    assert calls == 1 + 1 + 4  # blocks of 4, then of 2 from the fifth example on
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
