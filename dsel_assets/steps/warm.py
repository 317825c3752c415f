"""Where a re-selection goes on from: decided when it begins, so that asking again is safe.

    <store>/<task>/warm/<strategy and settings>/<generation>.json   cell -> {"warm", "selection"}

What a strategy needs to go on lies beside its selection. A cell begins cold where no earlier
generation has that cell under the same settings; a strategy that looks only at what has come since
also where the pool it saw is not the beginning of this one, or has grown by a tenth since all of it
was looked at. Under quotas and budgets in costs it leaves nothing to go on from.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from dsel_assets.resources.store import Entry, StoreError, identity, write_json
from dsel_assets.selection import State
from dsel_assets.steps.generation import Generation, generation_of, sketched_rows
from dsel_assets.steps.workspace import Workspace

STATE = "state.safetensors"
COLD = "cold"
AGAIN = 1.1  # times the rows that were all looked at: then they are again
TEXT = "text:"  # prefix of the names of arrays of text, which lie there as bytes
Place = tuple[int, int]  # budget, seed


def origins(
    ws: Workspace,
    generation: Generation,
    fields: Mapping[Place, Mapping[str, Any]],
    decide: bool = False,
    follows: bool = False,
) -> dict[Place, str]:
    """For each cell of one strategy the selection that it goes on from, or `cold`.

    fields: what the cells' selections are made of, each with `warm: cold`. Until it is decided, it
    is the latest there is; decide: that is written down. follows: the strategy does.
    """
    first = next(iter(fields.values()))
    made_of = {name: first[name] for name in ("strategy", "version", "settings", "target", "space")}
    if first["constraints"]:
        made_of["constraints"] = first["constraints"]
    folder = ws.store.folder(ws.task.name, "warm") / f"{first['strategy']}-{identity(made_of)}"
    path = folder / f"{generation.number:06d}-{generation.identity}.json"
    names = {place: f"{place[0]} {place[1]}" for place in fields}

    def latest(earlier: list[dict[str, dict[str, str]]], name: str) -> str:
        for known in earlier:
            made = known.get(name, {}).get("selection")
            entry = ws.store.entry(ws.task.name, "subsets", made) if made else None
            if entry is None or STATE not in entry.manifest["files"]:
                continue
            if not follows or arrivals_seen(ws, generation, entry) is not None:
                return entry.identity
        return COLD

    known = _read(path)
    if not set(names.values()) <= known.keys():
        earlier = list(_earlier(folder, path))
        if not decide:
            return {
                place: known[name]["warm"] if name in known else latest(earlier, name)
                for place, name in names.items()
            }
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            known = _read(path)
            for place in (place for place in fields if names[place] not in known):
                warm = latest(earlier, names[place])
                made = identity({**fields[place], "warm": warm})
                known[names[place]] = {"warm": warm, "selection": made}
            write_json(path, known)
    return {place: known[name]["warm"] for place, name in names.items()}


def _read(path: Path) -> dict[str, dict[str, str]]:
    return json.loads(path.read_text()) if path.exists() else {}


def _earlier(folder: Path, path: Path) -> Iterator[dict[str, dict[str, str]]]:
    """What was decided for the generations before, the newest first."""
    before = (other for other in folder.glob("*.json") if other.name < path.name)
    return map(_read, sorted(before, reverse=True))


def arrivals_seen(ws: Workspace, generation: Generation, entry: Entry) -> int | None:
    """How many first arrivals a selection saw; None where all has to be looked at again."""
    saw = generation_of(ws, entry.manifest["fields"]["generation"])
    if saw is None or generation.members[: len(saw.members)] != saw.members:
        return None
    if sketched_rows(ws, generation) > AGAIN * entry.summary["looked_at"]:
        return None
    return len(saw.members)


def origin(ws: Workspace, warm: str) -> Entry | None:
    """The selection that one goes on from; None for `cold`."""
    if warm == COLD:
        return None
    entry = ws.store.entry(ws.task.name, "subsets", warm)
    if entry is None:
        raise StoreError(
            f"{ws.task.name}: the selection {warm}, from which this one goes on, is gone; restore "
            "it from a backup, or set reselect: cold"
        )
    return entry


def save_state(state: State, path: Path) -> None:
    """Write a state; arrays of text as bytes, so that nothing is pickled."""
    arrays = {}
    for name, value in state.items():
        if value.dtype.kind == "U":
            encoded = np.char.encode(value, "utf-8")
            size = max(1, encoded.dtype.itemsize)
            arrays[TEXT + name] = encoded.astype(f"S{size}").view(np.uint8).reshape(-1, size)
        else:
            arrays[name] = np.asarray(value, order="C")
    save_file(arrays, path)


def load_state(entry: Entry) -> dict[str, NDArray]:
    """Read a selection's state."""
    found: dict[str, NDArray] = {}
    for name, value in load_file(entry.file(STATE)).items():
        if name.startswith(TEXT):
            text = np.ascontiguousarray(value).view(f"S{value.shape[1]}").reshape(len(value))
            found[name.removeprefix(TEXT)] = np.char.decode(text, "utf-8")
        else:
            found[name] = value
    return found
