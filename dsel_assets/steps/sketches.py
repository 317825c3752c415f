"""One backward pass an example: its loss, its gradient's norm, and the gradient's sketch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from tqdm import tqdm

from dsel_assets.data import (
    NON_FINITE_GRADIENT,
    ROW_COLUMN,
    ZERO_GRADIENT,
    Examples,
    quarantine_table,
)
from dsel_assets.gradients import GradientBlock, SketchBlock, gradient_blocks, sketch_blocks
from dsel_assets.resources.rows import RowWriter, read_rows
from dsel_assets.resources.store import Draft, Entry, write_json
from dsel_assets.sketching import ModelSketch
from dsel_assets.sketching.quality import gram, gram_error
from dsel_assets.steps.model import base_builder, gradient_space, trainable_shapes
from dsel_assets.steps.pool import load_examples, with_constants
from dsel_assets.steps.spectrum import (
    PROBE,
    allowed_variance,
    hessian_spectrum,
    operator_fields,
)
from dsel_assets.steps.workspace import Workspace

RAW = "raw.safetensors"
SKETCHES = "sketches.safetensors"
KEPT = 0.95  # share of pairs that must lie within three standard deviations of the promise
ALLOWED = 2.0  # times a dense Gaussian's error: what affd promises at worst


class Sketched(NamedTuple):
    """Both outputs of the pass; `source` says where the gradients came from this time."""

    gradients: Entry
    sketches: Entry
    source: str


def sketch_dimension(ws: Workspace) -> int:
    """D of the task; `auto` takes what the spectrum advises (256 to 8192) once, and pins it."""
    if ws.task.sketch.dim != "auto":
        return int(ws.task.sketch.dim)
    pin = ws.store.folder(ws.task.name, "sketches") / "dimension.json"
    if not pin.exists():
        advised = hessian_spectrum(ws).summary["advised_dimension"]
        write_json(pin, {"dimension": min(8192, max(256, advised))})
    return int(json.loads(pin.read_text())["dimension"])


def sketch_space(ws: Workspace) -> dict[str, Any]:
    """The gradient space and its operator: sketches may be compared only if this is equal."""
    operator = operator_fields(ws, ws.task.sketch.kind) | {"dim": sketch_dimension(ws)}
    return gradient_space(ws) | {"sketch": operator, "dtype": "float32"}


def broken_promise(ws: Workspace, sketched: Entry) -> str | None:
    """Why these sketches are not to be relied on, or None; measured on a few exact gradients."""
    quality, kind = sketched.summary["quality"], ws.task.sketch.kind
    if quality is None:
        return None
    advice = "take another sketch.kind, or a larger sketch.dim"
    if quality["within"] < KEPT:
        return (
            f"{quality['within']:.1%} of the inner products lie within three standard deviations "
            f"of what a {kind} sketch should keep, fewer than {KEPT:.0%}; {advice}"
        )
    if quality["rms"] > ALLOWED * quality["dense"]:
        return (
            f"the inner products' error is {quality['rms']:.3f}, more than {ALLOWED:g} times that "
            f"of a dense Gaussian sketch ({quality['dense']:.3f}); {advice}"
        )
    return None


def sketch(ws: Workspace, examples: Entry) -> Sketched:
    """Gradients and sketches of an arrival or of the target set, each looked up or made.

    Rows whose gradient is zero or not finite are quarantined with the gradients: they would escape
    or poison every score. Asked for sketches where only the gradients are left, it reads the raw
    rows if they were kept, else it repeats the pass.
    """
    if there := find_sketched(ws, examples):
        return there
    task, store = ws.task.name, ws.store
    fields, sketch_fields = _fields(ws, examples)
    gradients = store.find(task, "gradients", fields)
    sketches = store.find(task, "sketches", sketch_fields)
    known = load_examples(examples)
    kept_rows, source = None, "backward pass"
    if gradients and RAW in gradients.manifest["files"]:
        kept_rows, source = _raw_blocks(ws, gradients), "kept raw rows"
        kept = pq.read_table(gradients.file("rows.parquet"))["example_id"].to_pylist()
        known = known.take(np.isin(known.ids, np.array(kept, dtype=np.str_)))
    with ExitStack() as stack:
        rows = None if gradients else stack.enter_context(store.write(task, "gradients", fields))
        draft = (
            None if sketches else stack.enter_context(store.write(task, "sketches", sketch_fields))
        )
        made_of = examples.manifest["fields"]
        _stream(ws, made_of.get("arrival") or made_of["split"], known, kept_rows, rows, draft)
    made_gradients = gradients or (rows.done if rows else None)
    made_sketches = sketches or (draft.done if draft else None)
    assert made_gradients is not None and made_sketches is not None
    return Sketched(made_gradients, made_sketches, source)


def find_sketched(ws: Workspace, examples: Entry) -> Sketched | None:
    """Both outputs, if both are there."""
    fields, sketch_fields = _fields(ws, examples)
    gradients = ws.store.find(ws.task.name, "gradients", fields)
    sketches = ws.store.find(ws.task.name, "sketches", sketch_fields)
    return Sketched(gradients, sketches, "store") if gradients and sketches else None


def _fields(ws: Workspace, examples: Entry) -> tuple[dict[str, Any], dict[str, Any]]:
    made_of = {"examples": examples.identity, "version": 4}
    return made_of | {"space": gradient_space(ws)}, made_of | {"space": sketch_space(ws)}


def load_sketched(ws: Workspace, sketched: Entry, examples: Entry) -> Examples:
    """The examples that have a sketch, with it. Refuses sketches of another space or other rows."""
    for field, expected in sketch_space(ws).items():
        if sketched.manifest["fields"]["space"][field] != expected:
            raise ValueError(
                f"{sketched.path}: these sketches have another {field}: "
                f"{sketched.manifest['fields']['space'][field]!r}, the task asks for {expected!r}"
            )
    if sketched.manifest["fields"]["examples"] != examples.identity:
        raise ValueError(
            f"{sketched.path}: these are sketches of other examples, not {examples.path}"
        )
    known = load_examples(examples)
    ids = pq.read_table(sketched.file("ids.parquet"))["example_id"].to_pylist()
    place = {example_id: row for row, example_id in enumerate(known.ids)}
    found = known.take(np.array([place[example_id] for example_id in ids], dtype=np.int64))
    return Examples(**(vars(found) | {"sketches": read_rows(sketched.file(SKETCHES))}))


def _stream(
    ws: Workspace,
    source: str,
    known: Examples,
    kept_rows: Iterator[GradientBlock] | None,
    rows: Draft | None,
    draft: Draft | None,
) -> None:
    shapes = trainable_shapes(ws)
    width = sum(math.prod(shape) for shape in shapes.values())
    keep = rows is not None and 4 * width * len(known) <= ws.task.gradients.keep_raw_bytes
    losses, norms = np.zeros(len(known), np.float32), np.zeros(len(known), np.float32)
    with ExitStack() as stack:
        raw = sketches = operator = None
        probe = _Probe(ws, known)
        if rows is not None and keep:
            raw = stack.enter_context(RowWriter(rows.path / RAW, width))
        if draft is not None:
            spec = ws.task.sketch
            operator = ModelSketch(shapes, spec.kind, sketch_dimension(ws), spec.seed)
            sketches = stack.enter_context(RowWriter(draft.path / SKETCHES, sketch_dimension(ws)))
        bar = stack.enter_context(tqdm(total=len(known), desc="gradients", unit="ex", leave=False))
        blocks: Iterator[GradientBlock | SketchBlock]
        if kept_rows is None and raw is None and operator and operator.of_matrices():
            blocks = _sketch_pass(ws, known, operator)
        else:
            blocks = kept_rows or _pass(ws, known)
        for block in blocks:
            assert block.norms is not None
            losses[block.rows], norms[block.rows] = block.losses, block.norms
            good = _usable(block.losses, block.norms)
            if raw is not None and isinstance(block, GradientBlock):
                raw.append(
                    torch.cat([g[good].flatten(1) for g in block.gradients.values()], 1).numpy()
                )
            if sketches is not None and operator is not None:
                whole = (
                    block.sketches if isinstance(block, SketchBlock) else operator(block.gradients)
                )
                sketched = whole[good]
                sketches.append(sketched.numpy())
                probe.add(block, good, sketched)
            bar.update(len(block.losses))
    usable = _usable(torch.from_numpy(losses), torch.from_numpy(norms)).numpy()
    if draft is not None:
        pq.write_table(pa.table({"example_id": known.ids[usable]}), draft.path / "ids.parquet")
        draft.rows = int(usable.sum())
        draft.summary = {
            "dimension": sketch_dimension(ws),
            "parameters": width,
            "quality": probe.quality(),
        }
    if rows is not None:
        _write_rows(ws, source, known, losses, norms, usable, rows)
        rows.summary |= {"parameters": width, "raw_kept": bool(keep)}


class _Probe:
    """The first good examples' exact gradients, at most PROBE, held against their sketches."""

    def __init__(self, ws: Workspace, known: Examples) -> None:
        self.ws, self.known = ws, known
        self.exact: list[dict[str, Tensor]] = []
        self.sketched: list[Tensor] = []
        self.room = PROBE

    def add(self, block: GradientBlock | SketchBlock, good: Tensor, sketched: Tensor) -> None:
        """Take what still has room; gradients that were never formed are formed for it."""
        if not self.room:
            return
        few = good & (good.cumsum(0) <= self.room)
        if isinstance(block, GradientBlock):
            self.exact.append({name: g[few] for name, g in block.gradients.items()})
        else:
            rows = np.arange(len(self.known))[block.rows][few.numpy()]
            self.exact += [formed.gradients for formed in _pass(self.ws, self.known.take(rows))]
        self.sketched.append(sketched[: self.room])
        self.room -= int(few.sum())

    def quality(self) -> dict[str, float] | None:
        """See `gram_error`; None with fewer than two examples."""
        if PROBE - self.room < 2:
            return None
        rows = torch.cat(self.sketched)
        exact = {name: torch.cat([part[name] for part in self.exact]) for name in self.exact[0]}
        allowed = allowed_variance(self.ws.task.sketch.kind)
        return gram_error(gram(exact), gram(rows), rows.shape[1], allowed)


