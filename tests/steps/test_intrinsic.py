"""The search for the finetuning's intrinsic dimension, on the task's own data."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dsel_assets.curvature import NotReachedError
from dsel_assets.steps.arrivals import landed, register
from dsel_assets.steps.intrinsic import HISTORY, intrinsic_dimension


def prepared(lab: Any, **intrinsic: Any) -> Any:
    settings = {"dim": 256, "steps": 20, "lr": 0.02}
    ws = lab.workspace(finetune={"steps": 60}, intrinsic=settings | intrinsic)
    for file in landed(ws):
        register(ws, file)
    return ws


def test_what_is_found_reaches_the_target_and_the_history_says_how(lab: Any) -> None:
    ws = prepared(lab, share=0.6)
    entry = intrinsic_dimension(ws)
    found, summary = json.loads(entry.file(HISTORY).read_text()), entry.summary
    last = found["history"][-1]
    assert last["score"] >= summary["target"] == pytest.approx(0.6 * summary["all_dimensions"])
    assert last["dimension"] == summary["dimension"] and summary["steps"] == last["step"]
    below = [one["score"] for one in found["history"][:-1]]
    assert max(below) < summary["target"]
    half = found["verification"]
    assert summary["verified"] == (half[-1]["score"] < summary["target"])
    assert intrinsic_dimension(ws).identity == entry.identity


def test_what_no_subspace_reaches_is_an_error_that_says_so(lab: Any) -> None:
    with pytest.raises(NotReachedError, match="was not reached in 2 dimensions of 2"):
        intrinsic_dimension(prepared(lab, share=1.0, start=1, dim=2))
