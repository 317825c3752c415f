import random
import re
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsel_assets.resources.warehouse import SOURCES, Warehouse
from dsel_assets.sql import SqlError, lineage, load_checks, load_models, sql_assets

FOLDER = Path(__file__).parents[1] / "dbt_like_sql"
MODELS = {model.name: model for model in load_models(FOLDER)}
CHECKS = {check.name: check for check in load_checks(FOLDER / "checks")}

# --- reading files ---------------------------------------------------------------------------


def write(folder, **files):
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.sql"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def model_of(folder, text):
    (model,) = load_models(write(folder, marts__m=text))
    return model


def test_name_description_and_text(tmp_path):
    model = model_of(
        tmp_path, "-- What it is.\n-- How to read it.\nselect 1 as a -- one\n; -- end\n"
    )
    assert (model.name, model.path) == ("m", tmp_path / "marts" / "m.sql")
    assert model.description == "What it is.\nHow to read it."
    assert model.text == "-- What it is.\n-- How to read it.\nselect 1 as a"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 1),
        ("-- only a comment", 1),
        ("-- a\ncreate table x as select 1", 2),
        ("insert into x values (1)", 1),
        ("\n\ncopy x to 'y.csv'", 3),
        ("attach 'other.duckdb'", 1),
        ("set threads = 1", 1),
        ("pivot x on a using sum(b)", 1),
        ("select 1;\n\nselect 2", 3),
        ("select 1;\ndrop table x", 2),
        ("select 1\nfrom where", 2),
    ],
)
def test_anything_but_one_select_is_refused_with_file_and_line(tmp_path, text, line):
    with pytest.raises(SqlError, match=rf"^{re.escape(str(tmp_path))}/marts/m\.sql:{line}: "):
        model_of(tmp_path, text)


@pytest.mark.parametrize("folder", ["marts", "checks"])
def test_an_unclosed_string_is_refused_with_the_file(tmp_path, folder):
    write(tmp_path, **{f"{folder}__m": "select 'a"})
    with pytest.raises(SqlError, match=r"m\.sql"):
        load_models(tmp_path), load_checks(tmp_path / "checks")


@pytest.mark.parametrize("name", ["with-dash", "Upper", "1st"])
def test_a_name_must_be_an_identifier(tmp_path, name):
    with pytest.raises(SqlError, match=f"{name}.sql: the name"):
        load_models(write(tmp_path, **{f"marts__{name}": "select 1"}))


def test_a_name_is_taken_once(tmp_path):
    with pytest.raises(SqlError, match=r"staging/a\.sql: there is a table 'a'"):
        load_models(write(tmp_path, marts__a="select 1", staging__a="select 1"))
    (tmp_path / "staging/a.sql").rename(tmp_path / "staging/pool.sql")
    with pytest.raises(SqlError, match=r"there is a table 'pool'"):
        load_models(tmp_path)


@pytest.mark.parametrize(
    ("text", "upstream"),
    [
        ("select 1 as a", set()),
        ("from pool", {"pool"}),
        ("from main.pool", {"pool"}),
        ("select * from pool p join truth t using (task)", {"pool", "truth"}),
        ("with x as (select * from pool) select * from x", {"pool"}),
        ("with pool as (select * from pool) select * from pool", {"pool"}),
        ("select * from pool union all select * from truth", {"pool", "truth"}),
        ("select (select count(*) from truth) as n from pool", {"pool", "truth"}),
        ("select * from pool p where exists (from truth t where t.row = p.row)", {"pool", "truth"}),
        ("select * from pool semi join truth using (row)", {"pool", "truth"}),
        ("select * from read_parquet('x.parquet'), range(3)", set()),
        ("select * from pool qualify row_number() over (order by row) = 1", {"pool"}),
    ],
)
def test_upstream_tables(tmp_path, text, upstream):
    assert model_of(tmp_path, text).upstream == upstream


