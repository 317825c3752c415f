"""One pass over the examples: each one's loss, its gradient's norm, and the gradient's sketch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack

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
from dsel_assets.gradients import (
    GradientBlock,
    Objective,
    SketchBlock,
    gradient_blocks,
    loss_at_drawn,
    loss_at_predicted,
    output_directions,
    outputs_along,
    sketch_blocks,
)
from dsel_assets.resources.rows import RowWriter, read_rows
from dsel_assets.resources.store import Draft, Entry
from dsel_assets.sketching import ModelSketch
from dsel_assets.sketching.quality import gram, gram_error
from dsel_assets.steps.model import base_builder
from dsel_assets.steps.pool import load_examples, with_constants
from dsel_assets.steps.sketched import SKETCHES, Sketched, find_sketched, sketched_fields
from dsel_assets.steps.space import gradient_rows, sketch_dimension, trainable_shapes
from dsel_assets.steps.spectrum import PROBE, allowed_variance, pin_dimension
from dsel_assets.steps.workspace import Workspace

RAW = "raw.safetensors"


def sketch(ws: Workspace, examples: Entry) -> Sketched:
    """Gradients and sketches of an arrival or of the target set, each looked up or made.

    Rows whose gradient is zero or not finite are quarantined with the gradients: they would escape
    or poison every score. Asked for sketches where only the gradients are left, it reads the raw
    rows if they were kept, else it repeats the pass.
    """
    if there := find_sketched(ws, examples):
        return there
    pin_dimension(ws)
    task, store = ws.task.name, ws.store
    fields, sketch_fields = sketched_fields(ws, examples)
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


def _stream(
    ws: Workspace,
    source: str,
    known: Examples,
    kept_rows: Iterator[GradientBlock] | None,
    rows: Draft | None,
    draft: Draft | None,
) -> None:
    shapes, k = trainable_shapes(ws), gradient_rows(ws) or 1
    width = sum(math.prod(shape) for shape in shapes.values())
    keep = rows is not None and 4 * k * width * len(known) <= ws.task.gradients.keep_raw_bytes
    losses, norms = np.zeros(len(known), np.float32), np.zeros(len(known), np.float32)
    with ExitStack() as stack:
        raw = sketches = operator = None
        probe = _Probe(ws, known)
        if rows is not None and keep:
            raw = stack.enter_context(RowWriter(rows.path / RAW, k * width))
        if draft is not None:
            spec = ws.task.sketch
            operator = ModelSketch(shapes, spec.kind, sketch_dimension(ws), spec.seed)
            wide = k * operator.out_features
            sketches = stack.enter_context(RowWriter(draft.path / SKETCHES, wide))
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
                flat = [g.reshape(len(good), k, -1) for g in block.gradients.values()]
                raw.append(torch.cat(flat, 2)[good].flatten(1).numpy())
            if sketches is not None and operator is not None:
                if isinstance(block, SketchBlock):
                    whole = block.sketches
                else:
                    whole = operator(_rows(block.gradients, shapes))
                sketched = whole.reshape(len(good), k, -1)[good]
                sketches.append(sketched.flatten(1).numpy())
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
    """The first good examples' exact gradients, at most PROBE, held against their sketches.

    Of examples with several rows the first few, so that at least two examples are in it.
    """

    def __init__(self, ws: Workspace, known: Examples) -> None:
        self.ws, self.known, self.shapes = ws, known, trainable_shapes(ws)
        self.exact: list[dict[str, Tensor]] = []
        self.sketched: list[Tensor] = []
        self.rows = min(gradient_rows(ws) or 1, PROBE // 2)
        self.room = PROBE // self.rows

    def add(self, block: GradientBlock | SketchBlock, good: Tensor, sketched: Tensor) -> None:
        """Take what still has room; gradients that were never formed are formed for it.

        sketched: [examples, k, D] of the good ones.
        """
        if not self.room:
            return
        few = good & (good.cumsum(0) <= self.room)
        if isinstance(block, GradientBlock):
            self._take({name: g[few] for name, g in block.gradients.items()})
        else:
            rows = np.arange(len(self.known))[block.rows][few.numpy()]
            for formed in _pass(self.ws, self.known.take(rows), self.rows):
                self._take(formed.gradients)
        self.sketched.append(sketched[: self.room, : self.rows].flatten(0, 1))
        self.room -= int(few.sum())

    def _take(self, gradients: dict[str, Tensor]) -> None:
        if gradient_rows(self.ws):
            gradients = {name: g[:, : self.rows] for name, g in gradients.items()}
        self.exact.append(_rows(gradients, self.shapes))

    def quality(self) -> dict[str, float] | None:
        """See `gram_error`; None with fewer than two rows."""
        rows = torch.cat(self.sketched) if self.sketched else torch.empty(0)
        if len(rows) < 2:
            return None
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


def _objective(ws: Workspace, known: Examples, rows: int | None = None) -> Objective | None:
    """What of the outputs is differentiated: at most `rows` an example; None: the loss."""
    spec = ws.task.gradients
    if spec.of == "outputs":
        directions = output_directions(len(ws.task.pool.columns.classes), spec.outputs)
        return outputs_along(directions[:rows])
    if spec.labels == "drawn":
        return loss_at_drawn(known.ids.tolist())
    return loss_at_predicted if spec.labels == "predicted" else None


def _rows(
    gradients: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Gradients [B, *shape] or [B, k, *shape] as one row each, [B, *shape] or [B k, *shape]."""
    return {name: g.reshape(-1, *shapes[name]) for name, g in gradients.items()}


def _pass(ws: Workspace, known: Examples, rows: int | None = None) -> Iterator[GradientBlock]:
    assert known.inputs is not None
    return gradient_blocks(
        base_builder(ws)(),
        torch.from_numpy(known.inputs),
        torch.from_numpy(known.labels),
        list(trainable_shapes(ws)),
        of=_objective(ws, known, rows),
        block=_examples_at_a_time(ws),
    )


def _examples_at_a_time(ws: Workspace) -> int:
    return max(1, ws.task.gradients.block // (gradient_rows(ws) or 1))


def _sketch_pass(ws: Workspace, known: Examples, operator: ModelSketch) -> Iterator[SketchBlock]:
    """The same without forming a gradient: from the factors of the linear layers' gradients."""
    assert known.inputs is not None
    for block in sketch_blocks(
        base_builder(ws)(),
        torch.from_numpy(known.inputs),
        torch.from_numpy(known.labels),
        operator.of_matrices(),
        of=_objective(ws, known),
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
    shapes, k = trainable_shapes(ws), gradient_rows(ws)
    raw = torch.from_numpy(read_rows(gradients.file(RAW)))
    table = pq.read_table(gradients.file("rows.parquet"))
    losses, norms = (torch.from_numpy(table[name].to_numpy().copy()) for name in ("loss", "norm"))
    block = _examples_at_a_time(ws)
    for start in range(0, len(raw), block):
        rows = slice(start, min(start + block, len(raw)))
        whole = raw[rows] if k is None else raw[rows].unflatten(1, (k, -1))
        parts = whole.split([math.prod(shape) for shape in shapes.values()], dim=-1)
        named = {
            name: part.reshape(*part.shape[:-1], *shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }
        yield GradientBlock(rows, named, losses[rows], norms[rows])
