from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from dsel_assets.build import build
from dsel_assets.runner import resources

ROOT = Path(__file__).parents[2]
SQL = ROOT / "dbt_like_sql"

# asset: (group, kinds, partitions, what it depends on)
ASSETS = {
    "target": ("arrivals", "parquet", None, ""),
    "base_model": ("arrivals", "pytorch", None, ""),
    "pool": ("arrivals", "parquet", "arrivals", "target"),
    "gradients": ("gradients", "parquet pytorch", "arrivals", "base_model pool"),
    "sketches": ("gradients", "pytorch", "arrivals", "base_model pool"),
    "hessian_spectrum": ("gradients", "pytorch", None, "base_model pool"),
    "finetuning_spectra": ("gradients", "pytorch", "steps", "hessian_spectrum"),
    "intrinsic_dimension": ("gradients", "pytorch", None, "hessian_spectrum target"),
    "subsets": (
        "selection",
        "parquet pytorch",
        "strategies",
        "base_model settings sketches target",
    ),
    "checkpoints": ("finetuning", "pytorch", "strategies", "base_model subsets target training"),
    "metrics": ("finetuning", "mlflow pytorch", "strategies", "checkpoints target"),
    "verdict": ("comparison", "mlflow python", None, "metrics rule"),
}


def definitions(task: Any) -> dg.Definitions:
    return dg.Definitions.merge(build(task, SQL), dg.Definitions(resources=resources()))


@pytest.fixture
def defs(lab: Any) -> dg.Definitions:
    return definitions(lab.task())


def test_the_code_location_is_valid() -> None:
    import definitions as location

    dg.Definitions.validate_loadable(location.defs)


def test_a_task_is_valid(defs: dg.Definitions) -> None:
    dg.Definitions.validate_loadable(defs)


def test_two_tasks_and_one_without_target_or_schedule(lab: Any) -> None:
    lean = lab.task(
        "lean",
        target=None,
        schedule=None,
        finetune={"include_target": False},
        strategies={"itl": None, "bads": None, "gradmatch": None, "target_only": None},
        sketch={"dim": "auto"},
    )
    both = dg.Definitions.merge(
        build(lab.task(), SQL), build(lean, SQL), dg.Definitions(resources=resources())
    )
    dg.Definitions.validate_loadable(both)


@pytest.mark.parametrize("name", ASSETS)
def test_asset(defs: dg.Definitions, name: str) -> None:
    group, kinds, partitions, deps = ASSETS[name]
    node = defs.resolve_asset_graph().get(dg.AssetKey(["tiny", name]))
    spec = defs.resolve_assets_def(dg.AssetKey(["tiny", name])).get_asset_spec(node.key)
    assert spec.group_name == group
    assert " ".join(sorted(spec.kinds)) == kinds
    assert " ".join(sorted(parent.path[-1] for parent in node.parent_keys)) == deps
    assert {parent.path[0] for parent in node.parent_keys} <= {"tiny"}
    if partitions is None:
        assert node.partitions_def is None
    elif partitions == "arrivals":
        assert isinstance(node.partitions_def, dg.DynamicPartitionsDefinition)
        assert node.partitions_def.name == "tiny_arrivals"
    else:
        assert isinstance(node.partitions_def, dg.StaticPartitionsDefinition)
        strategies = ["random", "full", "target_only", "skmm", "bads", "itl", "gradmatch"]
        assert node.partitions_def.get_partition_keys() == (
            ["0", "10"] if partitions == "steps" else strategies  # of 20 steps of finetuning
        )


def test_every_sql_file_is_an_asset_and_nothing_else_is(defs: dg.Definitions) -> None:
    models = {path.stem for name in ("staging", "marts") for path in (SQL / name).glob("*.sql")}
    graph = defs.resolve_asset_graph()
    assert {key.to_user_string() for key in graph.get_all_asset_keys()} == {
        f"tiny/{name}" for name in ASSETS.keys() | models | {"settings", "training", "rule"}
    }
    for model in models:
        assert graph.get(dg.AssetKey(["tiny", model])).group_name == "comparison"


def test_four_to_six_groups_and_every_asset_says_what_it_is(defs: dg.Definitions) -> None:
    specs = defs.resolve_all_asset_specs()
    assert 4 <= len({spec.group_name for spec in specs}) <= 6
    assert all(spec.description and spec.kinds for spec in specs)


def test_the_dimension_waits_for_the_spectrum_only_where_it_is_asked_to(lab: Any) -> None:
    auto = definitions(lab.task(sketch={"dim": "auto"}))
    sketches = auto.resolve_asset_graph().get(dg.AssetKey(["tiny", "sketches"]))
    assert dg.AssetKey(["tiny", "hessian_spectrum"]) in sketches.parent_keys


def test_blocking_checks(defs: dg.Definitions) -> None:
    graph = defs.resolve_asset_graph()
    blocking = {
        "/".join((*key.asset_key.path[1:], key.name)): graph.get(key).blocking
        for key in graph.asset_check_keys
        if key.asset_key.path[-1] in ASSETS
    }
    assert blocking == {
        "target/apart": True,
        "target/no_near_copies": False,
        "pool/usable": True,
        "pool/no_leaks": False,
        "sketches/keeps_inner_products": True,
        "sketches/fit": True,
        "hessian_spectrum/dimension_is_enough": False,
        "gradients/finite": False,
        "subsets/more_than_chance": False,
        "subsets/covers": False,
        "subsets/weights_hold": False,
        "metrics/complete": True,
        "verdict/champion_holds": False,
    }


def test_jobs(defs: dg.Definitions) -> None:
    found = {
        name: {key.path[-1] for key in defs.resolve_job_def(name).asset_layer.executable_asset_keys}
        for name in ("tiny_ingest", "tiny_select", "tiny_compare")
    }
    assert found["tiny_ingest"] == {
        "target", "base_model", "pool", "gradients", "sketches", "hessian_spectrum",
    }  # fmt: skip
    assert found["tiny_select"] == {"subsets", "checkpoints", "metrics"}
    assert "verdict" in found["tiny_compare"] and "leaderboard" in found["tiny_compare"]
    assert not found["tiny_compare"] & (ASSETS.keys() - {"verdict"})


def test_the_code_location_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("torch", "mlflow", "sklearn", "matplotlib", "duckdb", "scipy", "mlxtend")
    code = f"import sys, definitions; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_below_the_line_nothing_knows_an_orchestrator() -> None:
    line = ("data", "models", "gradients", "sketching", "curvature", "selection", "finetuning")
    files = [path for name in line for path in (ROOT / "dsel_assets" / name).rglob("*.py")]
    files += (ROOT / "dsel_assets" / "evaluation").rglob("*.py")
    for path in files:
        for word in ("import dagster", "from dagster", "import mlflow", "from mlflow"):
            assert word not in path.read_text(), path