@given(st.permutations(list("abcdef")), st.data())
@settings(max_examples=25, deadline=None)
def test_models_come_after_what_they_read(tmp_path_factory, order, data):
    folder = tmp_path_factory.mktemp("models")
    for i, name in enumerate(order):
        reads = data.draw(st.lists(st.sampled_from(order[:i]), unique=True)) if i else []
        text = "select 1 as x" + "".join(f" union all select x from {table}" for table in reads)
        write(folder, **{f"{data.draw(st.sampled_from(['marts', 'staging']))}__{name}": text})
    models = load_models(folder)
    assert sorted(model.name for model in models) == sorted(order)
    seen = set()
    for model in models:
        assert model.upstream <= seen
        seen.add(model.name)


def test_a_circle_is_named(tmp_path):
    write(tmp_path, marts__a="from b", marts__b="from c", staging__c="from a", marts__d="from a")
    with pytest.raises(
        SqlError, match=r"circle: (a -> b -> c -> a|b -> c -> a -> b|c -> a -> b -> c)"
    ):
        load_models(tmp_path)


def test_a_check_names_its_model_and_reads_it(tmp_path):
    text = "-- of: m\n-- No row is negative.\nselect * from m where a < 0"
    (check,) = load_checks(write(tmp_path, no_negative=text))
    assert (check.name, check.of, check.description) == ("no_negative", "m", "No row is negative.")
    with pytest.raises(SqlError, match=r"no_negative\.sql:1: say which model"):
        load_checks(write(tmp_path, no_negative="-- No row.\nselect * from m"))
    with pytest.raises(SqlError, match=r"a check of 'm' that does not read it"):
        load_checks(write(tmp_path, no_negative="-- of: m\nselect * from other"))


BETWEEN = [" ", "\n", "\t", " -- a note, 'quoted'\n", " /* a; note */ ", "\n\n  "]
WORD = re.compile(r"\S+ (?:by|join|all)\b|\S+")  # sqlglot takes no comment inside `order by`


@pytest.mark.parametrize("name", MODELS)
@given(seed=st.integers(0), upper=st.booleans())
@settings(max_examples=5, deadline=None)
def test_layout_and_comments_do_not_change_the_code_version(tmp_path_factory, name, seed, upper):
    draw = random.Random(seed)
    query = " ".join(re.sub(r"--[^\n]*", "", MODELS[name].text).split())
    text = "".join(word + draw.choice(BETWEEN) for word in WORD.findall(query))
    if upper:
        text = re.sub(r"\b(select|from|join|where|group by|as)\b", lambda m: m[0].upper(), text)
    model = model_of(tmp_path_factory.mktemp("m"), f"-- Another description.\n{text};")
    assert model.code_version == MODELS[name].code_version


def test_another_query_has_another_code_version(tmp_path):
    texts = [
        "select 1 as a",
        "select 2 as a",
        "select 1 as b",
        "select 1 as a from pool",
        "select 1.0 as a",
    ]
    assert len({model_of(tmp_path, text).code_version for text in texts}) == len(texts)


# --- lineage ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("select label + row as x from pool", {"x": ["pool.label", "pool.row"]}),
        ("with c as (select label as y from pool) select y as x from c", {"x": ["pool.label"]}),
        ("select count(*) as n, 1 as one from pool", {"n": [], "one": []}),
        (
            "select label as x from pool union all select row from truth",
            {"x": ["pool.label", "truth.row"]},
        ),
        ("select x from read_parquet('x.parquet') as r(x)", {"x": []}),
        ("select * from generations", {c: [f"generations.{c}"] for c in SOURCES["generations"]}),
        (
            "select min(norm) over (partition by task) as m from gradients",
            {"m": ["gradients.norm", "gradients.task"]},
        ),
        (
            "select p.label as a, t.true_label as b from pool p join truth t using (task)",
            {"a": ["pool.label"], "b": ["truth.true_label"]},
        ),
    ],
)
def test_lineage(tmp_path, text, expected):
    found = lineage(model_of(tmp_path, text), SOURCES)
    assert {c: [f"{t}.{s}" for t, s in pairs] for c, pairs in found.items()} == expected


def test_lineage_names_the_file_of_an_unknown_column(tmp_path):
    with pytest.raises(SqlError, match=r"m\.sql.*nonsense"):
        lineage(model_of(tmp_path, "select p.nonsense, t.row from pool p, truth t"), SOURCES)


