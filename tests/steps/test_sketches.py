from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from dsel_assets import pipeline
from dsel_assets.models import load_weights, save_weights
from dsel_assets.resources.rows import read_rows
from dsel_assets.resources.store import StoreError
from dsel_assets.steps import sketches as step
from dsel_assets.steps.arrivals import landed, register
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.loading import load_pool, load_target
from dsel_assets.steps.model import base_digest
from dsel_assets.steps.pool import ingest
from dsel_assets.steps.sketched import SKETCHES, broken_promise, load_sketched
from dsel_assets.steps.sketches import RAW, sketch
from dsel_assets.steps.space import sketch_dimension
from dsel_assets.steps.spectrum import hessian_spectrum, pin_dimension
from dsel_assets.steps.status import status


def sketched(ws: Any, key: str = "a") -> Any:
    for file in landed(ws):
        register(ws, file)
    return sketch(ws, ingest(ws, key))


def files(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_only_the_new_arrival_is_differentiated(done: Any, monkeypatch: Any) -> None:
    passes = []
    one_pass = step._pass

    def counted(ws: Any, known: Any, *rest: Any) -> Any:
        passes.append(len(known))
        return one_pass(ws, known, *rest)

    monkeypatch.setattr(step, "_pass", counted)
    ws = done.workspace()
    kinds = ("pool", "gradients", "sketches", "hessian_spectrum")
    before = {kind: files(done.home / "store" / "tiny" / kind) for kind in kinds}
    done.land("c.jsonl", done.rows(220, 250))
    pipeline.run(ws)
    assert passes == [30]
    for kind in kinds:
        after = files(done.home / "store" / "tiny" / kind)
        assert before[kind].items() <= after.items()
    assert len(current_generation(ws).members) == 3


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"sketch": {"seed": 1}}, "sketch"),
        ({"sketch": {"dim": 32}}, "sketch"),
        ({"sketch": {"kind": "gaussian"}}, "sketch"),
        ({"finetune": {"trainable": "head"}}, "trainable"),
        ({"gradients": {"labels": "predicted"}}, "labels"),
        ({"gradients": {"labels": "drawn"}}, "labels"),
        ({"gradients": {"of": "outputs"}}, "of"),
        ({"model": {"lora": {}}}, "base"),
    ],
)
def test_sketches_of_another_space_are_refused_by_name(
    lab: Any, changes: dict[str, Any], field: str
) -> None:
    ws = lab.workspace()
    made = sketched(ws).sketches
    other = lab.workspace(**changes)
    with pytest.raises(ValueError, match=f"another {field}"):
        load_sketched(other, made, ingest(other, "a"))


def test_sketches_of_another_base_are_refused(lab: Any) -> None:
    ws = lab.workspace()
    made = sketched(ws).sketches
    weights = load_weights(lab.folder / "base.safetensors")
    save_weights({k: v + 1e-3 for k, v in weights.items()}, lab.folder / "base.safetensors")
    with pytest.raises(ValueError, match="another base"):
        load_sketched(lab.workspace(), made, ingest(ws, "a"))


def test_sketches_of_other_rows_are_refused(lab: Any) -> None:
    ws = lab.workspace()
    made = sketched(ws).sketches
    with pytest.raises(ValueError, match="other examples"):
        load_sketched(ws, made, ingest(ws, "b"))


def test_kept_raw_rows_are_read_back(lab: Any, monkeypatch: Any) -> None:
    ws = lab.workspace(gradients={"keep_raw_bytes": 10**8})
    first = sketched(ws)
    assert first.source == "backward pass" and first.gradients.summary["raw_kept"]
    assert read_rows(first.gradients.file(RAW)).shape == (60, 64 * 128 + 128 + 1280 + 10)
    before = read_rows(first.sketches.file(SKETCHES))
    shutil.rmtree(first.sketches.path)
    monkeypatch.setattr(step, "_pass", None)
    again = sketched(ws)
    assert again.source == "kept raw rows" and again.gradients.reused
    np.testing.assert_array_equal(read_rows(again.sketches.file(SKETCHES)), before)
    assert not again.sketches.damaged()


