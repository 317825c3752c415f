"""Spectra at the base and along finetuning, batched, sketched and interrupted."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from dsel_assets.finetuning import train
from dsel_assets.resources.store import StoreError
from dsel_assets.steps import spectrum as step
from dsel_assets.steps.arrivals import landed, register
from dsel_assets.steps.model import base_builder
from dsel_assets.steps.path import finetuning_path, path_weights, training_set
from dsel_assets.steps.space import trainable_shapes
from dsel_assets.steps.spectrum import (
    SPECTRUM,
    hessian_spectrum,
    spectra_so_far,
    spectrum_on_the_way,
)


def prepared(lab: Any, **changes: Any) -> Any:
    ws = lab.workspace(**changes)
    for file in landed(ws):
        register(ws, file)
    return ws


def read(entry: Any) -> dict[str, Any]:
    return json.loads(entry.file(SPECTRUM).read_text())


def test_the_path_is_the_plain_finetuning_of_a_whole_arrival(lab: Any) -> None:
    ws = prepared(lab)
    pool = hessian_spectrum(ws).manifest["fields"]["pool"]
    path = finetuning_path(ws, pool)
    inputs, labels = training_set(ws, pool)
    assert len(labels) == 60 + 20  # the first arrival and the target set
    spec = ws.task.finetune
    trained = train(
        base_builder(ws)(),
        inputs,
        labels,
        torch.ones(len(labels)),
        trainable=list(trainable_shapes(ws)),
        steps=spec.steps,
        batch_size=spec.batch_size,
        lr=spec.lr,
        seed=0,
    )
    last = path_weights(path, spec.steps)
    assert all(torch.equal(last[name], weight) for name, weight in trained.weights.items())
    start = base_builder(ws)().state_dict()
    assert all(torch.equal(path_weights(path, 0)[name], weight) for name, weight in start.items())
    with pytest.raises(StoreError, match="step 7"):
        path_weights(path, 7)


def test_the_first_step_is_the_base_and_the_others_differ(lab: Any) -> None:
    ws = prepared(lab)
    base, first, later = hessian_spectrum(ws), *(spectrum_on_the_way(ws, s) for s in (0, 10))
    assert read(base)["eigenvalues"] == read(first)["eigenvalues"]
    assert read(later)["eigenvalues"] != read(first)["eigenvalues"]
    assert [record["step"] for record in spectra_so_far(ws)] == [0, 10]
    assert spectrum_on_the_way(ws, 10).identity == later.identity


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_batches_change_nothing_but_rounding(lab: Any, curvature: str) -> None:
    whole, parts = (
        read(hessian_spectrum(prepared(lab, spectrum={"batch_size": n, "curvature": curvature})))
        for n in (32, 5)
    )
    np.testing.assert_allclose(parts["eigenvalues"], whole["eigenvalues"], rtol=1e-4)
    if curvature == "gauss_newton":
        assert min(whole["eigenvalues"]) > -1e-6


def test_through_a_sketch_the_bias_is_removed_and_both_are_told(lab: Any) -> None:
    entry = hessian_spectrum(prepared(lab, spectrum={"sketch_dim": 64}))
    found, exact = read(entry), read(hessian_spectrum(prepared(lab)))
    shift = np.array(found["raw"]) - np.array(found["eigenvalues"])
    assert shift[0] > 0 and np.allclose(shift, shift[0])
    assert exact["raw"] == exact["eigenvalues"]
    assert 0 < entry.summary["gradient_in_outliers"] <= 1


def test_killed_it_goes_on_from_the_vectors_that_it_had(lab: Any, monkeypatch: Any) -> None:
    changes = {"spectrum": {"iterations": 30}}
    undisturbed = read(hessian_spectrum(prepared(lab, **changes)))
    ws = prepared(lab, **changes)
    for entry in ws.store.entries("tiny", "hessian_spectrum"):
        for file in (*entry.path.iterdir(), entry.path):
            file.unlink() if file.is_file() else file.rmdir()
    products = step._products
    calls = []

    def failing(after: int) -> Any:
        def make(*given: Any) -> Any:
            product, gradient = products(*given)

            def counted(v: Any) -> Any:
                calls.append(1)
                if len(calls) == after:
                    raise KeyboardInterrupt
                return product(v)

            return counted, gradient

        return make

    monkeypatch.setattr(step, "_products", failing(8 + 25))
    with pytest.raises(KeyboardInterrupt):
        hessian_spectrum(ws)
    folder = ws.store.folder("tiny", "hessian_spectrum")
    assert [path.suffix for path in folder.iterdir()] == [".lanczos"]
    calls.clear()
    monkeypatch.setattr(step, "_products", failing(-1))
    assert read(hessian_spectrum(ws)) == undisturbed
    assert len(calls) < 8 + 30
    assert not list(folder.glob("*.lanczos"))


def test_the_measured_error_falls_as_the_dimension_grows(lab: Any) -> None:
    measured = read(hessian_spectrum(prepared(lab)))["measured_error"]
    assert measured["dimension"] == step.DIMENSIONS
    assert measured["rms"][-1] < measured["rms"][0] / 3
    assert min(measured["within"]) > 0.95


def test_other_settings_are_other_spectra_and_do_not_mix(lab: Any) -> None:
    made = [
        spectrum_on_the_way(prepared(lab, **changes), 10)
        for changes in (
            {},
            {"spectrum": {"curvature": "gauss_newton"}},
            {"spectrum": {"sketch_dim": 64}},
            {"spectrum": {"sketch_dim": 64}, "sketch": {"seed": 7}},
        )
    ]
    assert len({entry.identity for entry in made}) == len(made)
    assert [record["step"] for record in spectra_so_far(prepared(lab))] == [10]


def test_it_says_when_there_may_be_more_outliers_than_were_asked_for(lab: Any) -> None:
    few, many = (
        hessian_spectrum(prepared(lab, spectrum={"eigenvalues": k, "iterations": 80})).summary
        for k in (2, 70)
    )
    assert not few["all_outliers_seen"] and many["all_outliers_seen"]
    assert few["outliers"] < many["outliers"]


def test_a_small_sketch_of_the_curvature_is_asked_for_fewer_eigenvalues(lab: Any) -> None:
    found = read(
        hessian_spectrum(
            prepared(lab, spectrum={"sketch_dim": 16, "eigenvalues": 10, "iterations": 16})
        )
    )
    assert len(found["eigenvalues"]) == 8