# --- a small warehouse -----------------------------------------------------------------------

POOL = {  # arrival: (example, label, label_name, source) in the order of rows
    "a1": [
        ("e1", 0, "zero", "A"),
        ("e2", 1, "one", "A"),
        ("e3", 0, "zero", "A"),
        ("e4", 1, "one", "A"),
    ],
    "a2": [("e5", 0, "zero", "B"), ("e6", 1, "one", "B"), ("e1", 0, "zero", "B")],
    "a3": [("e7", 1, "one", "C")],  # held back: in no generation
}
SELECTED = {
    "r20": "12", "r21": "35", "r40": "1234", "r41": "3456",
    "i2": "34", "i4": "3416", "all": "123456", "none": "",
}  # fmt: skip
CELLS = [  # strategy, budget, seed, selection, test accuracy, seconds of selecting and of training
    ("random", 2, 0, "r20", 0.5, 0.0, 10.0),
    ("random", 2, 1, "r21", 0.7, 0.0, 10.0),
    ("random", 4, 0, "r40", 0.6, 0.0, 10.0),
    ("random", 4, 1, "r41", 0.8, 0.0, 10.0),
    ("itl", 2, 0, "i2", 0.8, 2.0, 9.0),
    ("itl", 2, 1, "i2", 0.8, 2.0, 11.0),
    ("itl", 4, 0, "i4", 0.9, 3.0, 10.0),
    ("itl", 4, 1, "i4", 0.7, 3.0, 10.0),
    *(("full", budget, seed, "all", 0.9, 0.0, 20.0) for budget in (2, 4) for seed in (0, 1)),
    *(("target_only", budget, seed, "none", 0.4, 0.0, 5.0) for budget in (2, 4) for seed in (0, 1)),
]
SCORES = [
    f"{split}_{score}"
    for split in ("validation", "test")
    for score in ("accuracy", "macro_f1", "loss", "calibration_error")
]


