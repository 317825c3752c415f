import subprocess
import sys
import time
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsel_assets.resources.warehouse import SOURCES, Warehouse, WarehouseError

HOLD = """
import sys, time
from pathlib import Path
from dsel_assets.resources.warehouse import Warehouse
with Warehouse(Path(sys.argv[1])).connect() as connection:
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def warehouse(tmp_path):
    made = Warehouse(tmp_path / "home" / "warehouse.duckdb", wait=20)
    made.initialise()
    return made


def rows(warehouse, query):
    with warehouse.connect(read_only=True) as connection:
        return connection.execute(query).fetchall()


def parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def generations(path, task="t", arrivals=("a",)):
    n = len(arrivals)
    same = {name: ["x"] * n for name in ("pool", "gradients")}
    own = {"generation": [1] * n, "position": list(range(n)), "arrival": list(arrivals)}
    return parquet(path, task=[task] * n, **own, **same)


def test_empty_views_have_the_declared_columns_and_types(warehouse):
    found = {
        view: {column: kind.lower() for column, kind in columns.items()}
        for view, columns in warehouse.schemas().items()
    }
    assert found == SOURCES
    assert all(rows(warehouse, f"select count(*) from {view}") == [(0,)] for view in SOURCES)


def test_publishing_no_files_gives_the_same_empty_view(warehouse, tmp_path):
    before = warehouse.schemas()
    warehouse.publish_views({"generations": [generations(tmp_path / "g.parquet")]})
    warehouse.publish_views({"generations": []})
    assert warehouse.schemas() == before


def test_initialise_again_keeps_what_is_published(warehouse, tmp_path):
    warehouse.publish_views({"generations": [generations(tmp_path / "g.parquet")]})
    warehouse.initialise()
    assert rows(warehouse, "select task, generation, arrival from generations") == [("t", 1, "a")]


def test_paths_are_taken_literally(warehouse, tmp_path):
    odd = [
        generations(tmp_path / folder / "g.parquet", arrivals=[folder])
        for folder in ("it's", 'say "x"', "a*[b]?", "task=other", "x'); drop view pool; --", "ü b")
    ]
    warehouse.publish_views({"generations": odd})
    assert sorted(rows(warehouse, "select task, generation, arrival from generations")) == sorted(
        ("t", 1, path.parent.name) for path in odd
    )
    assert rows(warehouse, "select count(*) from pool") == [(0,)]


def test_files_are_joined_by_column_name_and_further_columns_follow(warehouse, tmp_path):
    same = {"task": ["t"], "selection": ["s"], "example_id": ["e"]}
    files = [
        parquet(tmp_path / "1.parquet", **same, weight=[1.0], rank=[1], gain=[0.5]),
        parquet(tmp_path / "2.parquet", rank=pa.array([2], pa.int32()), weight=[2.0], **same),
        parquet(tmp_path / "3.parquet", **same, weight=[3], rank=[3], probability=[0.25]),
    ]
    warehouse.publish_views({"selected": files})
    names = [*SOURCES["selected"], "gain", "probability"]
    assert list(warehouse.schemas()["selected"]) == names
    assert rows(warehouse, "from selected order by rank") == [
        ("t", "s", "e", 1.0, 1, 0.5, None),
        ("t", "s", "e", 2.0, 2, None, None),
        ("t", "s", "e", 3.0, 3, None, 0.25),
    ]


def test_many_files(warehouse, tmp_path):
    one = generations(tmp_path / "g.parquet")
    warehouse.publish_views({"generations": [one] * 5000})
    assert rows(warehouse, "select count(*) from generations") == [(5000,)]


@pytest.mark.parametrize(
    ("view", "make", "message"),
    [
        ("nothing", lambda folder: [], "no view 'nothing'; there are arrivals, generations"),
        ("pool", lambda folder: [folder / "gone.parquet"], "view pool: .*gone.parquet"),
        ("generations", lambda f: [parquet(f / "g.parquet", task=["t"])], "view generations: "),
    ],
)
def test_a_bad_view_is_named_and_none_is_replaced(warehouse, tmp_path, view, make, message):
    good = generations(tmp_path / "good.parquet")
    with pytest.raises(WarehouseError, match=message):
        warehouse.publish_views({"generations": [good]} | {view: make(tmp_path)})
    assert rows(warehouse, "select task, generation, arrival from generations") == []


def test_a_table_is_published_when_its_checks_pass(warehouse):
    built = warehouse.build(
        "t", "select 1 as a, 'x' as b", {"positive": "select * from t where a < 0"}
    )
    assert built.published
    assert built.table.count == 1
    assert built.table.columns == {"a": "INTEGER", "b": "VARCHAR"}
    assert built.table.rows == [(1, "x")]
    assert built.violations["positive"].count == 0
    assert rows(warehouse, "from t") == [(1, "x")]


def test_a_failing_check_leaves_the_old_table_and_nothing_else(warehouse):
    checks = {"few": "select range from t where range >= 3", "fine": "select * from t where false"}
    assert warehouse.build("t", "from range(3)", checks).published
    before = warehouse.schemas()
    built = warehouse.build("t", "select range, 1 as other from range(50)", checks)
    assert not built.published
    assert built.violations["few"].count == 47
    assert built.violations["few"].rows[0] == (3,)
    assert len(built.violations["few"].rows) == 10
    assert built.violations["fine"].count == 0
    assert warehouse.schemas() == before
    assert rows(warehouse, "from t") == [(0,), (1,), (2,)]


def test_the_first_table_is_not_there_when_its_check_fails(warehouse):
    warehouse.build("t", "select 1 as a", {"never": "from t"})
    assert "t" not in warehouse.schemas()


@pytest.mark.parametrize(
    ("query", "check", "message"),
    [
        ("select zz from pool", "from t", "t: .*zz"),
        ("select 1 as a", "select zz from t", "rule: .*zz"),
    ],
)
def test_an_error_names_the_query_and_leaves_the_old_table(warehouse, query, check, message):
    warehouse.build("t", "select 7 as a", {})
    with pytest.raises(WarehouseError, match=message):
        warehouse.build("t", query, {"rule": check})
    assert rows(warehouse, "from t") == [(7,)]


def test_uncommitted_work_is_undone_when_the_block_fails(warehouse):
    with pytest.raises(ZeroDivisionError), warehouse.connect() as connection:
        connection.begin()
        connection.execute("create table t as select 1 as a")
        raise ZeroDivisionError
    assert "t" not in warehouse.schemas()


@pytest.fixture
def hold(warehouse):
    holders = []

    def start(seconds):
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(warehouse.path), str(seconds)],
            stdout=subprocess.PIPE,
            text=True,
        )
        holders.append(holder)
        assert holder.stdout.readline() == "held\n"
        return holder

    yield start
    for holder in holders:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_second_process_waits_for_the_first(warehouse, hold):
    holder = hold(1.0)
    start = time.monotonic()
    assert warehouse.build("t", "select 1 as a", {}).published
    assert time.monotonic() - start > 0.3
    assert holder.wait(10) == 0


def test_who_holds_the_file_is_named_when_waiting_was_in_vain(warehouse, hold):
    holder = hold(60)
    impatient = Warehouse(warehouse.path, wait=0.2)
    for read_only in (False, True):
        with (
            pytest.raises(WarehouseError, match=f"in use for 0.2 s.*PID {holder.pid}"),
            impatient.connect(read_only),
        ):
            pass


def test_readers_in_this_process_wait_for_its_writer(warehouse):
    with (
        warehouse.connect(),
        pytest.raises(WarehouseError, match="in use"),
        Warehouse(warehouse.path, wait=0.1).connect(read_only=True),
    ):
        pass


def test_a_file_that_is_no_database_is_an_error_at_once(tmp_path):
    path = tmp_path / "w.duckdb"
    path.write_bytes(b"no database at all" * 1000)
    with pytest.raises(WarehouseError, match="not a valid DuckDB"):
        Warehouse(path).initialise()


def test_a_person_can_read_the_file_with_plain_duckdb(warehouse, tmp_path):
    warehouse.publish_views({"generations": [generations(Path(tmp_path) / "g.parquet")]})
    with duckdb.connect(str(warehouse.path), read_only=True) as connection:
        assert connection.execute("select arrival from generations").fetchall() == [("a",)]
