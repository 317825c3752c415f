"""Where compiled kernels take over from plain torch: numba's on the CPU, Triton's on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

_plain = ContextVar("plain", default=False)


def kernels(x: Tensor) -> ModuleType | None:
    """The module of kernels that takes x, or None where plain torch computes.

    Triton's take all but double precision; it comes with torch where there is CUDA.
    """
    if _plain.get():
        return None
    if x.device.type == "cpu":
        return _load("fast_cpu")
    if x.device.type == "cuda" and x.dtype != torch.float64 and _has_triton():
        return _load("fast_cuda")
    return None


@contextmanager
def plain_torch() -> Iterator[None]:
    """Compute by plain torch alone: the reference that the kernels are tested against."""
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


@cache
def _load(name: str) -> ModuleType:
    return import_module(f"dsel_assets.sketching.{name}")


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