def tables(task="t"):
    arrivals = [a for a in POOL for _ in POOL[a]]
    numbers = [i for a in POOL for i in range(1, len(POOL[a]) + 1)]
    examples = [row for a in POOL for row in POOL[a]]
    flaws = {"e2": "flipped", "e4": "duplicate", "e5": "off_task"}
    own = [a in ("a1", "a2") for a in arrivals]
    chosen = [(s, f"e{e}", rank) for s, ids in SELECTED.items() for rank, e in enumerate(ids, 1)]
    compared = [
        (strategy, budget, split, better)
        for strategy, better in (("itl", 1), ("full", 1), ("target_only", -1))
        for budget in (2, 4)
        for split in ("validation", "test")
    ]
    return {
        "generations": {
            "generation": [1, 1, 2],
            "position": [0, 1, 0],
            "arrival": ["a1", "a2", "a1"],
            "pool": ["p-a1", "p-a2", "p-a1"],
            "gradients": ["g-a1", "g-a2", "g-a1"],
        },
        "gradients": {
            "artifact": [f"g-{a}" for a in arrivals],
            "example_id": [e[0] for e in examples],
            "loss": [1.0] * len(examples),
            "norm": [1.0] * len(examples),
        },
        "pool": {
            "arrival": arrivals,
            "artifact": [f"p-{a}" for a in arrivals],
            "example_id": [e[0] for e in examples],
            "row": numbers,
            "label": [e[1] for e in examples],
            "label_name": [e[2] for e in examples],
            "source": [e[3] for e in examples],
            "content_digest": [e[0] for e in examples],
            "cost": [None] * len(examples),
        },
        "truth": {
            "arrival": [a for a, known in zip(arrivals, own, strict=True) if known],
            "row": [n for n, known in zip(numbers, own, strict=True) if known],
            "true_label": [0] * sum(own),
            "flipped": [flaws.get(e[0]) == "flipped" for e in examples[: sum(own)]],
            "duplicate_of": pa.array(
                [3 if flaws.get(e[0]) == "duplicate" else None for e in examples[: sum(own)]],
                pa.int64(),
            ),
            "off_task": [flaws.get(e[0]) == "off_task" for e in examples[: sum(own)]],
        },
        "selected": {
            "selection": [f"{task}-{c[0]}" for c in chosen],
            "example_id": [c[1] for c in chosen],
            "weight": [1.0] * len(chosen),
            "rank": [c[2] for c in chosen],
            "gain": [0.5] * len(chosen),
        },
        "cells": {
            "generation": [1] * len(CELLS),
            "strategy": [c[0] for c in CELLS],
            "budget": [c[1] for c in CELLS],
            "seed": [c[2] for c in CELLS],
            "selection": [f"{task}-{c[3]}" for c in CELLS],
            "checkpoint": ["c"] * len(CELLS),
            "metric": ["m"] * len(CELLS),
            "chosen": [len(SELECTED[c[3]]) for c in CELLS],
            "whole": [c[0] in ("full", "target_only") for c in CELLS],
            "stopped": [False] * len(CELLS),
            "budget_in": ["examples"] * len(CELLS),
            "cost": [None] * len(CELLS),
            "aim": [""] * len(CELLS),
            "objective": [None] * len(CELLS),
            "objective_before": [None] * len(CELLS),
            "select_seconds": [c[5] for c in CELLS],
            "sketch_seconds": [4.0 if c[0] == "itl" else 0.0 for c in CELLS],
            "train_seconds": [c[6] for c in CELLS],
        }
        | {name: [0.1] * len(CELLS) for name in SCORES}
        | {"test_accuracy": [c[4] for c in CELLS]},
        "comparisons": {
            "generation": [1] * len(compared),
            "strategy": [c[0] for c in compared],
            "budget": [c[1] for c in compared],
            "split": [c[2] for c in compared],
            "metric": ["accuracy"] * len(compared),
            "confidence": [0.95] * len(compared),
            "diff": [0.2 * c[3] for c in compared],
            "diff_low": [0.2 * c[3] - 0.1 for c in compared],
            "diff_high": [0.2 * c[3] + 0.1 for c in compared],
            "p": [0.01] * len(compared),
            "p_holm": [0.03] * len(compared),
            "corrected": [c[1] == 2 for c in compared],
            "verdict": [
                "no difference shown" if c[2] == "validation" else "better" if c[3] > 0 else "worse"
                for c in compared
            ],
        },
    }


def publish(folder, *tasks, leave_out=()):
    """A warehouse over the tables of these tasks, views only."""
    warehouse = Warehouse(folder / "warehouse.duckdb")
    warehouse.initialise()
    files = {}
    for task in tasks:
        for view, columns in tables(task).items():
            rows = len(next(iter(columns.values())))
            path = folder / "store" / task / f"{view}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"task": [task] * rows} | columns), path)
            files.setdefault(view, []).append(path)
    warehouse.publish_views({view: paths for view, paths in files.items() if view not in leave_out})
    return warehouse


def build(warehouse):
    built = {}
    for model in MODELS.values():
        checks = {c.name: c.text for c in CHECKS.values() if c.of == model.name}
        built[model.name] = warehouse.build(model.name, model.text, checks)
    return built


def failed(built):
    return {check for b in built.values() for check, found in b.violations.items() if found.count}


def query(warehouse, text):
    with warehouse.connect(read_only=True) as connection:
        return connection.execute(text).fetchall()


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory):
    made = publish(tmp_path_factory.mktemp("warehouse"), "t")
    assert failed(build(made)) == set()
    return made


def test_every_model_and_check_runs_on_an_empty_warehouse(tmp_path):
    empty = Warehouse(tmp_path / "warehouse.duckdb")
    empty.initialise()
    built = build(empty)
    assert len(built) == 9
    assert failed(built) == set()
    assert all(b.table.count == 0 and b.table.columns for b in built.values())


def test_types_do_not_depend_on_there_being_rows(tmp_path, warehouse):
    empty = Warehouse(tmp_path / "warehouse.duckdb")
    empty.initialise()
    build(empty)
    full = warehouse.schemas()
    for name in MODELS:
        assert empty.schemas()[name] == full[name]


