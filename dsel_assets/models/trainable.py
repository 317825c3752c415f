"""Which of a model's parameters are trained: by their names alone, without the model."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch


def trained(
    names: Sequence[str], adapters: Sequence[str], trainable: str | Sequence[str]
) -> list[str]:
    """Names of the parameters that are trained, in the model's order.

    names: of all parameters; adapters: of LoRA's.

    `all`; `head`, the last module that has parameters; `lora`, the adapters; or patterns (fnmatch)
    of names. A pattern that fits nothing raises ValueError, as does `lora` without adapters: a
    misspelt layer must not quietly shrink the gradient.
    """
    if trainable == "all":
        return list(names)
    if trainable == "head":
        head = names[-1].rpartition(".")[0]
        return [name for name in names if name.rpartition(".")[0] == head]
    if trainable == "lora":
        if adapters:
            return list(adapters)
        raise ValueError("finetune.trainable: lora: the model has no adapters; give model.lora")
    patterns = [trainable] if isinstance(trainable, str) else trainable
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in names):
            raise ValueError(f"finetune.trainable: {pattern!r} fits none of {', '.join(names)}")
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
