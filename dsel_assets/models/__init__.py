"""What can be finetuned."""

from dsel_assets.models.checkpoint import (
    Builder,
    builder,
    load_weights,
    save_weights,
    trainable_names,
)
from dsel_assets.models.lora import LoRA, add_lora
from dsel_assets.models.pretraining import pretrain
from dsel_assets.models.vision import ARCHITECTURES

__all__ = [
    "ARCHITECTURES",
    "Builder",
    "LoRA",
    "add_lora",
    "builder",
    "load_weights",
    "pretrain",
    "save_weights",
    "trainable_names",
]