def test_lineage_of_the_models(warehouse):
    schemas = warehouse.schemas()
    for model in MODELS.values():
        found = lineage(model, schemas)
        assert list(found) == list(schemas[model.name])
        assert {table for pairs in found.values() for table, _ in pairs} <= model.upstream
        assert all(column in schemas[table] for pairs in found.values() for table, column in pairs)
    board = lineage(MODELS["leaderboard"], schemas)
    assert board["mean"] == [("cells", "test_accuracy")]
    assert board["diff"] == [("comparisons", "diff")]


def test_every_file_says_what_it_is():
    assert all(query.description for query in [*MODELS.values(), *CHECKS.values()])


def test_candidates_are_the_compared_generations_pool(warehouse):
    found = query(warehouse, "select generation, example_id, arrival, row, source from candidates")
    assert found == [
        (1, f"e{i + 1}", "a1" if i < 4 else "a2", i + 1 if i < 4 else i - 3, "A" if i < 4 else "B")
        for i in range(6)
    ]


def test_chosen_holds_a_selection_once(warehouse):
    found = query(warehouse, "select count(*), count(distinct selection) from chosen")
    assert found == [(sum(map(len, SELECTED.values())), len(SELECTED) - 1)]
    found = query(
        warehouse,
        "select example_id, arrival, label_name, rank from chosen where selection = 't-i4'",
    )
    assert found == [
        ("e3", "a1", "zero", 1),
        ("e4", "a1", "one", 2),
        ("e1", "a1", "zero", 3),
        ("e6", "a2", "one", 4),
    ]


def test_leaderboard_by_hand(warehouse):
    columns = (
        "strategy, seeds, metric, mean, diff, diff_low, diff_high, verdict, validation_verdict, "
        "select_seconds, train_seconds"
    )
    found = query(warehouse, f"select {columns} from leaderboard where budget = 2")
    undecided = "no difference shown"
    expected = [
        ("full", 2, "accuracy", 0.9, 0.2, 0.1, 0.3, "better", undecided, 0.0, 20.0),
        ("itl", 2, "accuracy", 0.8, 0.2, 0.1, 0.3, "better", undecided, 2.0, 10.0),
        ("random", 2, "accuracy", 0.6, None, None, None, "baseline", "baseline", 0.0, 10.0),
        ("target_only", 2, "accuracy", 0.4, -0.2, -0.3, -0.1, "worse", undecided, 0.0, 5.0),
    ]
    for row, by_hand in zip(found, expected, strict=True):
        numbers = [(a, b) for a, b in zip(row, by_hand, strict=True) if isinstance(b, float)]
        assert all(a == pytest.approx(b) for a, b in numbers)
        assert [a for a in row if not isinstance(a, float)] == [
            b for b in by_hand if not isinstance(b, float)
        ]


def test_budget_curve_by_hand(warehouse):
    columns = "strategy, budget, seeds, mean, sd, min, max"
    found = {
        row[:2]: row[2:]
        for row in query(warehouse, f"select {columns} from budget_curve where metric = 'accuracy'")
    }
    assert found["random", 2] == pytest.approx((2, 0.6, 0.02**0.5, 0.5, 0.7))
    assert found["itl", 4] == pytest.approx((2, 0.8, 0.02**0.5, 0.7, 0.9))
    assert found["full", 4] == pytest.approx((2, 0.9, 0.0, 0.9, 0.9))
    assert query(warehouse, "select distinct mean from budget_curve where metric = 'macro_f1'") == [
        (0.1,)
    ]


def test_overlap_by_hand(warehouse):
    columns = "budget, seed, chosen, other_chosen, shared, jaccard"
    found = query(warehouse, f"select {columns} from overlap where strategy = 'itl'")
    assert found == [
        (2, 0, 2, 2, 0, 0.0),
        (2, 1, 2, 2, 1, pytest.approx(1 / 3)),
        (4, 0, 4, 4, 3, 0.6),
        (4, 1, 4, 4, 3, 0.6),
    ]
    assert query(warehouse, "select count(*) from overlap") == [(8,)]


