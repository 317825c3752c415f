"""Rows appended one block at a time are one safetensors matrix."""

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
from safetensors import SafetensorError

from dsel_assets.resources.rows import NAME, RowWriter, mapped, read_rows


def blocks(sizes, width, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((size, width)).astype(np.float32) for size in sizes]


@pytest.mark.parametrize("sizes", [[], [0], [1], [3, 0, 5], [64, 64, 17]])
@pytest.mark.parametrize("width", [1, 7, 1024])
def test_rows_come_back_bit_by_bit(tmp_path, sizes, width):
    parts = blocks(sizes, width)
    with RowWriter(tmp_path / "rows", width) as writer:
        for part in parts:
            writer.append(part)
    expected = np.concatenate([np.empty((0, width), np.float32), *parts])
    found = read_rows(tmp_path / "rows")
    assert found.dtype == np.float32 and writer.rows == len(expected)
    np.testing.assert_array_equal(found, expected)
    as_torch = safetensors.torch.load_file(tmp_path / "rows")[NAME]
    np.testing.assert_array_equal(as_torch.numpy(), expected)


def test_memory_order_does_not_matter(tmp_path):
    (part,) = blocks([6], 8)
    layouts = [np.asfortranarray(part), np.repeat(part, 2, axis=1)[:, ::2], part[::-1][::-1]]
    with RowWriter(tmp_path / "rows", 8) as writer:
        for layout in layouts:
            writer.append(layout)
    np.testing.assert_array_equal(read_rows(tmp_path / "rows"), np.concatenate([part] * 3))


def test_special_values_survive(tmp_path):
    row = np.array([[np.nan, np.inf, -np.inf, -0.0, 1e-45]], dtype=np.float32)
    with RowWriter(tmp_path / "rows", 5) as writer:
        writer.append(row)
    assert read_rows(tmp_path / "rows").tobytes() == row.tobytes()


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 5), (1, 2, 4)])
def test_rows_of_another_width_are_refused(tmp_path, shape):
    with (
        RowWriter(tmp_path / "rows", 4) as writer,
        pytest.raises(ValueError, match=r"expected \[n, 4\] rows"),
    ):
        writer.append(np.zeros(shape, np.float32))
    assert read_rows(tmp_path / "rows").shape == (0, 4)


@pytest.mark.parametrize("shape", [(0, 4), (1, 4), (300, 4), (7, 2, 3), (5,)])
def test_a_mapped_array_is_the_one_that_was_saved(tmp_path, shape):
    saved = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    other = np.arange(3.0, dtype=np.float32)
    safetensors.numpy.save_file({"other": other, "inputs": saved, "z": other}, tmp_path / "f")
    found = mapped(tmp_path / "f", "inputs")
    assert found.shape == shape and found.dtype == np.float32
    np.testing.assert_array_equal(found, saved)
    order = np.random.default_rng(1).permutation(shape[0])
    np.testing.assert_array_equal(found[order], saved[order])
    assert found.base is None or not found.flags.writeable


def test_a_mapped_file_is_looked_at_before(tmp_path):
    safetensors.numpy.save_file({"rows": np.ones((4, 2))}, tmp_path / "f")
    with pytest.raises(ValueError, match="rows is F64, not F32"):
        mapped(tmp_path / "f")
    with pytest.raises(SafetensorError):
        mapped(tmp_path / "f", "inputs")
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:-3])
    with pytest.raises(SafetensorError):
        mapped(tmp_path / "f")


def test_an_unfinished_file_can_not_be_read(tmp_path):
    writer = RowWriter(tmp_path / "rows", 4)
    writer.append(np.ones((2, 4), np.float32))
    writer._file.flush()
    with pytest.raises(SafetensorError):
        read_rows(tmp_path / "rows")
    with writer:
        pass
    assert read_rows(tmp_path / "rows").shape == (2, 4)


def test_an_error_inside_the_block_leaves_no_readable_file(tmp_path):
    with pytest.raises(RuntimeError), RowWriter(tmp_path / "rows", 4) as writer:
        writer.append(np.ones((2, 4), np.float32))
        raise RuntimeError
    with pytest.raises(SafetensorError):
        read_rows(tmp_path / "rows")


def test_a_truncated_file_can_not_be_read(tmp_path):
    with RowWriter(tmp_path / "rows", 4) as writer:
        writer.append(np.ones((2, 4), np.float32))
    content = (tmp_path / "rows").read_bytes()
    (tmp_path / "rows").write_bytes(content[:-3])
    with pytest.raises(SafetensorError):
        read_rows(tmp_path / "rows")
