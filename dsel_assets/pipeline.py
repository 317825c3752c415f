"""The whole workflow in order, without an orchestrator: what `benchmarks/overhead.py` times."""

from __future__ import annotations

from typing import Any

from dsel_assets.resources.store import Entry
from dsel_assets.steps.arrivals import arrivals, landed, register
from dsel_assets.steps.catalog import write_catalog
from dsel_assets.steps.checkpoints import finetune
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.metrics import evaluate
from dsel_assets.steps.pool import held_back, ingest
from dsel_assets.steps.sketches import sketch
from dsel_assets.steps.spectrum import hessian_spectrum
from dsel_assets.steps.subsets import select
from dsel_assets.steps.verdict import compare, comparisons, promote
from dsel_assets.steps.workspace import Workspace


def run(ws: Workspace) -> tuple[Entry, list[dict[str, Any]]]:
    """From the landing folder to the verdict and its comparisons; only what is missing is made."""
    ws.prepare()
    for file in landed(ws):
        register(ws, file)
    for known in arrivals(ws):
        pool = ingest(ws, known.key)
        if held_back(ws, pool) is None:
            sketch(ws, pool)
    hessian_spectrum(ws)
    generation = current_generation(ws)
    for strategy in ws.task.strategies.chosen():
        select(ws, generation, strategy)
        finetune(ws, generation, strategy)
        evaluate(ws, generation, strategy)
    decided = compare(ws, generation)
    promote(ws, generation, decided)
    write_catalog(ws, generation, decided)
    return decided, comparisons(decided)
