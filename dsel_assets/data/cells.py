"""One column of an untrusted file into values, with a fault for each cell that is refused.

An input of kind "image" may be a nested or flat list, raw bytes (uint8, in the order of the shape)
or an encoded PNG or JPEG, bytes also as {"bytes": ...}, as Hugging Face stores images. Integers,
raw bytes and decoded pixels are divided by 255; floats are taken as given. In JSON, where 1 is not
1.0, one float in a row makes all of the row floats. An input of kind "vector" is a list of numbers,
taken as given. A path inside a row is never followed.
"""

from __future__ import annotations

import io
import math
import reprlib
import unicodedata
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

from dsel_assets.data.quarantine import (
    EMPTY,
    MISSING_COLUMN,
    NON_FINITE,
    UNKNOWN_LABEL,
    WRONG_SHAPE,
    WRONG_TYPE,
)
from dsel_assets.data.readers import MISSING

MAX_TEXT: Final = 200
INVALID: Final = object()  # a cell that Python cannot hold, such as text that is no UTF-8
PNG, JPEG, JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\xd9"
BANDS: Final = {"1": 1, "L": 1, "LA": 2, "P": 3, "RGB": 3, "RGBA": 4}

Column: TypeAlias = pa.Array | list[Any]
Kind = Literal["image", "vector"]
Fault = tuple[str, str]  # reason, detail
Faults = dict[int, Fault]  # by position in the column


class CellError(ValueError):
    """A cell is refused: args are (reason, detail)."""


def parse_cells(column: Column, parse: Callable[[Any], Any]) -> tuple[list[Any], Faults]:
    """What `parse` makes of each cell, None where it raises CellError, and the faults."""
    cells = column if isinstance(column, list) else _to_list(column)
    values: list[Any] = [None] * len(cells)
    faults: Faults = {}
    for i, cell in enumerate(cells):
        try:
            if cell is MISSING:
                raise CellError(MISSING_COLUMN, "there is none of this name")
            values[i] = parse(cell)
        except CellError as error:
            faults[i] = (error.args[0], error.args[1])
    return values, faults


def parse_inputs(
    column: Column, kind: Kind, shape: tuple[int, ...]
) -> tuple[NDArray[np.float32], Faults]:
    """[n, *shape] inputs, 0 where a row is refused, and the faults.

    Arrow lists of numbers are converted as one array; only the rows that this does not fit, and
    other forms, are looked at one by one.
    """
    inputs = np.zeros((len(column), math.prod(shape)), dtype=np.float32)
    rest = np.arange(len(column))
    if isinstance(column, pa.Array):
        column = column.storage if isinstance(column, pa.ExtensionArray) else column
        right, values = _lists(column, kind, shape)
        inputs[right] = values
        rest, column = rest[~right], column.filter(pa.array(~right))
    cells, faults = parse_cells(column, lambda cell: _input(cell, kind, shape))
    for i, cell in zip(rest, cells, strict=True):
        if cell is not None:
            inputs[i] = cell
    return inputs.reshape(-1, *shape), {int(rest[i]): fault for i, fault in faults.items()}


def parse_label(cell: Any, classes: dict[str, int]) -> int:
    """The class index that an index or a name stands for."""
    if cell is None:
        raise CellError(EMPTY, "null where a label is expected")
    if isinstance(cell, bool) or not isinstance(cell, int | str):
        raise CellError(WRONG_TYPE, f"{_type(cell)} where a class index or name is expected")
    if isinstance(cell, int) and 0 <= cell < len(classes):
        return cell
    if isinstance(cell, str) and cell in classes:
        return classes[cell]
    raise CellError(UNKNOWN_LABEL, f"{reprlib.repr(cell)} is none of the {len(classes)} classes")


def parse_text(cell: Any) -> str:
    """Text of 1 to MAX_TEXT characters, none of them a control character."""
    if cell is None or cell == "":
        raise CellError(EMPTY, "nothing where text is expected")
    if not isinstance(cell, str):
        raise CellError(WRONG_TYPE, f"{_type(cell)} where text is expected")
    if len(cell) > MAX_TEXT:
        raise CellError(WRONG_TYPE, f"{len(cell)} characters, at most {MAX_TEXT} are allowed")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in cell):
        raise CellError(WRONG_TYPE, f"control characters in {reprlib.repr(cell)}")
    return cell


def parse_long_text(cell: Any) -> str:
    """Text of any length that UTF-8 can hold; null is ""."""
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise CellError(WRONG_TYPE, f"{_type(cell)} where text is expected")
    try:
        cell.encode()
    except UnicodeEncodeError as error:
        raise CellError(WRONG_TYPE, f"half a surrogate pair in {reprlib.repr(cell)}") from error
    return cell


def parse_group(cell: Any) -> str:
    """Text as `parse_text` has it, or "" for null: of unknown group."""
    return "" if cell is None or cell == "" else parse_text(cell)


def parse_number(cell: Any) -> float:
    """A finite number."""
    if cell is None:
        raise CellError(EMPTY, "null where a number is expected")
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        raise CellError(WRONG_TYPE, f"{_type(cell)} where a number is expected")
    try:
        number = float(cell)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise CellError(NON_FINITE, f"{number} where a finite number is expected")
    return number


def parse_cost(cell: Any) -> float:
    """A finite number from 0 up."""
    number = parse_number(cell)
    if number < 0:
        raise CellError(WRONG_TYPE, f"{number:g} where a cost from 0 up is expected")
    return number


def parse_name(cell: Any) -> str:
    """What a whole number or a text is called by; "" for null."""
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    return parse_group(cell)


def _type(cell: Any) -> str:
    return "an unreadable value" if cell is INVALID else type(cell).__name__


