"""BADS in the pipeline: its own model as a checkpoint, a killed chain, alarms."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dsel_assets.models import load_weights
from dsel_assets.pipeline import run
from dsel_assets.selection.chain import Chain
from dsel_assets.steps.cells import artifacts, cells
from dsel_assets.steps.checkpoints import finetune
from dsel_assets.steps.chosen import alarms
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.model import WEIGHTS
from dsel_assets.steps.subsets import select
from tests.steps.test_resume import digests

JOINT = {"bads": None, "bads_joint": {"steps": 40, "batch_size": 20}}


def test_the_model_of_the_run_itself_is_compared(lab: Any) -> None:
    ws = lab.workspace(strategies={**JOINT, "gradmatch": None, "skmm": None})
    run(ws)
    generation = current_generation(ws)
    for cell in cells(ws, generation, "bads_joint"):
        selection, checkpoint, metric = artifacts(ws, cell)
        own, kept = (load_weights(e.file(WEIGHTS)) for e in (selection, checkpoint))
        assert own.keys() == kept.keys()
        assert all(torch.equal(own[name], kept[name]) for name in own)
        assert 0 <= metric.summary["test"]["accuracy"] <= 1
    # the budget changes nothing, the seed does
    found = list(cells(ws, generation, "bads_joint"))
    assert len({cell.identities["subsets"] for cell in found}) == ws.task.seeds < len(found)


def test_a_chain_that_was_killed_goes_on(done: Any, monkeypatch: Any) -> None:
    """Only the steps after the last checkpoint are done again, and the bits are the same."""
    ws = done.workspace()
    generation = current_generation(ws)
    store = done.home / "store" / "tiny"
    before = digests(store, ("subsets",))
    for cell in cells(ws, generation, "bads"):
        entry = ws.store.get("tiny", "subsets", cell.selection)
        for path in entry.path.iterdir():
            path.unlink()
        entry.path.rmdir()
    step, taken = Chain._step, []

    def killed(chain: Chain) -> None:
        if chain.done == 20:
            chain.save()
        if chain.done == 25:
            raise KeyboardInterrupt
        step(chain)

    monkeypatch.setattr(Chain, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        select(ws, generation, "bads")
    assert list((store / "scratch").glob("bads-0/*/*/chain-0.safetensors"))
    monkeypatch.setattr(Chain, "_step", lambda chain: (taken.append(chain.done), step(chain)))
    select(ws, generation, "bads")
    assert taken[0] == 20 and taken.count(20) == ws.task.seeds
    assert len(taken) == 20 + 40
    assert digests(store, ("subsets",)) == before
    assert not list((store / "scratch").glob("*/*"))


def test_alarms_are_told_by_strategy_and_budget(lab: Any) -> None:
    """A prior without force lets all weights fall to 0."""
    ws = lab.workspace(strategies={"bads": {"sigma": 50.0, "steps": 400}})
    run(ws)
    rows = alarms(ws, current_generation(ws))
    assert {row["strategy"] for row in rows} == {"bads"}
    assert [row["budget"] for row in rows] == [5, 10]
    for row in rows:
        assert row["collapsed"] == row["seeds"] == 2
        assert row["mean_weight"] < 0.25 and row["runaway"] == 0


def test_all_of_the_pool_with_weights_of_mean_one(lab: Any) -> None:
    ws = lab.workspace(strategies=JOINT)
    run(ws)
    generation = current_generation(ws)
    entries = select(ws, generation, "bads_joint")
    everything = select(ws, generation, "full")[0].manifest["rows"]
    assert all(entry.manifest["rows"] == everything for entry in entries)
    assert finetune(ws, generation, "bads_joint")[0].manifest["rows"] == everything


def test_a_killed_chain_of_other_settings_is_left_alone(done: Any, monkeypatch: Any) -> None:
    """Neither goes the next run on from it, nor does it stop there."""
    ws = done.workspace(strategies={"bads": {"sigma": 0.06}})
    step = Chain._step

    def killed(chain: Chain) -> None:
        if chain.done == 20:
            chain.save()
            raise KeyboardInterrupt
        step(chain)

    monkeypatch.setattr(Chain, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        select(ws, current_generation(ws), "bads")
    monkeypatch.setattr(Chain, "_step", step)
    for changes in ({"strategies": {"bads": {"sigma": 0.07}}}, {"finetune": {"trainable": "head"}}):
        other = done.workspace(**changes)
        run(other)
        assert select(other, current_generation(other), "bads")