def test_above_the_limit_the_pass_is_repeated(lab: Any) -> None:
    ws = lab.workspace(gradients={"keep_raw_bytes": 4 * 60 * 9610 - 1})
    first = sketched(ws)
    assert RAW not in first.gradients.manifest["files"]
    before = read_rows(first.sketches.file(SKETCHES))
    shutil.rmtree(first.sketches.path)
    again = sketched(ws)
    assert again.source == "backward pass" and again.gradients.reused
    np.testing.assert_array_equal(read_rows(again.sketches.file(SKETCHES)), before)


def test_only_gradients_are_missing(lab: Any) -> None:
    ws = lab.workspace()
    first = sketched(ws)
    shutil.rmtree(first.gradients.path)
    again = sketched(ws)
    assert again.sketches.reused and not again.gradients.reused
    assert again.gradients.identity == first.gradients.identity


def test_a_row_is_the_sketch_of_its_gradient(lab: Any) -> None:
    from dsel_assets.sketching import ModelSketch
    from dsel_assets.steps.space import trainable_shapes

    ws = lab.workspace(gradients={"keep_raw_bytes": 10**8})
    made = sketched(ws)
    shapes = trainable_shapes(ws)
    raw = torch.from_numpy(read_rows(made.gradients.file(RAW)))
    parts = raw.split([int(np.prod(shape)) for shape in shapes.values()], dim=1)
    named = {k: p.reshape(-1, *shapes[k]) for k, p in zip(shapes, parts, strict=True)}
    expected = ModelSketch(shapes, "affd", 64, 0)(named).numpy()
    np.testing.assert_allclose(read_rows(made.sketches.file(SKETCHES)), expected, atol=1e-5)
    norms = pq.read_table(made.gradients.file("rows.parquet"))["norm"].to_numpy()
    np.testing.assert_allclose(norms, raw.norm(dim=1).numpy(), rtol=1e-5)


@pytest.mark.parametrize("trainable", ["all", "head"])
def test_the_block_does_not_matter(lab: Any, trainable: str) -> None:
    """Up to the last bits: BLAS multiplies few rows and many by different routines."""
    found, identities = {}, set()
    for block in (1, 2, 7, 64):
        ws = lab.workspace(gradients={"block": block}, finetune={"trainable": trainable})
        made = sketched(ws).sketches
        found[block] = read_rows(made.file(SKETCHES))
        identities.add(made.identity)
        shutil.rmtree(lab.home)
    assert len(identities) == 1
    for block in (1, 2, 7):
        np.testing.assert_allclose(found[block], found[64], atol=1e-6)


def test_the_block_changes_no_bit_of_the_operator(lab: Any) -> None:
    found = []
    sketched(lab.workspace(gradients={"keep_raw_bytes": 10**8}))
    for block in (1, 7, 64):
        shutil.rmtree(lab.home / "store" / "tiny" / "sketches")
        made = sketched(lab.workspace(gradients={"keep_raw_bytes": 10**8, "block": block}))
        assert made.source == "kept raw rows"
        found.append(read_rows(made.sketches.file(SKETCHES)))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[1], found[2])


def certain_of_zero(lab: Any) -> None:
    """A base model that says 0 to everything, so that zeros have no gradient."""
    weights = load_weights(lab.folder / "base.safetensors")
    bias = torch.zeros(10)
    bias[0] = 1000
    save_weights(weights | {"3.bias": bias}, lab.folder / "base.safetensors")


def test_rows_without_gradient_are_quarantined(lab: Any) -> None:
    certain_of_zero(lab)
    ws = lab.workspace(gradients={"keep_raw_bytes": 10**8})
    made = sketched(ws)
    zeros = sum(row["label"] == 0 for row in lab.rows(100, 160))
    refused = pq.read_table(made.gradients.file("quarantine.parquet")).to_pylist()
    assert zeros > 0 and [line["reason"] for line in refused] == ["zero gradient"] * zeros
    assert made.sketches.manifest["rows"] == made.gradients.manifest["rows"] == 60 - zeros
    examples = load_sketched(ws, made.sketches, ingest(ws, "a"))
    assert len(examples) == 60 - zeros and 0 not in examples.labels
    before = read_rows(made.sketches.file(SKETCHES))
    shutil.rmtree(made.sketches.path)
    np.testing.assert_array_equal(read_rows(sketched(ws).sketches.file(SKETCHES)), before)