def _to_list(column: pa.Array) -> list[Any]:
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError):
        return [_to_python(scalar) for scalar in column]


def _to_python(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        return INVALID


def _nestings(shape: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """The shapes that a list may have, by depth: flat, without lengths of 1, as declared."""
    squeezed = tuple(length for length in shape if length > 1) or (1,)
    return {len(form): form for form in ((math.prod(shape),), squeezed, shape)}


def _lists(
    column: pa.Array, kind: Kind, shape: tuple[int, ...]
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Which rows are lists of the right numbers, [n], and their inputs, [right, size]."""
    n, size = len(column), math.prod(shape)
    leaf, depth = column.type, 0
    while _is_list(leaf):
        leaf, depth = leaf.value_type, depth + 1
    integers, nesting = pa.types.is_integer(leaf), _nestings(shape).get(depth)
    if nesting is None or not (integers or pa.types.is_floating(leaf)):
        return np.zeros(n, dtype=bool), np.zeros((0, size), dtype=np.float32)
    rows, lists = np.arange(n), 1
    for length in nesting:
        lengths = pc.list_value_length(column).fill_null(-1).to_numpy(zero_copy_only=False)
        fit = (lengths == length).reshape(len(rows), lists).all(axis=1)
        column = column if fit.all() else column.filter(pa.array(np.repeat(fit, lists)))
        rows, lists, column = rows[fit], lists * length, column.flatten()
    fit = column.is_valid().to_numpy(zero_copy_only=False).reshape(len(rows), size).all(axis=1)
    column = column.fill_null(0) if column.null_count else column
    numbers = column.to_numpy(zero_copy_only=False).reshape(len(rows), size)
    if integers and kind == "image":
        fit &= (numbers.min(axis=1) >= 0) & (numbers.max(axis=1) <= 255)
    values = _to_float32(numbers, pixels=integers and kind == "image")
    fit &= np.isfinite(values).all(axis=1)
    right = np.zeros(n, dtype=bool)
    right[rows[fit]] = True
    return right, values if fit.all() else values[fit]


def _is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _to_float32(numbers: NDArray[Any], *, pixels: bool) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, which is refused
        values = numbers.astype(np.float32)
    return values / np.float32(255) if pixels else values


def _input(cell: Any, kind: Kind, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """One row's input, flat."""
    image = kind == "image"
    if image and isinstance(cell, dict) and "bytes" in cell:
        cell = cell["bytes"]
    if cell is None:
        raise CellError(EMPTY, "null where an input is expected")
    if image and isinstance(cell, bytes):
        return _to_float32(_pixels(cell, shape), pixels=True)
    if not isinstance(cell, list):
        raise CellError(WRONG_TYPE, f"{_type(cell)} where {kind} data is expected")
    types = _leaf_types(cell)
    if not types:
        raise CellError(EMPTY, "a list without numbers")
    if not types <= {int, float}:
        names = sorted(leaf.__name__ for leaf in types - {int, float})
        raise CellError(WRONG_TYPE, f"{', '.join(names)} among the numbers")
    try:
        numbers = np.array(cell, dtype=np.float64)
    except OverflowError:
        raise CellError(NON_FINITE, "an integer beyond any float") from None
    except ValueError:
        raise CellError(WRONG_SHAPE, f"uneven lists, expected {shape}") from None
    if numbers.shape not in _nestings(shape).values():
        raise CellError(WRONG_SHAPE, f"{numbers.shape}, expected {shape}")
    pixels = image and float not in types
    if pixels and not 0 <= numbers.min() <= numbers.max() <= 255:
        raise CellError(WRONG_TYPE, "integer pixels outside 0..255")
    values = _to_float32(numbers.ravel(), pixels=pixels)
    if not np.isfinite(values).all():
        raise CellError(NON_FINITE, "NaN, infinite or beyond float32")
    return values


def _leaf_types(cell: Sequence[Any]) -> set[type]:
    """The types of what a nested list holds, the lists aside."""
    found: set[type] = set()
    while cell:
        here = set(map(type, cell))
        found |= here
        cell = list(chain.from_iterable(c for c in cell if type(c) is list) if list in here else ())
    return found - {list}


def _pixels(data: bytes, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The pixels of an image, flat in the order of the shape: raw bytes, or decoded PNG or JPEG."""
    size = math.prod(shape)
    # a raw image may begin like a JPEG, and a JPEG may be as long as a raw image
    jpeg = data.startswith(JPEG) and (len(data) != size or data.endswith(JPEG_END))
    if jpeg or data.startswith(PNG):
        return _decoded(data, (1, *shape) if len(shape) == 2 else shape)
    if not data:
        raise CellError(EMPTY, "no bytes")
    if len(data) != size:
        raise CellError(WRONG_SHAPE, f"{len(data)} bytes, neither {size} nor a PNG or JPEG")
    return np.frombuffer(data, dtype=np.uint8)


def _decoded(data: bytes, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            if image.mode not in BANDS:
                raise CellError(WRONG_TYPE, f"mode {image.mode}; save it as 8 bit grey or RGB")
            bands = BANDS[image.mode]
            found = (bands, image.height, image.width)
            if found != shape:  # seen before decoding, which a forged size could make costly
                raise CellError(WRONG_SHAPE, f"an image of {found}, expected {shape}")
            plain = image.convert({"1": "L", "P": "RGB"}.get(image.mode, image.mode))
            pixels = np.asarray(plain).reshape(image.height, image.width, bands)
    except CellError:
        raise
    except Exception as error:  # decoders raise all kinds on hostile bytes
        detail = f"an image that cannot be decoded ({type(error).__name__})"
        raise CellError(WRONG_TYPE, detail) from None
    return pixels.transpose(2, 0, 1).ravel()
