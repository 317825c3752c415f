"""Strategies behind one interface. What is heavy loads when it is first asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dsel_assets.lazily import lazily
from dsel_assets.selection.attribution import attribution
from dsel_assets.selection.interface import (
    NONE,
    Budget,
    Choice,
    Constraints,
    Selection,
    Selector,
    State,
)
from dsel_assets.selection.strategies import STRATEGIES, Needs, Strategy

if TYPE_CHECKING:
    from dsel_assets.models import Builder
    from dsel_assets.selection.bads import infer_weights
    from dsel_assets.selection.itl import select_informative
    from dsel_assets.selection.skmm import match_moments, select_matching

__getattr__ = lazily(
    __name__,
    {
        "infer_weights": "bads",
        "match_moments": "skmm",
        "select_informative": "itl",
        "select_matching": "skmm",
    },
)


def load(strategy: Strategy) -> type[Selector]:
    """The class of a strategy."""
    module, _, name = strategy.where.partition(":")
    found: type[Selector] = getattr(import_module(f"{__name__}.{module}"), name)
    return found


def make_selector(
    name: str, settings: Mapping[str, Any], *, model: Builder, trainable: Sequence[str]
) -> Selector:
    """The strategy of this name; those that need a model get a builder of fresh copies of it."""
    strategy = STRATEGIES[name]
    given = {"model": model, "trainable": trainable} if Needs.MODEL in strategy.needs else {}
    return load(strategy)(**settings, **given)


__all__ = [
    "NONE",
    "STRATEGIES",
    "Budget",
    "Choice",
    "Constraints",
    "Needs",
    "Selection",
    "Selector",
    "State",
    "Strategy",
    "attribution",
    "infer_weights",
    "load",
    "make_selector",
    "match_moments",
    "select_informative",
    "select_matching",
]
