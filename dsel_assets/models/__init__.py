"""What can be finetuned. Torch loads when something of it is first asked for."""

from typing import TYPE_CHECKING

from dsel_assets.lazily import lazily

if TYPE_CHECKING:
    from dsel_assets.models.checkpoint import (
        Builder,
        builder,
        load_weights,
        save_weights,
        trainable_names,
    )
    from dsel_assets.models.lora import LoRA, add_lora, lora_names
    from dsel_assets.models.pretraining import pretrain
    from dsel_assets.models.vision import ARCHITECTURES

__getattr__ = lazily(
    __name__,
    {
        "ARCHITECTURES": "vision",
        "Builder": "checkpoint",
        "LoRA": "lora",
        "add_lora": "lora",
        "builder": "checkpoint",
        "load_weights": "checkpoint",
        "lora_names": "lora",
        "pretrain": "pretraining",
        "save_weights": "checkpoint",
        "trainable_names": "checkpoint",
    },
)


__all__ = [
    "ARCHITECTURES",
    "Builder",
    "LoRA",
    "add_lora",
    "builder",
    "load_weights",
    "lora_names",
    "pretrain",
    "save_weights",
    "trainable_names",
]