def test_caught_by_hand(warehouse):
    columns = "strategy, known, flipped, near_duplicate, repeated, off_task"
    found = {
        r[0]: r[1:] for r in query(warehouse, f"select {columns} from caught where budget = 2")
    }
    assert found == {
        "random": (2, 0.25, 0.0, 0.0, 0.25),
        "itl": (2, 0.0, 0.5, 0.5, 0.0),
        "full": pytest.approx((6, 1 / 6, 1 / 6, 1 / 6, 1 / 6)),
    }
    pool = "distinct pool_flipped, pool_near_duplicate, pool_off_task"
    assert query(warehouse, f"select {pool} from caught") == [pytest.approx((1 / 6, 1 / 6, 1 / 6))]


def test_caught_knows_nothing_without_truth(tmp_path):
    ignorant = publish(tmp_path, "t", leave_out=["truth"])
    assert failed(build(ignorant)) == set()
    assert query(ignorant, "from caught") == []


def test_coverage_by_hand(warehouse):
    found = query(
        warehouse,
        "select strategy, dimension, value, share, pool_share from coverage where budget = 2",
    )
    shares = {row[:3]: row[3:] for row in found}
    assert len(shares) == 3 * 4  # nothing of target_only, which chooses nothing
    assert shares["random", "class", "zero"] == (0.75, 0.5)
    assert shares["random", "source", "A"] == (0.75, pytest.approx(2 / 3))
    assert shares["itl", "source", "B"] == (0.0, pytest.approx(1 / 3))
    assert all(
        share == pytest.approx(pool) for (s, *_), (share, pool) in shares.items() if s == "full"
    )


def test_cost_by_hand(warehouse):
    found = query(warehouse, "select strategy, chosen, ratio_to_full from cost where budget = 2")
    assert found == [
        ("full", 6, 1.0),
        ("itl", 2, 0.6),
        ("random", 2, 0.5),
        ("target_only", 0, 0.25),
    ]


def test_another_task_changes_nothing(tmp_path, warehouse):
    two = publish(tmp_path, "t", "u")
    assert failed(build(two)) == set()
    for name in MODELS:
        alone = query(warehouse, f"from {name}")
        assert query(two, f"from {name} where task = 't'") == alone
        assert query(two, f"select count(*) from {name}") == [(2 * len(alone),)]


# --- checks ----------------------------------------------------------------------------------

DOCTORED = {  # check -> what is done to the table that it is about
    "budget_curve_range": "update budget_curve set mean = max + 0.1 where budget = 2",
    "budget_curve_unique": "insert into budget_curve select * from budget_curve limit 1",
    "caught_shares": "update caught set flipped = 1.5 where strategy = 'itl'",
    "chosen_fits_budget": "delete from chosen where selection = 't-i4' and rank = 4",
    "chosen_in_pool": "update chosen set example_id = 'e7' where selection = 't-r20' and rank = 1",
    "chosen_unique": "insert into chosen select * from chosen limit 1",
    "cost_positive": "update cost set select_seconds = -1 where strategy = 'itl'",
    "churn_adds_up": "insert into churn values ('t', 2, 1, 'itl', 2, 0, 1, 1, 1, '', null, null)",
    "coverage_shares": "delete from coverage where value = 'zero' and strategy = 'itl'",
    "leaderboard_beside_random": "delete from leaderboard where strategy = 'random' and budget = 4",
    "leaderboard_cells_once": "update leaderboard set seeds = 1 where strategy = 'itl'",
    "leaderboard_equal_seeds": "update leaderboard set seeds = 1 where strategy = 'random'",
    "leaderboard_interval": "update leaderboard set diff_low = 0.25 where strategy = 'itl'",
    "leaderboard_unique": "insert into leaderboard select * from leaderboard limit 1",
    "overlap_range": "update overlap set jaccard = 1.2 where budget = 2",
    "overlap_symmetric": "delete from overlap where strategy = 'itl' and seed = 0",
}


def test_every_check_is_doctored_below():
    assert DOCTORED.keys() == CHECKS.keys()
    assert {check.of for check in CHECKS.values()} == MODELS.keys() - {"candidates"}


