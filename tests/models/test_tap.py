from __future__ import annotations

import pytest
import torch
from torch import nn

from dsel_assets.models import add_lora
from dsel_assets.models import tap as taps
from dsel_assets.models.tap import Tap, embeddings, last_layer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3), nn.Softmax(1)
    )


def test_embeddings_are_what_the_last_layer_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taps, "BLOCK", 4)
    model, x = network().train(), torch.randn(10, 6)
    expected = torch.relu(model[0](x)).detach()  # no dropout: in eval mode
    assert torch.equal(torch.from_numpy(embeddings(model, x)), expected)
    assert model.training and not model[3]._forward_pre_hooks


def test_adapters_are_looked_through() -> None:
    """Those of the last layer read rank numbers, the layer itself all features."""
    model, x = network(), torch.randn(10, 6)
    before = embeddings(model, x)
    add_lora(model, rank=2)
    assert last_layer(model) is model[3].base
    assert (embeddings(model, x) == before).all() and before.shape == (10, 5)


def test_a_model_without_parameters_has_no_last_layer() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        Tap(nn.ReLU())