def test_rows_with_a_gradient_that_is_not_finite_are_quarantined(lab: Any) -> None:
    rows = lab.rows(220, 250)
    rows[4]["image"] = [[3e38 * (-1) ** (i + j) for i in range(8)] for j in range(8)]
    lab.land("c.jsonl", rows)
    ws = lab.workspace(gradients={"keep_raw_bytes": 10**8})
    made = sketched(ws, "c")
    refused = pq.read_table(made.gradients.file("quarantine.parquet")).to_pylist()
    assert [line["reason"] for line in refused] == ["non-finite gradient"]
    assert np.isfinite(read_rows(made.sketches.file(SKETCHES))).all()
    assert made.sketches.manifest["rows"] == 29


def test_an_arrival_without_usable_gradients_stops_nothing(lab: Any) -> None:
    certain_of_zero(lab)
    lab.land("z.jsonl", [row for row in lab.rows(220, 300) if row["label"] == 0])
    ws = lab.workspace(
        strategies={n: None for n in ("target_only", "skmm", "bads", "itl", "gradmatch")}
    )
    pipeline.run(ws)
    assert len(current_generation(ws).members) == 3


def test_the_advised_dimension_is_pinned(lab: Any) -> None:
    """Also when a later arrival comes first by name."""
    ws = lab.workspace(sketch={"dim": "auto"})
    spectrum = hessian_spectrum
    for file in landed(ws):
        register(ws, file)
    first = spectrum(ws)
    lab.land("0.jsonl", lab.rows(220, 280))
    for file in landed(ws):
        register(ws, file)
    assert spectrum(ws).identity == first.identity
    assert pin_dimension(ws) == sketch_dimension(ws) == max(256, first.summary["advised_dimension"])


def test_looking_takes_no_spectrum(lab: Any) -> None:
    """A dimension that is left to it is unknown until something is sketched."""
    ws = lab.workspace(sketch={"dim": "auto"})
    assert status(ws)["generation"] is None
    with pytest.raises(StoreError, match=r"sketch\.dim is auto and nothing is sketched yet"):
        sketch_dimension(ws)
    assert not ws.store.entries("tiny", "hessian_spectrum")
    sketched(ws)
    assert status(ws)["generation"] == 1 and sketch_dimension(ws) >= 256


@pytest.mark.parametrize("kind", ["tensorsketch", "logra"])
def test_sketches_of_factors_are_those_of_the_gradients_which_are_never_formed(
    lab: Any, monkeypatch: Any, kind: str
) -> None:
    formed = []
    one_pass = step._pass

    def counted(ws: Any, known: Any, *rest: Any) -> Any:
        formed.append(len(known))
        return one_pass(ws, known, *rest)

    monkeypatch.setattr(step, "_pass", counted)
    monkeypatch.setattr(step, "PROBE", 8)
    made = sketched(lab.workspace(sketch={"kind": kind}))
    assert formed == [8]
    assert made.sketches.summary["quality"]["within"] > 0.95
    by_factors = read_rows(made.sketches.file(SKETCHES)).copy()
    for name in ("sketches", "gradients"):
        shutil.rmtree(lab.home / "store" / "tiny" / name)
    raw = sketched(lab.workspace(sketch={"kind": kind}, gradients={"keep_raw_bytes": 10**9}))
    assert formed == [8, 60]
    expected = read_rows(raw.sketches.file(SKETCHES))
    np.testing.assert_allclose(by_factors, expected, rtol=1e-4, atol=1e-5)


def test_the_promise_is_measured_on_the_same_examples_whatever_the_block(lab: Any) -> None:
    measured = []
    for block in (1, 7, 64):
        made = sketched(lab.workspace(gradients={"block": block}))
        measured.append(made.sketches.summary["quality"])
        for name in ("sketches", "gradients"):
            shutil.rmtree(lab.home / "store" / "tiny" / name)
    for quality in measured[1:]:
        assert quality == pytest.approx(measured[0], rel=1e-3)


