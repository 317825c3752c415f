import gzip
import hashlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dsel_assets.data import UnreadableFileError, file_digest, read_file
from dsel_assets.data import readers as module
from dsel_assets.data.readers import MISSING


def rows_of(path, columns=("a",)):
    return list(read_file(str(path), columns))


def write_parquet(path, n=1000, **options):
    rng = np.random.default_rng(0)
    table = pa.table({"a": rng.normal(size=n), "b": np.arange(n)})
    pq.write_table(table, path, **options)
    return path


def test_parquet_is_read_in_batches_with_row_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_ROWS", 300)
    batches = rows_of(write_parquet(tmp_path / "x.parquet"))
    assert max(len(batch.rows) for batch in batches) <= 300
    assert np.concatenate([b.rows for b in batches]).tolist() == list(range(1, 1001))
    assert all(set(b.columns) == {"a"} and b.extra == ("b",) for b in batches)


def test_batches_of_wide_rows_are_bounded_by_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 100_000)
    rng = np.random.default_rng(0)
    wide = pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=100 * 1000)), 1000)
    pq.write_table(pa.table({"a": wide}), tmp_path / "x.parquet")
    assert max(len(batch.rows) for batch in rows_of(tmp_path / "x.parquet")) <= 13


def test_missing_columns_still_count_the_rows(tmp_path):
    (batch,) = rows_of(write_parquet(tmp_path / "x.parquet"), ["z"])
    assert len(batch.rows) == 1000
    assert batch.columns == {}


def test_jsonl_keeps_good_lines_beside_broken_ones(tmp_path):
    lines = [
        b'\xef\xbb\xbf{"a": 1, "b": 2}',  # a byte order mark
        b"{not json",
        b"[1, 2]",
        b"",
        b'{"a": "caf\xe9"}',  # Latin-1
        b'{"b": 3}\r',
        b"[" * 100_000,
        b'{"a": 1' + b"0" * 5000 + b"}",
        b'{"a": null}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    (batch,) = rows_of(tmp_path / "x.jsonl")
    assert batch.rows.tolist() == [1, 6, 9]
    assert batch.columns["a"] == [1, MISSING, None]
    assert [row for row, _ in batch.broken] == [2, 3, 5, 7, 8]
    assert all(why for _, why in batch.broken)
    assert batch.extra == ("b",)


def test_an_endless_line_is_broken_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 100)
    lines = ["[" + "1," * 500 + "1]", '{"a": 1}', "x" * 350]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    (batch,) = rows_of(tmp_path / "x.jsonl")
    assert [row for row, _ in batch.broken] == [1, 3]
    assert batch.rows.tolist() == [2]


def test_files_without_rows_are_empty_arrivals(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"")
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b""))
    write_parquet(tmp_path / "x.parquet", n=0)
    for name in ("x.jsonl", "x.jsonl.gz", "x.parquet"):
        assert sum(len(batch.rows) for batch in rows_of(tmp_path / name)) == 0


@pytest.mark.parametrize("compression", ["snappy", "zstd", "none"])
def test_truncated_parquet_is_unreadable_wherever_it_is_cut(tmp_path, compression):
    whole = write_parquet(tmp_path / "x.parquet", compression=compression).read_bytes()
    for keep in [0, 1, 4, 8, *range(11, len(whole), 501), len(whole) - 1]:
        (tmp_path / "cut.parquet").write_bytes(whole[:keep])
        with pytest.raises(UnreadableFileError) as error:
            rows_of(tmp_path / "cut.parquet")
        assert "cut.parquet" in str(error.value)
        assert "Deliver the file again" in str(error.value)


def test_overwritten_bytes_of_parquet_raise_nothing_else(tmp_path):
    whole = write_parquet(
        tmp_path / "x.parquet", n=200, compression="snappy", write_page_checksum=True
    ).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        bad = bytearray(whole)
        for at in rng.integers(0, len(whole), 3):
            bad[at] ^= int(rng.integers(1, 256))
        (tmp_path / "bad.parquet").write_bytes(bad)
        try:
            rows_of(tmp_path / "bad.parquet", ["a", "b"])
        except UnreadableFileError:
            refused += 1
    assert refused > 200


def test_a_column_name_that_is_no_text_is_unreadable(tmp_path):
    pq.write_table(pa.table({"column": [1]}), tmp_path / "x.parquet", store_schema=False)
    whole = (tmp_path / "x.parquet").read_bytes()
    (tmp_path / "x.parquet").write_bytes(whole.replace(b"column", b"col\xffmn"))
    with pytest.raises(UnreadableFileError):
        rows_of(tmp_path / "x.parquet")


def test_bad_gzip_and_other_formats_are_unreadable(tmp_path):
    packed = gzip.compress(b'{"a": 1}\n' * 1000)
    contents = {
        "plain.jsonl.gz": b'{"a": 1}\n',
        "cut.jsonl.gz": packed[:-9],
        "empty.jsonl.gz": b"",
        "flipped.jsonl.gz": packed[:20] + bytes([packed[20] ^ 0xFF]) + packed[21:],
        "text.parquet": b"a,b\n1,2\n",
        "rows.csv": b"a,b\n1,2\n",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnreadableFileError, match=name):
            rows_of(tmp_path / name)
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(UnreadableFileError):
        rows_of(tmp_path / "folder.parquet")


def test_a_column_that_stands_twice_is_unreadable(tmp_path):
    table = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UnreadableFileError, match="'a' stands there more than once"):
        rows_of(tmp_path / "x.parquet")


def test_access_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError):
        rows_of(tmp_path / "nothing.parquet")


def test_urls_and_odd_local_names_are_read(tmp_path):
    import fsspec

    line = b'{"a": 1}\n'
    with fsspec.open("memory://landing/x.jsonl", "wb") as file:
        file.write(line)
    odd = tmp_path / "a::b [1]*'; drop.jsonl"
    odd.write_bytes(line)
    for path in ("memory://landing/x.jsonl", odd, f"file://{tmp_path}/../{tmp_path.name}/x.jsonl"):
        (tmp_path / "x.jsonl").write_bytes(line)
        assert rows_of(path)[0].columns["a"] == [1]
        assert file_digest(str(path)) == hashlib.sha256(line).hexdigest()


def test_names_from_a_file_can_be_written_as_text(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"a": 1, "\ud800": 2, "k" * 500: 3}))
    (batch,) = rows_of(tmp_path / "x.jsonl")
    assert batch.extra == tuple(sorted(["\\ud800", "k" * 80]))
    assert "".join(batch.extra).encode()
