"""Safetensors files read and written by rows: nothing of their size need be held in memory."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import load_file

HEADER = (
    256  # bytes, padded with spaces as the format allows; the row count is known only at the end
)
NAME = "rows"


class RowWriter:
    """Appends float32 rows of one width to a file; `with` that ends well makes it readable."""

    def __init__(self, path: Path, width: int) -> None:
        self.width, self.rows = width, 0
        self._file = path.open("wb")
        self._file.write(b"\0" * (8 + HEADER))

    def append(self, rows: NDArray[np.float32]) -> None:
        """Add [n, width] rows."""
        if rows.ndim != 2 or rows.shape[1] != self.width:
            raise ValueError(f"expected [n, {self.width}] rows, got {rows.shape}")
        self._file.write(np.ascontiguousarray(rows, dtype="<f4").tobytes())
        self.rows += len(rows)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            size = 4 * self.rows * self.width
            tensor = {"dtype": "F32", "shape": [self.rows, self.width], "data_offsets": [0, size]}
            header = json.dumps({NAME: tensor}).encode().ljust(HEADER)
            self._file.seek(0)
            self._file.write(HEADER.to_bytes(8, "little") + header)
        self._file.close()


def read_rows(path: Path) -> NDArray[np.float32]:
    """The matrix [n, width] of a file that a `RowWriter` wrote."""
    return load_file(path)[NAME]


def mapped(path: Path, name: str = NAME) -> NDArray[np.float32]:
    """A float32 array of a safetensors file, where it lies: what is asked for is read.

    SafetensorError for a file that is damaged, ValueError for another type.
    """
    with safe_open(path, "numpy") as file:
        found = file.get_slice(name)
        shape, kind = tuple(found.get_shape()), found.get_dtype()
    if kind != "F32":
        raise ValueError(f"{path}: {name} is {kind}, not F32")
    if 0 in shape:
        return np.empty(shape, np.float32)
    with path.open("rb") as file:  # the library reads slices, but not rows here and there
        size = int.from_bytes(file.read(8), "little")
        start, _ = json.loads(file.read(size))[name]["data_offsets"]
    return np.memmap(path, "<f4", mode="r", offset=8 + size + start, shape=shape)
