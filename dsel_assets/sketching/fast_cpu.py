"""CountSketch and AFFD on the CPU, compiled by numba.

Rows are shared out among torch's threads; what one thread keeps beside the rows' outputs stays in
its cache. Every row is summed in the same order whatever stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from dsel_assets.sketching.operator import accumulation_dtype
from dsel_assets.sketching.philox import Key, words

if TYPE_CHECKING:
    from dsel_assets.sketching.affd import AFFD

Array = NDArray[Any]

_SIGNS = 2**20  # coordinates whose signs exist at a time
_GAINS = 2**19  # the same of Gaussians
_TOGETHER = 16  # rows that share the expanded signs of a run
_CACHED = 2**11  # points that are transformed while they lie in the first-level cache


def countsketch(x: Tensor, shifts: Tensor, out_features: int, key: Key) -> Tensor:
    """See `CountSketch`: [B, p] -> [B, D]. key: of the signs."""
    total = torch.zeros(len(x), out_features, dtype=accumulation_dtype(x.dtype))
    for first, last, bits in _pieces(x.shape[1], out_features, key):
        turns = shifts[first // out_features : -(-last // out_features)].numpy()
        _by_rows(_countsketch, x, first, last, total, bits, turns)
    return total


def countsketch_adjoint(total: Tensor, shifts: Tensor, in_features: int, key: Key) -> Tensor:
    """See `CountSketch`: [B, D] -> [B, p]."""
    D = total.shape[1]
    x = torch.empty(len(total), in_features, dtype=total.dtype)
    for first, last, bits in _pieces(in_features, D, key):
        turns = shifts[first // D : -(-last // D)].numpy()
        _by_rows(_countsketch_adjoint, x, first, last, total, bits, turns)
    return x


def affd(sketch: AFFD, x: Tensor) -> Tensor:
    """See `AFFD`, all but the last transform: [B, p] -> [B, D']."""
    total = torch.zeros(len(x), sketch.points, dtype=accumulation_dtype(x.dtype))
    for first, last, *blocks in _blocks(sketch):
        _by_rows(_affd, x, first, last, total, *blocks)
    return total


def affd_adjoint(sketch: AFFD, total: Tensor) -> Tensor:
    """See `AFFD`: [B, D'] -> [B, p]."""
    x = torch.empty(len(total), sketch.in_features, dtype=total.dtype)
    for first, last, *blocks in _blocks(sketch):
        _by_rows(_affd_adjoint, x, first, last, total, *blocks)
    return x


def hadamard(rows: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of each row, not normalised: [B, n] -> [B, n]."""
    result = rows.contiguous().clone()
    _by_rows(_transform, result, 0, result.shape[1], result)
    return result


def _pieces(size: int, run: int, key: Key) -> Iterator[tuple[int, int, Array]]:
    """Whole runs at a time, about _SIGNS coordinates: first, last and their packed signs."""
    step = max(1, _SIGNS // run) * run
    for first in range(0, size, step):
        last = min(size, first + step)
        yield first, last, _packed_signs(key, first, last)


def _blocks(sketch: AFFD) -> Iterator[tuple[int, int, Array, Array, Array, Array]]:
    """Some blocks at a time, of one size.

    First and last coordinate, packed signs, gains, each line's place and the order within a line.
    """
    for first, size, count in sketch.groups(_GAINS):
        last = min(first + size * count, sketch.in_features)
        leading, trailing = sketch.permutations(first, size, count)
        yield (
            first,
            last,
            _packed_signs(sketch.key("signs"), first, last),
            sketch.gains(first, size, count).numpy().reshape(count, size),
            leading.argsort(dim=1).numpy(),
            trailing.int().numpy(),
        )


def _packed_signs(key: Key, first: int, last: int) -> Array:
    """The sign bits of the coordinates first .. last-1, the first of them at bit 0."""
    start = first // 32
    packed = words(key, start, -(-last // 32) - start).numpy().astype(np.uint32)
    offset = np.uint32(first % 32)
    if offset:
        following = np.append(packed[1:], np.uint32(0))
        packed = packed >> offset | following << (np.uint32(32) - offset)
    return packed


def _by_rows(
    kernel: Callable[..., None], x: Tensor, first: int, last: int, total: Tensor, *shared: Array
) -> None:
    """Run the kernel on as many slices of rows as torch has threads; it releases the GIL.

    Half precision is widened a few rows at a time.
    """
    half, total = x.dtype != total.dtype, total.contiguous()
    x = x if half else x.contiguous()
    threads = max(1, min(torch.get_num_threads(), len(x)))
    bounds = [len(x) * i // threads for i in range(threads + 1)]

    def run(start: int, stop: int) -> None:
        if not half:
            rows, results = x[start:stop].numpy(), total[start:stop].numpy()
            kernel(rows, first, last, results, *shared)
            return
        for top in range(start, stop, _TOGETHER):
            part = slice(top, min(stop, top + _TOGETHER))
            rows = x[part, first:last].to(total.dtype).numpy()
            kernel(rows, 0, last - first, total[part].numpy(), *shared)

    if threads == 1:
        run(0, len(x))
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, bounds, bounds[1:]))


_compile = njit(nogil=True, cache=True, error_model="numpy")


@_compile
def _expand(bits: Array, first: int, flips: Array) -> None:
    done = 0
    while done < flips.size:
        place = first + done
        word = bits[place >> 5] >> np.uint32(place & 31)
        part = flips[done : done + min(32 - (place & 31), flips.size - done)]
        for b in range(part.size):
            part[b] = 1.0 - 2.0 * (word >> np.uint32(b) & np.uint32(1))
        done += part.size


@_compile
def _add_flipped(target: Array, source: Array, flips: Array) -> None:
    for j in range(source.size):
        target[j] += source[j] * flips[j]


@_compile
def _add_taken(target: Array, source: Array, order: Array) -> None:
    for j in range(target.size):
        target[j] += source[order[j]]


@_compile
def _put_flipped(target: Array, source: Array, flips: Array) -> None:
    for j in range(target.size):
        target[j] = source[j] * flips[j]


@_compile
def _countsketch(x: Array, first: int, last: int, total: Array, bits: Array, shifts: Array) -> None:
    D = total.shape[1]
    flips = np.empty(D, total.dtype)
    for top in range(0, x.shape[0], _TOGETHER):
        for run in range(shifts.size):
            start, shift = first + run * D, shifts[run]
            size = min(D, last - start)
            _expand(bits, run * D, flips[:size])
            cut = min(size, D - shift)
            for r in range(top, min(x.shape[0], top + _TOGETHER)):
                source = x[r, start : start + size]
                _add_flipped(total[r, shift : shift + cut], source[:cut], flips[:cut])
                _add_flipped(total[r, : size - cut], source[cut:], flips[cut:size])


@_compile
def _countsketch_adjoint(
    x: Array, first: int, last: int, total: Array, bits: Array, shifts: Array
) -> None:
    D = total.shape[1]
    flips = np.empty(D, total.dtype)
    for top in range(0, x.shape[0], _TOGETHER):
        for run in range(shifts.size):
            start, shift = first + run * D, shifts[run]
            size = min(D, last - start)
            _expand(bits, run * D, flips[:size])
            cut = min(size, D - shift)
            for r in range(top, min(x.shape[0], top + _TOGETHER)):
                target = x[r, start : start + size]
                _put_flipped(target[:cut], total[r, shift : shift + cut], flips[:cut])
                _put_flipped(target[cut:], total[r, : size - cut], flips[cut:size])


@_compile
def _radix4(t: Array) -> None:
    """The butterflies of distances 1 and 2."""
    for i in range(t.size // 4):
        a, b, c, d = t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]
        a, b, c, d = a + b, a - b, c + d, c - d
        t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3] = a + c, b + d, a - c, b - d


@_compile
def _radix8(t: Array, h: int) -> None:
    """The butterflies of distances h, 2h and 4h."""
    for base in range(0, t.size, 8 * h):
        t0, t1 = t[base : base + h], t[base + h : base + 2 * h]
        t2, t3 = t[base + 2 * h : base + 3 * h], t[base + 3 * h : base + 4 * h]
        t4, t5 = t[base + 4 * h : base + 5 * h], t[base + 5 * h : base + 6 * h]
        t6, t7 = t[base + 6 * h : base + 7 * h], t[base + 7 * h : base + 8 * h]
        for j in range(h):
            a, b, c, d = t0[j], t1[j], t2[j], t3[j]
            e, f, g, i = t4[j], t5[j], t6[j], t7[j]
            a, b, c, d, e, f, g, i = a + b, a - b, c + d, c - d, e + f, e - f, g + i, g - i
            a, b, c, d, e, f, g, i = a + c, b + d, a - c, b - d, e + g, f + i, e - g, f - i
            t0[j], t1[j], t2[j], t3[j] = a + e, b + f, c + g, d + i
            t4[j], t5[j], t6[j], t7[j] = a - e, b - f, c - g, d - i


@_compile
def _radix2(t: Array, h: int) -> None:
    """The butterflies of distance h."""
    for base in range(0, t.size, 2 * h):
        t0, t1 = t[base : base + h], t[base + h : base + 2 * h]
        for j in range(h):
            a, b = t0[j], t1[j]
            t0[j], t1[j] = a + b, a - b


@_compile
def _butterflies(t: Array, h: int) -> None:
    """All butterflies from distance h up to half of t's size."""
    while 8 * h <= t.size:
        _radix8(t, h)
        h *= 8
    while 2 * h <= t.size:
        _radix2(t, h)
        h *= 2


@_compile
def _hadamard(t: Array) -> None:
    """Not normalised, in place; the size is a power of two."""
    if t.size < 4:
        _butterflies(t, 1)
        return
    part = min(t.size, _CACHED)
    for start in range(0, t.size, part):
        _radix4(t[start : start + part])
        _butterflies(t[start : start + part], 4)
    _butterflies(t, part)


@_compile
def _transform(x: Array, first: int, last: int, total: Array) -> None:
    for r in range(x.shape[0]):
        _hadamard(total[r])


@_compile
def _affd(
    x: Array,
    first: int,
    last: int,
    total: Array,
    bits: Array,
    gains: Array,
    leading: Array,
    trailing: Array,
) -> None:
    size, across, points = gains.shape[1], trailing.shape[1], total.shape[1]
    tile, flips = np.empty(size, total.dtype), np.empty(size, total.dtype)
    folded = np.empty(max(points, across), total.dtype)
    down, width = folded.size // across, min(points, across)
    for block in range(gains.shape[0]):
        start = first + block * size
        filled = min(size, last - start)
        _expand(bits, block * size, flips[:filled])
        gain, row_of, order = gains[block], leading[block], trailing[block]
        for r in range(x.shape[0]):
            _put_flipped(tile[:filled], x[r, start : start + filled], flips[:filled])
            tile[filled:] = 0
            _hadamard(tile)
            folded[:] = 0
            for i in range(leading.shape[1]):
                line = slice(i * across, (i + 1) * across)
                to = (row_of[i] & (down - 1)) * across
                _add_flipped(folded[to : to + across], tile[line], gain[line])
            for place in range(0, folded.size, width):
                line = place // across * across
                to = place & (points - 1)
                _add_taken(
                    total[r, to : to + width],
                    folded[line : line + across],
                    order[place - line : place - line + width],
                )


@_compile
def _affd_adjoint(
    x: Array,
    first: int,
    last: int,
    total: Array,
    bits: Array,
    gains: Array,
    leading: Array,
    trailing: Array,
) -> None:
    size, across, points = gains.shape[1], trailing.shape[1], total.shape[1]
    tile, flips = np.empty(size, total.dtype), np.empty(size, total.dtype)
    folded = np.empty(max(points, across), total.dtype)
    down = folded.size // across
    for block in range(gains.shape[0]):
        start = first + block * size
        filled = min(size, last - start)
        _expand(bits, block * size, flips[:filled])
        gain, row_of, order = gains[block], leading[block], trailing[block]
        for r in range(x.shape[0]):
            for i in range(down):
                for j in range(across):
                    folded[i * across + order[j]] = total[r, (i * across + j) & (points - 1)]
            for i in range(leading.shape[1]):
                line = slice(i * across, (i + 1) * across)
                to = (row_of[i] & (down - 1)) * across
                _put_flipped(tile[line], folded[to : to + across], gain[line])
            _hadamard(tile)
            _put_flipped(x[r, start : start + filled], tile[:filled], flips[:filled])