def test_a_sketch_of_a_fourth_of_the_dimension_breaks_the_promise(
    lab: Any, monkeypatch: Any
) -> None:
    ws = lab.workspace(sketch={"dim": 256})
    made = sketched(ws).sketches
    assert broken_promise(ws, made) is None
    fourth = lab.workspace(sketch={"dim": 64})
    quality = dict(
        sketched(fourth).sketches.summary["quality"], dense=made.summary["quality"]["dense"]
    )
    monkeypatch.setitem(made.summary, "quality", quality)
    assert "more than 2 times" in str(broken_promise(ws, made))


# What is differentiated


EVERY = {"gradients": {"of": "outputs"}}
THREE = {"gradients": {"of": "outputs", "outputs": 3}}
LORA = {"model": {"lora": {"rank": 2}}, "finetune": {"trainable": "lora"}}
WAYS = [
    pytest.param(changes, rows, id=name)
    for name, changes, rows in (
        ("every_output", EVERY, (10,)),
        ("three_combinations", THREE, (3,)),
        ("one_combination", {"gradients": {"of": "outputs", "outputs": 1}}, (1,)),
        ("predicted", {"gradients": {"labels": "predicted"}}, ()),
        ("drawn", {"gradients": {"labels": "drawn"}}, ()),
        ("lora", LORA, ()),
        ("lora_outputs", LORA | EVERY, (10,)),
    )
]
ways = pytest.mark.parametrize(("changes", "rows"), WAYS)


def gradients(changes: dict[str, Any], **given: int) -> dict[str, Any]:
    return changes | {"gradients": changes.get("gradients", {}) | given}


def forget(lab: Any) -> None:
    for name in ("sketches", "gradients"):
        shutil.rmtree(lab.home / "store" / "tiny" / name)


@ways
def test_the_pool_and_the_target_come_with_such_sketches(
    lab: Any, changes: dict[str, Any], rows: tuple[int, ...]
) -> None:
    ws = lab.workspace(**changes)
    for key in ("a", "b"):
        assert sketched(ws, key).sketches.summary["quality"]["within"] > 0.95
    pool, target = load_pool(ws, current_generation(ws)), load_target(ws)
    assert pool.sketches.shape == (120, *rows, 64) and target.sketches.shape == (20, *rows, 64)
    assert all(np.isfinite(part.sketches).all() for part in (pool, target))
    assert np.abs(pool.sketches).sum(-1).all()  # no row is zero
    taken = pool.take([3, 0])
    np.testing.assert_array_equal(taken.sketches, pool.sketches[[3, 0]])


@ways
def test_losses_are_those_at_the_true_labels_and_norms_those_of_what_is_sketched(
    lab: Any, changes: dict[str, Any], rows: tuple[int, ...]
) -> None:
    def table(ws: Any) -> Any:
        return pq.read_table(sketched(ws).gradients.file("rows.parquet"))

    ws = lab.workspace(**gradients(changes, keep_raw_bytes=10**9))
    found = table(ws)
    norms = np.linalg.norm(read_rows(sketched(ws).gradients.file(RAW)), axis=1)
    np.testing.assert_allclose(found["norm"].to_numpy(), norms, rtol=1e-5)
    forget(lab)
    np.testing.assert_allclose(
        found["loss"].to_numpy(), table(lab.workspace())["loss"].to_numpy(), rtol=1e-5
    )


@ways
def test_kept_raw_rows_give_the_same_sketches_and_so_does_any_block(
    lab: Any, monkeypatch: Any, changes: dict[str, Any], rows: tuple[int, ...]
) -> None:
    raw = lab.workspace(**gradients(changes, keep_raw_bytes=10**9, block=7))
    first = sketched(raw)
    before = read_rows(first.sketches.file(SKETCHES)).copy()
    shutil.rmtree(first.sketches.path)
    with monkeypatch.context() as patch:
        patch.setattr(step, "_pass", None)
        again = sketched(raw)
    assert again.source == "kept raw rows"
    np.testing.assert_allclose(read_rows(again.sketches.file(SKETCHES)), before, atol=1e-6)
    assert again.sketches.summary["quality"] == pytest.approx(
        first.sketches.summary["quality"], rel=1e-3
    )
    forget(lab)
    whole = sketched(lab.workspace(**gradients(changes, block=64)))
    assert whole.sketches.identity == first.sketches.identity
    np.testing.assert_allclose(read_rows(whole.sketches.file(SKETCHES)), before, atol=1e-5)


