"""Rounds of asking for labels: choose, wait, train on what was labelled, choose again.

Candidates lie in a folder of their own and have no label. What is asked for is written as a file in
the pool's schema with an empty label; filled in, it lands as any arrival does. An asked row waits
until its input stands in the pool.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from filelock import FileLock
from torch import nn

from dsel_assets.data import (
    DIGEST_COLUMN,
    UNREADABLE_FILE,
    Examples,
    UnreadableFileError,
    example_ids,
    merge,
    read_file,
    validate,
)
from dsel_assets.evaluation import scores
from dsel_assets.finetuning import predict, train
from dsel_assets.resources.store import Entry, StoreError
from dsel_assets.selection.active import ask
from dsel_assets.steps.arrivals import files_in
from dsel_assets.steps.chosen import chosen_ids
from dsel_assets.steps.generation import (
    Generation,
    NothingSketchedError,
    current_generation,
    members,
)
from dsel_assets.steps.loading import load_pool
from dsel_assets.steps.model import base_builder, base_digest
from dsel_assets.steps.pool import (
    contract,
    evaluation_set,
    input_digests,
    load_examples,
    without_leaks,
)
from dsel_assets.steps.space import trainable_shapes
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import Active

KIND = "label_requests"
REQUESTS = "requests.parquet"  # what the labelling team gets: the schema, its label empty
ASKED = ["example_id", "known_as"]
SEED = 0


@dataclass(frozen=True)
class Standing:
    """Where the rounds are.

    rounds      the artifacts so far, in order
    waiting     ids asked for that have no label yet, in the order of asking
    labelled    ids asked for that have one
    answered    how many of the last round's have one
    generation  what the pool holds, None before the first arrival is sketched
    """

    rounds: list[Entry]
    waiting: list[str]
    labelled: list[str]
    answered: int
    generation: Generation | None

    def due(self, rule: Active) -> bool:
        """Whether another round may begin: enough of the last one is labelled."""
        if rule.rounds is not None and len(self.rounds) >= rule.rounds:
            return False
        if not self.rounds:
            return True
        enough = math.ceil(self.rounds[-1].manifest["rows"] * rule.wait_for - 1e-9)
        return self.answered >= enough


def standing(ws: Workspace) -> Standing:
    """Rounds, and what became of the rows that they asked for."""
    entries = ws.store.entries(ws.task.name, KIND)
    rounds = sorted(entries, key=lambda entry: entry.manifest["fields"]["round"])
    generation, known = None, set[str]()
    with suppress(NothingSketchedError):
        generation = current_generation(ws, enter=False)
        column = "example_id" if ws.task.pool.columns.id is not None else DIGEST_COLUMN
        for pool, _, _ in members(ws, generation):
            table = pq.read_table(pool.file("rows.parquet"), columns=[column])
            known.update(table[column].to_pylist())
    waiting: list[str] = []
    labelled: list[str] = []
    answered = 0
    for entry in rounds:
        before = len(labelled)
        for row in pq.read_table(entry.file("rows.parquet"), columns=ASKED).to_pylist():
            (waiting if known.isdisjoint(row["known_as"]) else labelled).append(row["example_id"])
        answered = len(labelled) - before
    return Standing(rounds, waiting, labelled, answered, generation)


def next_round(ws: Workspace) -> Entry:
    """The newest round: a new one if it is due and candidates are left, else the last.

    StoreError if there is nothing to ask for and nothing was asked.
    """
    folder = ws.store.folder(ws.task.name, KIND)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):  # two at once would both be the next
        now = standing(ws)
        if now.due(_rule(ws)) and (made := _next(ws, now)) is not None:
            return made
    if not now.rounds:
        raise StoreError(
            f"{ws.task.name}: {_rule(ws).candidates} holds no row that lacks a label; put .parquet "
            "or .jsonl files with the pool's schema there"
        )
    return now.rounds[-1]


def _next(ws: Workspace, now: Standing) -> Entry | None:
    """The round after those there are, None without a candidate."""
    candidates, refused = load_candidates(ws)
    pool = None if now.generation is None else load_pool(ws, now.generation, arrays=["inputs"])
    done = [*now.waiting, *now.labelled]
    if pool is not None:
        done += _keys(ws, pool).tolist()
    left = candidates.take(~np.isin(candidates.ids, done))
    if len(left) == 0:
        return None
    return _ask(ws, now, pool, left.take(np.argsort(left.ids, kind="stable")), refused)


def _ask(
    ws: Workspace,
    now: Standing,
    pool: Examples | None,
    left: Examples,
    refused: dict[str, int],
) -> Entry:
    """The next round: train on the pool, choose from what is left, knowing what waits."""
    rule = _rule(ws)
    target = evaluation_set(ws, "target") if ws.task.target is not None else None
    fields = {
        "round": len(now.rounds) + 1,
        "after": now.rounds[-1].identity if now.rounds else None,
        "candidates": _digest(left.ids),
        "waiting": _digest(np.array(sorted(now.waiting), dtype=np.str_)),
        "generation": None if now.generation is None else now.generation.identity,
        "settings": rule.model_dump(include={"batch", "rule", "noise"}),
        "finetune": ws.task.finetune.model_dump(),
        "base": base_digest(ws),
        "target": None if target is None else target.identity,
        "version": 1,
    }
    if entry := ws.store.find(ws.task.name, KIND, fields):
        return entry
    with ws.store.write(ws.task.name, KIND, fields) as draft:
        model = _trained(ws, pool, target)
        observed = [] if pool is None else [_inputs(pool)]
        observed += list(_waiting_inputs(ws, now))
        n = min(rule.batch, len(left))
        found = ask(
            model,
            _inputs(left),
            None if target is None else _inputs(load_examples(target)),
            n,
            observed=np.concatenate(observed) if observed else None,
            rule=rule.rule,
            noise=rule.noise,
        )
        chosen = left.take(found.indices)
        rows = {
            "task": [ws.task.name] * n,
            "round": [fields["round"]] * n,
            "example_id": chosen.ids,
            "known_as": _known_as(ws, chosen),
            "rank": np.arange(1, n + 1),
            "gain": found.gains,
            "source": chosen.groups,
        }
        pq.write_table(pa.table(rows), draft.path / "rows.parquet")
        pq.write_table(_requests(ws, chosen), draft.path / REQUESTS)
        draft.rows = n
        draft.summary = {
            "round": fields["round"],
            "labelled_before": len(now.labelled),
            "waiting_before": len(now.waiting),
            "candidates": len(left),
            "candidates_refused": refused,
            "pool": 0 if pool is None else len(pool),
            "gain_first": float(found.gains[0]),
            "gain_last": float(found.gains[-1]),
            **_variances(found.target_variance),
            "validation_accuracy": _accuracy(ws, model),
        }
    return draft.done


def load_candidates(ws: Workspace) -> tuple[Examples, dict[str, int]]:
    """Unlabelled rows by id, each once, and how many were refused for which reason.

    Rows that stand in target, validation or test are refused, as in the pool; of a file that can't
    be read nothing is taken.
    """
    evaluation = {split: evaluation_set(ws, split) for split in ws.splits}
    asked = contract(ws, labelled=False)
    nothing = validate([], asked, "").examples
    parts, refused = [("", nothing)], Counter[str]()
    for file in files_in(_rule(ws).candidates):
        try:
            found = validate(read_file(file.path, asked.declared), asked, file.path)
        except UnreadableFileError:
            refused[UNREADABLE_FILE] += 1
            continue
        clean, leaks = without_leaks(ws, file.path, found.examples, evaluation)
        parts.append((file.path, clean))
        refused.update(found.quarantine["reason"].to_pylist() + leaks["reason"].to_pylist())
    candidates, _, conflicts = merge(parts)
    refused.update(conflicts["reason"].to_pylist())
    return candidates, dict(refused)


def _known_as(ws: Workspace, asked: Examples) -> list[list[str]]:
    """What each row will be known by in the pool once it is labelled, whatever the label."""
    schema = ws.task.pool.columns
    if schema.id is not None:
        return [[name] for name in asked.ids.tolist()]
    by_class = [example_ids(_inputs(asked), [name] * len(asked)) for name in schema.classes]
    return [list(names) for names in zip(*(names.tolist() for names in by_class), strict=True)]


def _keys(ws: Workspace, examples: Examples) -> np.ndarray:
    """What a labelled example was known by when it had no label."""
    return examples.ids if ws.task.pool.columns.id is not None else input_digests(examples)


def _trained(ws: Workspace, pool: Examples | None, target: Entry | None) -> nn.Module:
    """The base model after the task's finetuning on all labels so far; the base itself on none."""
    model, spec = base_builder(ws)(), ws.task.finetune
    parts = [] if pool is None else [pool]
    if target is not None and spec.include_target:
        parts.append(load_examples(target))
    if not parts:
        return model
    labels = np.concatenate([part.labels for part in parts])
    train(
        model,
        torch.from_numpy(np.concatenate([_inputs(part) for part in parts])),
        torch.from_numpy(labels),
        torch.ones(len(labels)),
        trainable=list(trainable_shapes(ws)),
        steps=spec.steps,
        batch_size=spec.batch_size,
        lr=spec.lr,
        seed=SEED,
    )
    return model