@pytest.mark.parametrize("name", CHECKS)
def test_a_check_passes_and_fails_on_doctored_rows(warehouse, name):
    with warehouse.connect() as connection:
        assert connection.execute(CHECKS[name].text).fetchall() == []
        connection.begin()
        connection.execute(DOCTORED[name])
        assert connection.execute(CHECKS[name].text).fetchall() != []
        connection.rollback()


def only(columns, **kept):
    """The rows of a table whose columns hold one of these values."""
    table = pa.table(columns)
    for name, values in kept.items():
        table = table.filter(pc.is_in(table[name], pa.array(values)))
    return dict(zip(table.column_names, table.columns, strict=True))


def again(columns, row):
    """The table with one of its rows once more."""
    return {name: [*values, values[row]] for name, values in columns.items()}


def first(columns, **values):
    """The table with these values in its first row."""
    return columns | {name: [value, *columns[name][1:]] for name, value in values.items()}


@pytest.mark.parametrize(
    ("view", "change", "check"),
    [
        ("selected", lambda t: first(t, example_id="e7"), "chosen_in_pool"),
        ("selected", lambda t: first(t, example_id="e2"), "chosen_unique"),
        ("selected", lambda t: only(t, rank=[1, 2, 3]), "chosen_fits_budget"),
        ("cells", lambda t: again(t, 0), "leaderboard_cells_once"),
        ("cells", lambda t: only(t, train_seconds=[10.0, 20, 5, 9]), "leaderboard_equal_seeds"),
        ("cells", lambda t: only(t, strategy=["itl", "full"]), "leaderboard_beside_random"),
        ("cells", lambda t: only(t, strategy=["itl", "random"]), "cost_positive"),
        ("cells", lambda t: first(t, test_accuracy=1.5), "budget_curve_range"),
        ("comparisons", lambda t: again(t, 1), "leaderboard_unique"),
        ("comparisons", lambda t: first(t, diff=9.0, split="test"), "leaderboard_interval"),
        ("comparisons", lambda t: only(t, split=["test"]), "leaderboard_interval"),
    ],
)
def test_bad_files_are_caught_and_the_old_table_stays(tmp_path, view, change, check):
    warehouse = publish(tmp_path, "t")
    build(warehouse)
    table = CHECKS[check].of
    before = query(warehouse, f"from {table}")
    columns = change(tables("t")[view])
    rows = len(next(iter(columns.values())))
    pq.write_table(pa.table({"task": ["t"] * rows} | columns), tmp_path / "bad.parquet")
    warehouse.publish_views({view: [tmp_path / "bad.parquet"]})
    assert check in failed(build(warehouse))
    assert query(warehouse, f"from {table}") == before


# --- assets ----------------------------------------------------------------------------------

KEYS = {view: dg.AssetKey(["t", f"{view}_file"]) for view in SOURCES}


def assets():
    return sql_assets("t", list(MODELS.values()), list(CHECKS.values()), KEYS)


def materialize(warehouse):
    return dg.materialize(assets(), resources={"warehouse": warehouse}, raise_on_error=False)


def test_assets_carry_keys_versions_deps_and_checks():
    specs = {asset.key.path[1]: asset for asset in assets()}
    assert specs.keys() == MODELS.keys()
    board = specs["leaderboard"]
    (spec,) = board.specs
    assert spec.key == dg.AssetKey(["t", "leaderboard"])
    assert (spec.group_name, spec.kinds) == ("comparison", {"duckdb", "sql"})
    assert spec.code_version == MODELS["leaderboard"].code_version
    assert {dep.asset_key for dep in spec.deps} == {KEYS["cells"], KEYS["comparisons"]}
    assert spec.description.startswith("What each strategy scored")
    assert "```sql\n-- What each" in spec.description
    (reference,) = spec.metadata["dagster/code_references"].code_references
    assert Path(reference.file_path) == FOLDER / "marts" / "leaderboard.sql"
    assert {c.name for c in board.check_specs} == {n for n in CHECKS if n.startswith("leaderboard")}
    assert all(check.blocking for check in board.check_specs)
    assert board.op.pool == "warehouse"
    overlap = {dep.asset_key for dep in next(iter(specs["overlap"].specs)).deps}
    assert overlap == {dg.AssetKey(["t", "chosen"]), KEYS["cells"]}


