"""The champion: the promoted selection, read off the history of promotions and rollbacks."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from dsel_assets.resources.store import StoreError
from dsel_assets.steps.workspace import Workspace

PROMOTED, ROLLED_BACK = "promoted", "rolled back"
BY_VERDICT = "verdict"  # who promotes where no person does


def champion(ws: Workspace) -> dict[str, Any] | None:
    """The promoted selection and the evidence it was promoted on, or None."""
    return next(reversed(_reigns(ws)), None)


def history(ws: Workspace) -> list[dict[str, Any]]:
    """Every move, oldest first: `move`, `when` (UTC), `by`, and the selection that it was about.

    A line that a kill cut short is no move.
    """
    path, found = _path(ws), []
    for line in path.read_text().splitlines() if path.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def crown(ws: Workspace, chosen: Mapping[str, Any], by: str) -> dict[str, Any] | None:
    """Make this selection the champion, if it is not; returns the champion there is.

    chosen has `strategy`, `budget`, `generation`, `selection`, `checkpoint`, `evidence` and
    `verdict`. What a verdict promoted and somebody rolled back, that verdict promotes no more,
    nor does it where a person who knew it promoted another one. A person may insist.
    """
    with FileLock(champion_lock(ws)):
        now = champion(ws)
        same = now is not None and all(now[k] == chosen[k] for k in ("selection", "checkpoint"))
        taken_back = by == BY_VERDICT and any(
            line["move"] == ROLLED_BACK
            and all(line[k] == chosen[k] for k in ("selection", "verdict"))
            for line in history(ws)
        )
        overruled = (
            by == BY_VERDICT
            and now is not None
            and now["by"] != BY_VERDICT
            and now["verdict"] == chosen["verdict"]
        )
        if not (same or taken_back or overruled):
            _append(ws, {**chosen, "move": PROMOTED, "by": by, "when": _now()})
        return champion(ws)


def rollback(ws: Workspace, by: str) -> dict[str, Any] | None:
    """Back to the champion before this one, or to none; StoreError where there is no champion."""
    with FileLock(champion_lock(ws)):
        gone = champion(ws)
        if gone is None:
            raise StoreError(f"{ws.task.name} has no champion, so nothing can be rolled back")
        about = {key: gone[key] for key in ("selection", "strategy", "verdict")}
        _append(ws, {**about, "move": ROLLED_BACK, "by": by, "when": _now()})
        return champion(ws)


def _reigns(ws: Workspace) -> list[dict[str, Any]]:
    """The champions that a rollback could go back through, the present one last."""
    found: list[dict[str, Any]] = []
    for line in history(ws):
        if line["move"] == PROMOTED:
            found.append(line)
        elif found:
            found.pop()
    return found


def _append(ws: Workspace, line: Mapping[str, Any]) -> None:
    path = _path(ws)
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as log:
        log.write(("\n" if torn else "") + json.dumps(line, sort_keys=True) + "\n")
        log.flush()
        os.fsync(log.fileno())


def _path(ws: Workspace) -> Path:
    return ws.store.folder(ws.task.name, "champion") / "promotions.jsonl"


def champion_lock(ws: Workspace) -> Path:
    """The file that whoever changes the champion locks; its folder is there."""
    _path(ws).parent.mkdir(parents=True, exist_ok=True)
    return _path(ws).with_name("lock")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