@ways
@pytest.mark.parametrize("kind", ["tensorsketch", "logra"])
def test_factors_give_the_same_sketches(
    lab: Any, changes: dict[str, Any], rows: tuple[int, ...], kind: str
) -> None:
    changes = changes | {"sketch": {"kind": kind}}
    by_factors = sketched(lab.workspace(**changes))
    found = read_rows(by_factors.sketches.file(SKETCHES)).copy()
    forget(lab)
    formed = sketched(lab.workspace(**gradients(changes, keep_raw_bytes=10**9)))
    expected = read_rows(formed.sketches.file(SKETCHES))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert by_factors.sketches.summary["quality"] == pytest.approx(
        formed.sketches.summary["quality"], rel=1e-3
    )


@pytest.mark.parametrize("changes", [EVERY, THREE])
def test_a_row_of_outputs_that_is_not_finite_is_quarantined_and_a_sure_one_is_not(
    lab: Any, changes: dict[str, Any]
) -> None:
    """A model that is certain has outputs whose gradients are as large as any."""
    certain_of_zero(lab)
    rows = lab.rows(220, 250)
    rows[4]["image"] = [[3e38 * (-1) ** (i + j) for i in range(8)] for j in range(8)]
    assert any(row["label"] == 0 for row in rows)
    lab.land("c.jsonl", rows)
    ws = lab.workspace(**changes)
    made = sketched(ws, "c")
    refused = pq.read_table(made.gradients.file("quarantine.parquet")).to_pylist()
    assert [line["reason"] for line in refused] == ["non-finite gradient"]
    examples = load_sketched(ws, made.sketches, ingest(ws, "c"))
    assert len(examples) == len(examples.sketches) == 29 and np.isfinite(examples.sketches).all()


def test_a_model_that_is_certain_has_no_gradient_at_what_it_predicts(lab: Any) -> None:
    certain_of_zero(lab)
    ws = lab.workspace(gradients={"labels": "predicted"})
    made = sketched(ws)
    assert made.sketches.manifest["rows"] == 0
    assert made.gradients.summary["quarantined"] == 60
    assert load_sketched(ws, made.sketches, ingest(ws, "a")).sketches.shape == (0, 64)


def test_the_promise_is_measured_on_few_rows_of_at_least_two_examples(
    lab: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(step, "PROBE", 8)
    weights = load_weights(lab.folder / "base.safetensors")
    weights["3.weight"] *= torch.arange(1, 11)[:, None]  # so that outputs are told apart
    save_weights(weights, lab.folder / "base.safetensors")
    measured = []

    def seen(exact: Any, found: Any, *rest: Any) -> Any:
        measured.append((exact, found))
        return gram_error(exact, found, *rest)

    gram_error = step.gram_error
    monkeypatch.setattr(step, "gram_error", seen)
    for kind in ("affd", "tensorsketch"):
        sketched(lab.workspace(**(EVERY | {"sketch": {"kind": kind, "dim": 4096}})))
    for exact, found in measured:
        assert exact.shape == found.shape == (8, 8)  # four of the ten outputs, of two examples
        scale = exact.diagonal().outer(exact.diagonal()).sqrt()
        assert ((exact - found).abs() < 0.15 * scale).all()
    torch.testing.assert_close(measured[0][0], measured[1][0])


def test_another_start_gives_other_checkpoints(lab: Any) -> None:
    """The adapters are part of what training starts from, also where no sketch is read."""
    plain, *adapted = (
        base_digest(lab.workspace(model={"lora": lora})) for lora in (None, {}, {"alpha": 1.0})
    )
    assert len({plain, *adapted}) == 3 and all(digest.startswith(plain) for digest in adapted)