def _requests(ws: Workspace, chosen: Examples) -> pa.Table:
    """The rows as the pool's schema has them, their label null."""
    schema, inputs = ws.task.pool.columns, _inputs(chosen)
    columns: dict[str, Any] = {schema.input: list(inputs.reshape(len(chosen), -1))}
    columns[schema.label] = pa.nulls(len(chosen), pa.string())
    if schema.group is not None:
        columns[schema.group] = chosen.groups
    if schema.id is not None:
        columns[schema.id] = chosen.ids
    for name in (schema.cost, *schema.keep, *schema.text):
        if name is not None:
            columns[name] = chosen.columns[name]
    return pa.table(columns)


def _waiting_inputs(ws: Workspace, now: Standing) -> Iterator[np.ndarray]:
    """Inputs of the rows that wait, as they were asked for."""
    column, shape = ws.task.pool.columns.input, ws.task.pool.columns.shape
    for entry in now.rounds:
        waits = np.isin(chosen_ids(entry), now.waiting)
        if waits.any():
            asked = pq.read_table(requests_file(entry), columns=[column])[column].to_pylist()
            yield np.array(asked, np.float32)[waits].reshape(-1, *shape)


def requests_file(entry: Entry) -> Path:
    """The file that a round's labelling team gets."""
    return entry.file(REQUESTS)


def _accuracy(ws: Workspace, model: nn.Module) -> float:
    examples = load_examples(evaluation_set(ws, "validation"))
    probabilities = predict(model, torch.from_numpy(_inputs(examples))).numpy()
    return float(scores(probabilities, examples.labels)["accuracy"])


def _variances(target_variance: np.ndarray) -> dict[str, float | None]:
    """Of the targets after the round, were all of it labelled."""
    if target_variance.shape[1] == 0:
        return {"target_variance": None, "worst_target_variance": None}
    left = target_variance[-1]
    return {"target_variance": float(left.mean()), "worst_target_variance": float(left.max())}


def _inputs(examples: Examples) -> np.ndarray:
    assert examples.inputs is not None
    return examples.inputs


def _digest(ids: np.ndarray) -> str:
    return blake2b("\n".join(ids.tolist()).encode(), digest_size=10).hexdigest()


def _rule(ws: Workspace) -> Active:
    if ws.task.active is None:
        raise StoreError(f"{ws.task.name}: the task has no `active` section")
    return ws.task.active
