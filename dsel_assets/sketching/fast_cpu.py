"""CountSketch and AFFD on the CPU, compiled by numba.

Rows are shared out among torch's threads, and each thread draws the random numbers that it needs
as it goes: nothing but outputs outlives a block. Every row is summed in the same order whatever
stands beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numba import njit
from numpy.typing import NDArray
from torch import Tensor

from dsel_assets.sketching.operator import accumulation_dtype
from dsel_assets.sketching.philox import MULTIPLIERS, WEYL, Key

if TYPE_CHECKING:
    from dsel_assets.sketching.affd import AFFD

Array = NDArray[Any]
Span = tuple[int, int, int]  # coordinates first .. last-1, in runs or blocks of a size

_PIECE = 2**17  # coordinates that are copied, or given to a kernel, at a time
_TOGETHER = 32  # rows that share expanded signs
_SIGNS = 2**15  # coordinates whose signs are expanded at a time
_CACHED = 2**11  # points that are transformed while they lie in the first-level cache


def countsketch(x: Tensor, shifts: Tensor, out_features: int, key: Key) -> Tensor:
    """See `CountSketch`: [B, p] -> [B, D]. key: of the signs."""
    total = x.new_zeros(len(x), out_features, dtype=accumulation_dtype(x.dtype))
    _by_rows(_countsketch, x, _runs(x.shape[1], out_features), total, shifts.numpy(), _key(key))
    return total


def countsketch_adjoint(total: Tensor, shifts: Tensor, in_features: int, key: Key) -> Tensor:
    """See `CountSketch`: [B, D] -> [B, p]."""
    x = total.new_empty(len(total), in_features)
    spans = _runs(in_features, total.shape[1])
    _by_rows(_countsketch_adjoint, x, spans, total, shifts.numpy(), _key(key))
    return x


def affd(sketch: AFFD, x: Tensor) -> Tensor:
    """See `AFFD`, all but the last transform: [B, p] -> [B, D']."""
    total = x.new_zeros(len(x), sketch.points, dtype=accumulation_dtype(x.dtype))
    for spans, keys in _blocks(sketch):
        _by_rows(_affd, x, spans, total, *keys)
    return total


def affd_adjoint(sketch: AFFD, total: Tensor) -> Tensor:
    """See `AFFD`: [B, D'] -> [B, p]."""
    x = total.new_empty(len(total), sketch.in_features)
    for spans, keys in _blocks(sketch):
        _by_rows(_affd_adjoint, x, spans, total, *keys)
    return x


def hadamard(rows: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of each row, not normalised: [B, n] -> [B, n]."""
    result = rows.detach().contiguous().clone()
    _share_out(len(result), lambda start, stop: _transform(result[start:stop].numpy()))
    return result


def _runs(in_features: int, size: int) -> list[Span]:
    """Whole runs, about _PIECE coordinates at a time."""
    step = max(1, _PIECE // size) * size
    return [(first, min(in_features, first + step), size) for first in range(0, in_features, step)]


def _blocks(sketch: AFFD) -> Iterator[tuple[list[Span], list[Array]]]:
    """Of the blocks of one size: about _PIECE coordinates at a time, the keys of what they draw."""
    names = "signs", "gains", "leading/{}", "trailing/{}"
    for size, group in groupby(sketch.groups(_PIECE), itemgetter(1)):
        spans = [
            (first, min(first + size * count, sketch.in_features), size)
            for first, _, count in group
        ]
        yield spans, [_key(sketch.key(name.format(size))) for name in names]


def _key(key: Key) -> Array:
    return np.array(key, np.uint64)


def _by_rows(
    kernel: Callable[..., None], x: Tensor, spans: Sequence[Span], total: Tensor, *given: Array
) -> None:
    """Run the kernel on slices of rows.

    Half precision, and rows that do not lie in one piece, are copied a few at a time.
    """
    x, total = x.detach(), total.detach().contiguous()  # no_grad does not hold in other threads
    as_it_is = x.dtype == total.dtype and x.is_contiguous()

    def run(start: int, stop: int) -> None:
        for first, last, size in spans:
            if as_it_is:
                rows, results = x[start:stop].numpy(), total[start:stop].numpy()
                kernel(rows, first, first, last, size, results, *given)
                continue
            for top in range(start, stop, _TOGETHER):
                part = slice(top, min(stop, top + _TOGETHER))
                rows = x[part, first:last].to(total.dtype).contiguous().numpy()
                kernel(rows, 0, first, last, size, total[part].numpy(), *given)

    _share_out(len(x), run)


def _share_out(rows: int, run: Callable[[int, int], None]) -> None:
    """Call run(start, stop) on slices of the rows, in as many threads as torch has."""
    threads = max(1, min(torch.get_num_threads(), rows))
    bounds = [rows * i // threads for i in range(threads + 1)]
    if threads == 1:
        run(0, rows)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, bounds, bounds[1:]))


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Machine code that releases the GIL; kept on disk where there is a place for it."""
    try:
        return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return njit(nogil=True, error_model="numpy")(function)


_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_FIRST, _SECOND = (np.uint64(m) for m in MULTIPLIERS)
_WEYL_0, _WEYL_1 = (np.uint64(w) for w in WEYL)


@_compile
def _philox(block: int, key: Array) -> tuple[Any, Any, Any, Any]:
    """The four words of one counter: see `philox`."""
    k0, k1 = key
    c0, c1 = np.uint64(block) & _LOW, np.uint64(block) >> _HALF
    c2 = c3 = np.uint64(0)
    for _ in range(10):
        first, second = c0 * _FIRST, c2 * _SECOND
        c0, c2 = (second >> _HALF) ^ c1 ^ k0, (first >> _HALF) ^ c3 ^ k1
        c1, c3 = second & _LOW, first & _LOW
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return c0, c1, c2, c3


@_compile
def _signs(key: Array, first: int, flips: Array) -> None:
    last = first + flips.size
    for block in range(first // 128, (last + 127) // 128):
        four = _philox(block, key)
        for lane in range(4):
            base = 128 * block + 32 * lane
            start, stop = max(first, base), min(last, base + 32)
            if start < stop:
                word = np.uint32(four[lane]) >> np.uint32(start - base)
                part = flips[start - first : stop - first]
                for b in range(part.size):
                    part[b] = 1 - 2 * np.int8(word >> np.uint32(b) & np.uint32(1))


@_compile
def _gains(key: Array, first: int, gains: Array) -> None:
    """Gaussians over the root of their number, a multiple of 4 as `first` is."""
    scale = gains.size**-0.5
    for i in range(0, gains.size, 4):
        four = _philox((first + i) // 4, key)
        for j in (0, 2):
            radius = scale * np.sqrt(-2.0 * np.log((four[j] + 0.5) * 2.0**-32))
            angle = 2.0 * np.pi * ((four[j + 1] + 0.5) * 2.0**-32)
            gains[i + j], gains[i + j + 1] = radius * np.cos(angle), radius * np.sin(angle)


@_compile
def _permutation(key: Array, index: int, size: int) -> Array:
    """The permutation of that index of a stream: see `permutations`."""
    drawn = np.empty(size, np.uint32)
    for i in range(size):
        place = index * size + i
        drawn[i] = _philox(place // 4, key)[place % 4]
    return np.argsort(drawn, kind="mergesort")


@_compile
def _add_flipped(target: Array, source: Array, flips: Array) -> None:
    for j in range(source.size):
        target[j] += source[j] * np.float32(flips[j])


@_compile
def _put_flipped(target: Array, source: Array, flips: Array) -> None:
    for j in range(target.size):
        target[j] = source[j] * np.float32(flips[j])


@_compile
def _add_products(target: Array, source: Array, factors: Array) -> None:
    for j in range(target.size):
        target[j] += source[j] * factors[j]


@_compile
def _put_products(target: Array, source: Array, factors: Array) -> None:
    for j in range(target.size):
        target[j] = source[j] * factors[j]


@_compile
def _add_four(
    target: Array,
    s0: Array,
    s1: Array,
    s2: Array,
    s3: Array,
    f0: Array,
    f1: Array,
    f2: Array,
    f3: Array,
) -> None:
    for j in range(target.size):
        target[j] += s0[j] * f0[j] + s1[j] * f1[j] + (s2[j] * f2[j] + s3[j] * f3[j])


@_compile
def _add_taken(target: Array, source: Array, order: Array) -> None:
    for j in range(order.size):
        target[j] += source[order[j]]


@_compile
def _countsketch(
    x: Array,
    column: int,
    first: int,
    last: int,
    run: int,
    total: Array,
    shifts: Array,
    key: Array,
) -> None:
    """Coordinates first .. last-1, in the columns of x from `column` on."""
    several = max(1, _SIGNS // run) * run
    flips = np.empty(several, np.int8)
    for top in range(0, x.shape[0], _TOGETHER):
        for head in range(first, last, several):
            tail = min(last, head + several)
            _signs(key, head, flips[: tail - head])
            for r in range(top, min(x.shape[0], top + _TOGETHER)):
                for start in range(head, tail, run):
                    shift, size = shifts[start // run], min(run, tail - start)
                    cut, place = min(size, run - shift), column + start - first
                    own = flips[start - head : start - head + size]
                    source = x[r, place : place + size]
                    _add_flipped(total[r, shift : shift + cut], source[:cut], own[:cut])
                    _add_flipped(total[r, : size - cut], source[cut:], own[cut:])


@_compile
def _countsketch_adjoint(
    x: Array,
    column: int,
    first: int,
    last: int,
    run: int,
    total: Array,
    shifts: Array,
    key: Array,
) -> None:
    """Coordinates first .. last-1, in the columns of x from `column` on."""
    several = max(1, _SIGNS // run) * run
    flips = np.empty(several, np.int8)
    for top in range(0, x.shape[0], _TOGETHER):
        for head in range(first, last, several):
            tail = min(last, head + several)
            _signs(key, head, flips[: tail - head])
            for r in range(top, min(x.shape[0], top + _TOGETHER)):
                for start in range(head, tail, run):
                    shift, size = shifts[start // run], min(run, tail - start)
                    cut, place = min(size, run - shift), column + start - first
                    own = flips[start - head : start - head + size]
                    target = x[r, place : place + size]
                    _put_flipped(target[:cut], total[r, shift : shift + cut], own[:cut])
                    _put_flipped(target[cut:], total[r, : size - cut], own[cut:])


@_compile
def _shuffled_radix4(t: Array, to: Array) -> None:
    """Two levels of butterflies between neighbours; their outcomes lie a quarter apart."""
    q = t.size // 4
    t0, t1, t2, t3 = to[:q], to[q : 2 * q], to[2 * q : 3 * q], to[3 * q :]
    for i in range(q):
        a, b, c, d = t[4 * i], t[4 * i + 1], t[4 * i + 2], t[4 * i + 3]
        a, b, c, d = a + b, a - b, c + d, c - d
        t0[i], t1[i], t2[i], t3[i] = a + c, b + d, a - c, b - d


@_compile
def _shuffled_radix2(t: Array, to: Array) -> None:
    """The same of one level; their outcomes lie half apart."""
    h = t.size // 2
    t0, t1 = to[:h], to[h:]
    for i in range(h):
        a, b = t[2 * i], t[2 * i + 1]
        t0[i], t1[i] = a + b, a - b


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
    """Not normalised, in place; the size is a power of two.

    Shuffled passes read neighbours, which short distances cannot vectorise in place; as many levels
    as the indices have bits bring every entry back to its place.
    """
    part = min(t.size, _CACHED)
    one, other = np.empty(part, t.dtype), np.empty(part, t.dtype)
    for start in range(0, t.size, part):
        own = t[start : start + part]
        source, done = own, 1
        while done < part:
            radix = 4 if 4 * done <= part else 2
            done *= radix
            to = own if done == part else one
            if radix == 4:
                _shuffled_radix4(source, to)
            else:
                _shuffled_radix2(source, to)
            one, other = other, one
            source = to
    _butterflies(t, part)


@_compile
def _transform(rows: Array) -> None:
    for r in range(rows.shape[0]):
        _hadamard(rows[r])


@_compile
def _leading(size: int) -> int:
    """The first of a power of two's two factors."""
    down = 1
    while 4 * down * down <= size:
        down *= 2
    return down


@_compile
def _affd(
    x: Array,
    column: int,
    first: int,
    last: int,
    size: int,
    total: Array,
    sign_key: Array,
    gain_key: Array,
    leading_key: Array,
    trailing_key: Array,
) -> None:
    """Blocks of `size` coordinates from `first` on, in the columns of x from `column` on."""
    down = _leading(size)
    across, points = size // down, total.shape[1]
    tile, flips = np.empty(size, total.dtype), np.empty(size, np.int8)
    gains = np.empty(size, np.float32)
    folded = np.empty(max(points, across), total.dtype)
    lines = folded.size // across
    order = np.empty(folded.size, np.int32)
    for start in range(first, last, size):
        filled, place = min(size, last - start), column + start - first
        _signs(sign_key, start, flips[:filled])
        _gains(gain_key, start, gains)
        leading = _permutation(leading_key, start // size, down)
        trailing = _permutation(trailing_key, start // size, across)
        for i in range(order.size):
            order[i] = i // across * across + trailing[i % across]
        for r in range(x.shape[0]):
            _put_flipped(tile[:filled], x[r, place : place + filled], flips[:filled])
            tile[filled:] = 0
            _hadamard(tile)
            folded[:] = 0
            for i in range(lines):
                to, rest = folded[i * across : (i + 1) * across], i
                while rest + 3 * lines < down:
                    a, b = leading[rest] * across, leading[rest + lines] * across
                    c = leading[rest + 2 * lines] * across
                    d = leading[rest + 3 * lines] * across
                    _add_four(
                        to,
                        tile[a : a + across],
                        tile[b : b + across],
                        tile[c : c + across],
                        tile[d : d + across],
                        gains[a : a + across],
                        gains[b : b + across],
                        gains[c : c + across],
                        gains[d : d + across],
                    )
                    rest += 4 * lines
                while rest < down:
                    a = leading[rest] * across
                    _add_products(to, tile[a : a + across], gains[a : a + across])
                    rest += lines
            for i in range(0, folded.size, points):
                _add_taken(total[r], folded, order[i : i + points])


@_compile
def _affd_adjoint(
    x: Array,
    column: int,
    first: int,
    last: int,
    size: int,
    total: Array,
    sign_key: Array,
    gain_key: Array,
    leading_key: Array,
    trailing_key: Array,
) -> None:
    """The adjoint of `_affd`: fills the columns of x."""
    down = _leading(size)
    across, points = size // down, total.shape[1]
    tile, flips = np.empty(size, total.dtype), np.empty(size, np.int8)
    gains = np.empty(size, np.float32)
    folded = np.empty(max(points, across), total.dtype)
    lines = folded.size // across
    for start in range(first, last, size):
        filled, place = min(size, last - start), column + start - first
        _signs(sign_key, start, flips[:filled])
        _gains(gain_key, start, gains)
        leading = _permutation(leading_key, start // size, down)
        trailing = _permutation(trailing_key, start // size, across)
        for r in range(x.shape[0]):
            for i in range(lines):
                for j in range(across):
                    folded[i * across + trailing[j]] = total[r, (i * across + j) & (points - 1)]
            for i in range(down):
                to, line = leading[i] * across, (i & (lines - 1)) * across
                _put_products(
                    tile[to : to + across], folded[line : line + across], gains[to : to + across]
                )
            _hadamard(tile)
            _put_flipped(x[r, place : place + filled], tile[:filled], flips[:filled])
