"""A selection as files that other tools read, beside a manifest that says what it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import pyarrow as pa
import pyarrow.parquet as pq

from dsel_assets.data import DIGEST_COLUMN, ROW_COLUMN
from dsel_assets.resources.store import Entry, StoreError, file_sha256, write_json
from dsel_assets.steps.cells import cell_at
from dsel_assets.steps.generation import Generation, current_generation
from dsel_assets.steps.loading import arrivals_of, load_pool, named_rows, texts_of
from dsel_assets.steps.workspace import Workspace

Message = tuple[str, str]  # role, column of texts
Format = Literal["parquet", "jsonl", "hf"]
MANIFEST = "manifest.json"
OURS = (ROW_COLUMN, DIGEST_COLUMN)  # columns of the pool that only we need
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/train-*.parquet
---
{rows} examples that dsel chose for `{task}` by `{strategy}` at a budget of {budget}, seed {seed}
(generation {generation}, selection {selection}).
"""


def export(
    ws: Workspace,
    strategy: str,
    budget: int,
    seed: int,
    to: Path,
    form: Format = "parquet",
    messages: Sequence[Message] = (),
) -> Path:
    """Write a selection of the current generation into the new folder `to`; returns the folder.

    Rows are in the order of choice: id, rank, weight, strategy, arrival, label, source, the cost
    and the columns that the task keeps, its texts, input. messages: in the place of the input, a
    conversation made of the texts, as trainers of language models read it. `hf` is a folder that
    `datasets.load_dataset` reads. The folder appears whole or not at all.
    StoreError for a cell or a column that is not there, FileExistsError for a folder that is.
    """
    if to.exists():
        raise FileExistsError(f"{to} is there already; name a new folder")
    generation = current_generation(ws, enter=False)
    cell = cell_at(ws, generation, strategy, budget, seed)
    entry = ws.store.get(ws.task.name, "subsets", cell.selection)
    table = _table(ws, generation, strategy, entry, messages)
    part = to.with_name(f".{to.name}.part-{uuid4().hex[:8]}")
    part.mkdir(parents=True)
    try:
        said = {
            "task": ws.task.name,
            "generation": generation.number,
            "strategy": strategy,
            "budget": budget,
            "seed": seed,
            "selection": entry.identity,
            "rows": len(table),
        }
        WRITERS[form](table, part, said)
        files = sorted(path for path in part.rglob("*") if path.is_file())
        sums = {str(path.relative_to(part)): file_sha256(path) for path in files}
        write_json(part / MANIFEST, said | {"fields": cell.selection, "sha256": sums})
        part.rename(to)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return to


def _table(
    ws: Workspace,
    generation: Generation,
    strategy: str,
    entry: Entry,
    messages: Sequence[Message],
) -> pa.Table:
    for _, column in messages:
        if column not in (known := ws.task.pool.columns.text):
            raise StoreError(
                f"{ws.task.name}: a message can't be made of {column!r}; pool.schema.text names "
                f"{', '.join(known) or 'no column'}; add it there and run again"
            )
    chosen = pq.read_table(entry.file("rows.parquet"))
    ids = chosen["example_id"].to_pylist()
    places = named_rows(ws, generation, ids)
    rows = load_pool(ws, generation, places, ["inputs"])
    texts = {name: texts_of(ws, generation, places, name) for name in ws.task.pool.columns.text}
    classes = ws.task.pool.columns.classes
    assert rows.inputs is not None
    return pa.table(
        {
            "id": ids,
            "rank": chosen["rank"],
            "weight": chosen["weight"],
            "strategy": [strategy] * len(ids),
            "arrival": arrivals_of(ws, generation, ids),
            "label": [classes[label] for label in rows.labels],
            "source": rows.groups,
            **{name: column for name, column in rows.columns.items() if name not in OURS},
            **texts,
            **(
                {"messages": _conversations(texts, messages)}
                if messages
                else {"input": list(rows.inputs.reshape(len(ids), -1))}
            ),
        }
    )


def _conversations(
    texts: Mapping[str, Sequence[str]], messages: Sequence[Message]
) -> list[list[dict[str, str]]]:
    """Of each row its messages in this order, each with a role and a column's text."""
    columns = [[{"role": role, "content": text} for text in texts[of]] for role, of in messages]
    return [list(row) for row in zip(*columns, strict=True)]


def _parquet(table: pa.Table, folder: Path, said: dict[str, Any]) -> None:
    pq.write_table(table, folder / "selection.parquet")


def _jsonl(table: pa.Table, folder: Path, said: dict[str, Any]) -> None:
    with (folder / "selection.jsonl").open("w", encoding="utf-8") as file:
        for batch in table.to_batches(max_chunksize=1024):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch.to_pylist())


def _hugging_face(table: pa.Table, folder: Path, said: dict[str, Any]) -> None:
    (folder / "data").mkdir()
    pq.write_table(table, folder / "data" / "train-00000-of-00001.parquet")
    (folder / "README.md").write_text(CARD.format(**said))


WRITERS: dict[str, Callable[[pa.Table, Path, dict[str, Any]], None]] = {
    "parquet": _parquet,
    "jsonl": _jsonl,
    "hf": _hugging_face,
}
