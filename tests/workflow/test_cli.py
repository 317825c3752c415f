"""The commands, as a person types them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from dsel_assets.cli import app
from dsel_assets.steps.cells import cells
from dsel_assets.steps.generation import current_generation
from dsel_assets.steps.subsets import chosen_ids


def call(*words: Any) -> tuple[int, str, str]:
    found = CliRunner().invoke(app, [str(word) for word in words])
    return found.exit_code, found.stdout, found.stderr


@pytest.fixture
def task_file(done: Any) -> Any:
    done.task()
    return done.folder / "tiny.yaml"


def test_status_explain_export_and_doctor(done: Any, task_file: Any) -> None:
    code, said, _ = call("status", task_file)
    assert code == 0 and "generation: 1" in said
    assert json.loads(call("status", task_file, "--json")[1])["pool"] == 120
    ws = done.workspace()
    cell = next(iter(cells(ws, current_generation(ws), "itl")))
    name = chosen_ids(ws.store.get("tiny", "subsets", cell.selection))[0]
    code, said, _ = call("explain", name, task_file)
    assert code == 0 and "strategy itl, budget 5, seed 0" in said and "nearest_target" in said
    assert json.loads(call("explain", name, task_file, "--json")[1])["example_id"] == name
    to = done.folder / "out"
    words = ("export", to, "--strategy", "itl", "--budget", 5, "--task", task_file, "--as", "hf")
    assert call(*words)[:2] == (0, f"{to}\n")
    code, _, error = call(*words)
    assert code == 1 and "is there already" in error
    assert call("doctor", task_file)[:2] == (0, "all is well\n")
    (done.home / "store" / "tiny" / "verdict" / "stray").mkdir()
    code, said, _ = call("doctor", task_file)
    assert code == 1 and "half-written" in said


def test_mistakes_are_one_line(done: Any, task_file: Any) -> None:
    code, _, error = call("explain", "nobody", task_file)
    assert code == 1 and error.startswith("error: tiny: no row that landed")
    task_file.write_text("pool: 3")
    code, _, error = call("status", task_file)
    assert code == 2 and error.startswith(f"error: {task_file}")


@pytest.mark.parametrize(
    "command", ["run", "label", "status", "explain", "export", "doctor", "ui", "init"]
)
def test_every_command_explains_itself(command: str) -> None:
    code, said, _ = call(command, "--help")
    assert code == 0 and "Usage" in said