def _write_rows(
    ws: Workspace,
    source: str,
    known: Examples,
    losses: np.ndarray,
    norms: np.ndarray,
    usable: np.ndarray,
    draft: Draft,
) -> None:
    ids = known.ids.tolist()
    table = pa.table({"example_id": ids, "loss": losses, "norm": norms})
    refused = quarantine_table(
        (
            source,
            int(known.columns[ROW_COLUMN][i]),
            ids[i],
            ZERO_GRADIENT if norms[i] == 0 else NON_FINITE_GRADIENT,
            f"loss {losses[i]}, norm {norms[i]}",
        )
        for i in np.flatnonzero(~usable)
    )
    task = {"task": ws.task.name}
    good = with_constants(table.filter(pa.array(usable)), task | {"artifact": draft.identity})
    pq.write_table(good, draft.path / "rows.parquet")
    pq.write_table(
        with_constants(refused, task | {"arrival": source}), draft.path / "quarantine.parquet"
    )
    draft.rows = int(usable.sum())
    draft.summary = {
        "quarantined": len(refused),
        "mean_loss": float(losses[usable].mean()) if usable.any() else None,
        "mean_norm": float(norms[usable].mean()) if usable.any() else None,
    }


def _usable(losses: Tensor, norms: Tensor) -> Tensor:
    return losses.isfinite() & norms.isfinite() & (norms > 0)


