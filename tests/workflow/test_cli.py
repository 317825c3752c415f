"""The commands, as a person types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dsel_assets.cli import app
from dsel_assets.steps.cells import cells
from dsel_assets.steps.chosen import chosen_ids
from dsel_assets.steps.generation import current_generation

SQL = Path(__file__).parents[2] / "dbt_like_sql"


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
    assert json.loads(call("status", task_file, "--json")[1])["rows"] == 120
    ws = done.workspace()
    cell = next(iter(cells(ws, current_generation(ws), "itl")))
    name = chosen_ids(ws.store.get("tiny", "subsets", cell.selection))[0]
    code, said, _ = call("explain", name, task_file)
    assert code == 0 and "nearest_target" in said
    shown = [line.split() for line in said.splitlines() if line.split()[:1] == ["itl"]]
    assert shown[0][1:7] == ["5,", "10", "0,", "1", "1", "1"]  # budgets, seeds, rank, weight
    assert json.loads(call("explain", name, task_file, "--json")[1])["example_id"] == name
    to = done.folder / "out"
    words = ("export", to, "--strategy", "itl", "--budget", 5, "--task", task_file, "--as", "hf")
    assert call(*words)[:2] == (0, f"{to}\n")
    other = done.folder / "other"
    found = json.loads(call("export", other, *words[2:], "--json")[1])
    assert found["folder"] == str(other) and found["rows"] == 5
    code, _, error = call(*words)
    assert code == 1 and "is there already" in error
    assert call("doctor", task_file)[:2] == (0, "all is well\n")
    (done.home / "store" / "tiny" / "verdict" / "stray").mkdir()
    code, said, _ = call("doctor", task_file)
    assert code == 1 and "half-written" in said


def test_looking_loads_no_torch(done: Any, task_file: Any) -> None:
    """Of a pool of a million rows it would be most of what a command takes."""
    ws = done.workspace()
    cell = next(iter(cells(ws, current_generation(ws), "itl")))
    name = chosen_ids(ws.store.get("tiny", "subsets", cell.selection))[0]
    heavy = ("torch", "numba", "sklearn", "matplotlib", "dagster", "mlflow")
    for words in (["status"], ["explain", name], ["diff", "1", "1"]):
        script = (
            "import sys\nfrom dsel_assets.cli import app\n"
            "app(sys.argv[1:], standalone_mode=False)\n"
            f"print([name for name in {heavy} if name in sys.modules], file=sys.stderr)"
        )
        asked = [sys.executable, "-c", script, *words, str(task_file)]
        ran = subprocess.run(asked, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert ran.stderr.splitlines()[-1] == "[]", words


def test_mistakes_are_one_line(done: Any, task_file: Any) -> None:
    code, _, error = call("explain", "nobody", task_file)
    assert code == 1 and error.startswith("error: tiny: no row that landed")
    where = ("--strategy", "itl", "--budget", 5, "--task", task_file, "--message")
    code, _, error = call("export", done.folder / "out", *where, "user=question")
    assert code == 1 and "pool.schema.text names no column" in error
    for wrong in ("user", "=question", "user="):
        code, _, error = call("export", done.folder / "out", *where, wrong)
        assert code == 2 and "ROLE=COLUMN" in error
    assert not (done.folder / "out").exists()
    task_file.write_text("pool: 3")
    code, _, error = call("status", task_file)
    assert code == 2 and error.startswith(f"error: {task_file}")


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "ingest",
        "label",
        "status",
        "explain",
        "diff",
        "plan",
        "promote",
        "rollback",
        "export",
        "doctor",
        "ui",
        "init",
    ],
)
def test_every_command_explains_itself(command: str) -> None:
    code, said, _ = call(command, "--help")
    assert code == 0 and "Usage" in said


def test_a_rollback_moves_the_alias_in_mlflow(done: Any, task_file: Any) -> None:
    from mlflow import MlflowClient

    from dsel_assets.resources.tracking import Tracking
    from dsel_assets.steps.champion import crown
    from dsel_assets.steps.model import WEIGHTS

    ws = done.workspace()
    tracking = Tracking.at(done.home)
    tracking.initialise()
    assert call("rollback", task_file)[0] == 1
    for number, strategy in enumerate(("itl", "skmm")):
        cell = next(iter(cells(ws, current_generation(ws), strategy)))
        chosen = {
            "strategy": strategy,
            "budget": 5,
            "generation": 1,
            "selection": cell.identities["subsets"],
            "checkpoint": cell.identities["checkpoints"],
            "evidence": {"diff": 0.1},
            "verdict": f"v{number}",
        }
        champion = crown(ws, chosen, "verdict")
        weights = ws.store.get("tiny", "checkpoints", cell.checkpoint).file(WEIGHTS)
        tracking.register_champion("tiny", champion, weights)
    client = MlflowClient(tracking.uri)

    def aliased() -> str:
        return client.get_model_version_by_alias("tiny", "champion").tags["dsel.strategy"]

    assert aliased() == "skmm"
    assert call("rollback", task_file, "--by", "me")[1].startswith("champion: itl at 5")
    assert aliased() == "itl"
    code, _, error = call("promote", "bads", task_file, "--by", "me")
    assert code == 1 and "give a reason" in error
    words = ("promote", "bads", task_file, "--by", "me", "--why", "as a trial", "--json")
    assert json.loads(call(*words)[1])["why"] == "as a trial" and aliased() == "bads"
    assert call("rollback", task_file)[1].startswith("champion: itl at 5")
    assert call("rollback", task_file)[1] == "champion: none\n"
    assert not client.get_registered_model("tiny").aliases


def test_what_changed_between_generations(done: Any, task_file: Any) -> None:
    from dsel_assets.pipeline import run
    from dsel_assets.resources.warehouse import Warehouse
    from dsel_assets.sql import load_models
    from dsel_assets.steps.catalog import tables

    done.land("c.parquet", done.rows(220, 300))
    run(done.workspace())
    assert status_of(task_file)["generation"] == 2
    rows = json.loads(call("diff", 1, 2, task_file, "--json")[1])
    assert {row["strategy"] for row in rows} >= {"random", "itl", "skmm", "bads", "gradmatch"}
    for row in rows:
        sets = [set(row[name]) for name in ("kept", "added", "dropped")]
        assert not sets[0] & sets[1] and not sets[0] & sets[2]
        if row["strategy"] in ("itl", "skmm", "random"):
            assert len(sets[0] | sets[1]) == len(sets[0] | sets[2]) == row["budget"]
    warehouse = Warehouse(done.home / "warehouse.duckdb")
    warehouse.initialise()
    warehouse.publish_views(tables(done.home))
    for model in load_models(SQL):
        warehouse.build(model.name, model.text, {})
    with warehouse.connect(read_only=True) as connection:
        found = connection.execute(
            "select strategy, budget, seed, kept, added, dropped from churn where generation = 2"
        ).fetchall()
    assert {row[:3]: row[3:] for row in found} == {
        (row["strategy"], row["budget"], row["seed"]): tuple(
            len(row[name]) for name in ("kept", "added", "dropped")
        )
        for row in rows
    }
    code, _, error = call("diff", 1, 7, task_file)
    assert code == 1 and "no generation 7; there are 1, 2" in error


def status_of(task_file: Any) -> Any:
    return json.loads(call("status", task_file, "--json")[1])
