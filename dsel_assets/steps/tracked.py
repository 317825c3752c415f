"""The cells and the champion as MLflow shows them."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock

from dsel_assets.resources.store import MANIFEST
from dsel_assets.resources.tracking import TrackedCell, Tracking
from dsel_assets.steps.cells import artifacts, cells
from dsel_assets.steps.champion import champion, champion_lock
from dsel_assets.steps.chosen import per_pick
from dsel_assets.steps.generation import Generation
from dsel_assets.steps.model import WEIGHTS
from dsel_assets.steps.workspace import Workspace

POINTS = 100  # of a curve: MLflow's limit of a batch is 1,000


def thinned(column: list[float]) -> list[tuple[int, float]]:
    """(pick, value) of at most POINTS picks, evenly apart, the last among them."""
    step = max(1, -(-len(column) // POINTS))
    return [(i + 1, column[i]) for i in range((len(column) - 1) % step, len(column), step)]


def tracked_cells(ws: Workspace, generation: Generation, strategy: str) -> list[TrackedCell]:
    """Everything that MLflow logs of a strategy's cells, read from the store."""
    task = ws.task
    tracked = []
    for cell in cells(ws, generation, strategy):
        selection, checkpoint, metric = artifacts(ws, cell)
        tracked.append(
            TrackedCell(
                strategy=cell.strategy,
                budget=cell.budget,
                seed=cell.seed,
                selection=selection.identity,
                metric=metric.identity,
                settings=task.settings(strategy),
                finetune=task.finetune.model_dump(),
                scores=metric.summary,
                curve=checkpoint.summary["curve"],
                picks={name: thinned(column) for name, column in per_pick(selection).items()},
                select_seconds=selection.summary["seconds"],
                train_seconds=checkpoint.manifest["seconds"],
                digest=generation.identity,
                source=ws.landing,
                ended=(metric.path / MANIFEST).stat().st_mtime,
            )
        )
    return tracked


def track_champion(ws: Workspace, tracking: Tracking) -> None:
    """Point MLflow's alias at the champion there is now.

    One process at a time: of two that changed it at once, whoever comes second reads what holds.
    """
    with FileLock(champion_lock(ws).with_name("alias.lock")):
        now = champion(ws)
        checkpoint = now and ws.store.entry(ws.task.name, "checkpoints", now["checkpoint"])
        weights = checkpoint.file(WEIGHTS) if checkpoint else Path()
        tracking.register_champion(ws.task.name, now, weights)