def _pass(ws: Workspace, known: Examples) -> Iterator[GradientBlock]:
    assert known.inputs is not None
    return gradient_blocks(
        base_builder(ws)(),
        torch.from_numpy(known.inputs),
        torch.from_numpy(known.labels),
        list(trainable_shapes(ws)),
        block=ws.task.gradients.block,
    )


def _sketch_pass(ws: Workspace, known: Examples, operator: ModelSketch) -> Iterator[SketchBlock]:
    """The same without forming a gradient: from the factors of the linear layers' gradients."""
    assert known.inputs is not None
    for block in sketch_blocks(
        base_builder(ws)(),
        torch.from_numpy(known.inputs),
        torch.from_numpy(known.labels),
        operator.of_matrices(),
        block=ws.task.gradients.block,
    ):
        if block.norms is None:
            raise ValueError(
                f"sketch.kind {ws.task.sketch.kind}: a trained tensor is used twice in a forward "
                "pass, so that gradient norms would have to be formed; take another kind"
            )
        yield block


def _raw_blocks(ws: Workspace, gradients: Entry) -> Iterator[GradientBlock]:
    """The kept rows as the pass gave them; only usable ones were kept."""
    shapes = trainable_shapes(ws)
    raw = torch.from_numpy(read_rows(gradients.file(RAW)))
    table = pq.read_table(gradients.file("rows.parquet"))
    losses, norms = (torch.from_numpy(table[name].to_numpy().copy()) for name in ("loss", "norm"))
    for start in range(0, len(raw), ws.task.gradients.block):
        rows = slice(start, min(start + ws.task.gradients.block, len(raw)))
        parts = raw[rows].split([math.prod(shape) for shape in shapes.values()], dim=1)
        named = {
            name: part.reshape(-1, *shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        yield GradientBlock(rows, named, losses[rows], norms[rows])
