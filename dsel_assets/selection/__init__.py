"""Strategies behind one interface."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsel_assets.models import Builder
from dsel_assets.selection.attribution import attribution
from dsel_assets.selection.bads import Bads, BadsJoint, infer_weights
from dsel_assets.selection.baselines import Full, Random, TargetOnly
from dsel_assets.selection.confident import Confident
from dsel_assets.selection.diversity import (
    Badge,
    Facility,
    FacilityTarget,
    KMeansPlusPlus,
    ProbCover,
    TypiClust,
)
from dsel_assets.selection.geometry import Adaptive, Herding, KCenter, Leverage
from dsel_assets.selection.gradmatch import Gradmatch
from dsel_assets.selection.interface import (
    NONE,
    Budget,
    Choice,
    Constraints,
    Needs,
    Selection,
    Selector,
    State,
)
from dsel_assets.selection.itl import Itl, select_informative
from dsel_assets.selection.similarity import Cosine, InformationDensity
from dsel_assets.selection.skmm import Skmm, match_moments, select_matching
from dsel_assets.selection.smallloss import SmallLoss
from dsel_assets.selection.uncertainty import Entropy, LeastConfidence, Margin

STRATEGIES: dict[str, type[Selector]] = {
    selector.name: selector
    for selector in (
        Random,
        Full,
        TargetOnly,
        Skmm,
        Bads,
        BadsJoint,
        SmallLoss,
        Confident,
        Itl,
        Gradmatch,
        KCenter,
        Herding,
        Adaptive,
        Leverage,
        Cosine,
        InformationDensity,
        Entropy,
        Margin,
        LeastConfidence,
        KMeansPlusPlus,
        Badge,
        TypiClust,
        ProbCover,
        Facility,
        FacilityTarget,
    )
}


def make_selector(
    name: str, settings: Mapping[str, Any], *, model: Builder, trainable: Sequence[str]
) -> Selector:
    """The strategy of this name; those that need a model get a builder of fresh copies of it."""
    selector = STRATEGIES[name]
    given = {"model": model, "trainable": trainable} if Needs.MODEL in selector.needs else {}
    return selector(**settings, **given)


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
    "attribution",
    "infer_weights",
    "make_selector",
    "match_moments",
    "select_informative",
    "select_matching",
]