def test_two_tasks_stand_side_by_side():
    both = [*assets(), *sql_assets("u", list(MODELS.values()), list(CHECKS.values()), KEYS)]
    dg.Definitions.validate_loadable(
        dg.Definitions(assets=both, resources={"warehouse": Warehouse(Path("w"))})
    )


def test_materialising_publishes_and_reports(tmp_path):
    warehouse = publish(tmp_path, "t")
    result = materialize(warehouse)
    assert result.success
    assert all(evaluation.passed for evaluation in result.get_asset_check_evaluations())
    assert len(result.get_asset_check_evaluations()) == len(CHECKS)
    (event,) = result.asset_materializations_for_node("t__leaderboard")
    metadata = event.metadata
    assert metadata["dagster/row_count"].value == 8
    columns = {c.name: c.type for c in metadata["dagster/column_schema"].value.columns}
    assert columns == warehouse.schemas()["leaderboard"]
    deps = metadata["dagster/column_lineage"].value.deps_by_column
    assert deps["mean"] == [dg.TableColumnDep(KEYS["cells"], "test_accuracy")]
    (header, rule, first, *rest) = metadata["preview"].value.splitlines()
    assert header.startswith("| task | generation | strategy |")
    assert first.startswith("| t | 1 | full | 2 | 2 | accuracy | 0.9 |")
    assert {line.count("|") for line in (header, rule, first, *rest)} == {len(columns) + 1}


def test_a_failing_check_fails_the_asset_and_keeps_the_table(tmp_path):
    warehouse = publish(tmp_path, "t")
    assert materialize(warehouse).success
    before = query(warehouse, "from leaderboard")
    warehouse.publish_views({"cells": [tmp_path / "store" / "t" / "cells.parquet"] * 2})
    result = materialize(warehouse)
    assert not result.success
    assert query(warehouse, "from leaderboard") == before
    assert result.asset_materializations_for_node("t__leaderboard") == []
    evaluations = {e.check_name: e for e in result.get_asset_check_evaluations()}
    found = evaluations["leaderboard_cells_once"]
    assert not found.passed
    assert found.metadata["violations"].value == 8
    assert found.metadata["examples"].value.startswith("| task | generation | strategy |")
    assert evaluations["leaderboard_unique"].passed
    message = result.failure_data_for_node("t__leaderboard").error.to_string()
    assert "leaderboard was not published" in message and "leaderboard_cells_once" in message
    assert result.asset_materializations_for_node("t__cost")


def test_a_failing_check_stops_what_is_downstream(tmp_path):
    warehouse = publish(tmp_path, "t")
    warehouse.publish_views({"selected": []})
    result = materialize(warehouse)
    assert not result.success
    assert result.asset_materializations_for_node("t__candidates")
    for name in ("chosen", "overlap", "coverage", "caught"):
        assert result.asset_materializations_for_node(f"t__{name}") == []


def test_a_table_that_nobody_makes_is_named(tmp_path):
    model = model_of(tmp_path, "from nowhere")
    with pytest.raises(SqlError, match=r"m\.sql: 'nowhere' is not among arrivals"):
        sql_assets("t", [model], [], KEYS)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        ("-- of: gone\nfrom gone", "'gone' is not among"),
        ("-- of: a\nfrom a, b", "'b' is not among a"),
    ],
)
def test_a_check_reads_only_what_is_built_by_then(tmp_path, check, message):
    write(tmp_path, marts__a="select 1 as x", marts__b="select 2 as x", checks__c=check)
    with pytest.raises(SqlError, match=f"c.sql: {message}"):
        sql_assets("t", load_models(tmp_path), load_checks(tmp_path / "checks"), {})


def test_the_code_location_stays_light():
    heavy = "import sys, dsel_assets.sql; print({'duckdb', 'pandas', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    assert "Warning" not in done.stderr
