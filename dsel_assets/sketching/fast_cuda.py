"""CountSketch and AFFD on CUDA, by Triton.

The signs are hashed once a call, for all rows, and packed: one bit a coordinate. x is read once, or
written once by the adjoints. Sums are taken in an order that the operator's sizes alone set,
without atomics: a row has the same bits whatever stands beside it.

AFFD's Hadamard transform of a block, seen as a matrix [L, T], is a product with a matrix of +1 and
-1 from either side, and its permutation is one of their rows and columns. bfloat16 holds these
exactly, and three bfloat16 hold a float32 exactly: what the tensor cores multiply is exact, and
they add up in float32.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from dsel_assets.sketching.fast import plain_torch
from dsel_assets.sketching.hadamard import hadamard as butterflies
from dsel_assets.sketching.operator import accumulation_dtype
from dsel_assets.sketching.philox import Key

if TYPE_CHECKING:
    from dsel_assets.sketching.affd import AFFD

_PARTIALS = 2**18  # numbers a row that countsketch's partial sums take, unless D is more
_GAINS = 2**24  # coordinates whose Gaussians exist at a time
_SIDE = 128  # of the largest block, a square
_SHARED = 160 * 1024  # bytes of shared memory that such a block takes
_LAUNCH = {"num_warps": 8, "num_stages": 1}  # it fills a multiprocessor's registers as well

_TURN = tl.constexpr(2.0 * math.pi)
_WIDTH = tl.constexpr(_SIDE)


def countsketch(x: Tensor, shifts: Tensor, out_features: int, key: Key) -> Tensor:
    """See `CountSketch`: [B, p] -> [B, D]. key: of the signs.

    Takes p/8 bytes while it runs, and at most a sixteenth of x in float32 for partial sums.
    """
    (B, p), D, runs = x.shape, out_features, len(shifts)
    share, splits = _shares(runs, D)
    partials = x.new_empty(splits, B, D, dtype=accumulation_dtype(x.dtype))
    if B:
        with torch.cuda.device_of(x):
            flips, shifts = _flips(key, 0, p, x.device), shifts.to(x.device)
            grid, tile = _tiles(B, D, splits)
            _countsketch[grid](
                x, partials, shifts, flips, B, p, D, runs, share, *x.stride(), **tile
            )
    return _add_up(partials)


def countsketch_adjoint(total: Tensor, shifts: Tensor, in_features: int, key: Key) -> Tensor:
    """See `CountSketch`: [B, D] -> [B, p]."""
    (B, D), p, runs = total.shape, in_features, len(shifts)
    share, splits = _shares(runs, D)
    x = total.new_empty(B, p)
    if B:
        with torch.cuda.device_of(x):
            flips, shifts = _flips(key, 0, p, x.device), shifts.to(x.device)
            grid, tile = _tiles(B, D, splits)
            _countsketch_adjoint[grid](
                total, x, shifts, flips, B, p, D, runs, share, *total.stride(), **tile
            )
    return x


def affd(sketch: AFFD, x: Tensor) -> Tensor:
    """See `AFFD`, all but the last transform: [B, p] -> [B, D'].

    Takes 64 MiB for Gaussians at most while it runs, and at most a sixteenth of x in float32 for
    partial sums. Plain torch takes double precision, blocks of more than 2^14 coordinates, and what
    comes to a GPU of too little shared memory.
    """
    if not _fits(x, max(sketch.sizes)):
        with plain_torch():
            return sketch.partial(x)
    (B, p), groups = x.shape, list(sketch.groups(_GAINS))
    splits = max(_blocks(count)[1] for _, _, count in groups)
    partials = x.new_zeros(splits, B, sketch.points, dtype=torch.float32)
    with torch.cuda.device_of(x):
        for first, size, count in groups if B else []:
            drawn = _drawn(sketch, first, size, count, x.device)
            share, splits = _blocks(count)
            arguments = x, partials, *drawn, B, p, *x.stride(), first, count, share
            _affd[(B * splits,)](*arguments, **(_shape(size) | _LAUNCH), POINTS=sketch.points)
    return _add_up(partials)


def affd_adjoint(sketch: AFFD, total: Tensor) -> Tensor:
    """See `AFFD`: [B, D'] -> [B, p]."""
    if not _fits(total, max(sketch.sizes)):
        with plain_torch():
            return sketch.partial_adjoint(total)
    B, p = len(total), sketch.in_features
    x = total.new_empty(B, p)
    with torch.cuda.device_of(x):
        for first, size, count in sketch.groups(_GAINS) if B else []:
            drawn = _drawn(sketch, first, size, count, x.device)
            share, splits = _blocks(count)
            arguments = total, x, *drawn, B, p, *total.stride(), first, count, share
            _affd_adjoint[(B * splits,)](
                *arguments, **(_shape(size) | _LAUNCH), POINTS=sketch.points
            )
    return x


def hadamard(rows: Tensor) -> Tensor:
    """The Walsh-Hadamard transform of each row, not normalised: [B, n] -> [B, n]."""
    B, n = rows.shape
    if not _fits(rows, n):
        return butterflies(rows.T).T
    result = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if B:
        with torch.cuda.device_of(rows):
            matrix = _matrix(rows.device)
            _hadamard[(B,)](rows, result, matrix, *rows.stride(), **(_shape(n) | _LAUNCH))
    return result


def _fits(x: Tensor, size: int) -> bool:
    """Whether blocks of `size` coordinates fit the kernels, and these the GPU."""
    if x.dtype == torch.float64 or size > _SIDE**2:
        return False
    if not x.is_cuda:
        return True  # Triton's interpreter
    gpu = torch.cuda.get_device_properties(x.device)
    return getattr(gpu, "shared_memory_per_block_optin", 0) >= _SHARED


def _shares(runs: int, D: int) -> tuple[int, int]:
    """Runs that one program adds up, and how many programs share all of them."""
    splits = max(1, min(runs // 16, _PARTIALS // D))
    share = triton.cdiv(runs, splits)
    return share, triton.cdiv(runs, share)


def _tiles(B: int, D: int, splits: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid of countsketch, and its tile: the rows and columns that one program adds up."""
    rows = min(8, triton.next_power_of_2(B))
    columns = min(1024, 2048 // rows, triton.next_power_of_2(D))
    grid = triton.cdiv(B, rows) * splits * triton.cdiv(D, columns)
    return (grid,), {"ROWS": rows, "COLUMNS": columns}


def _blocks(count: int) -> tuple[int, int]:
    """Blocks that one program adds up, and how many programs share all of them."""
    share = max(4, triton.cdiv(count, 64))
    return share, triton.cdiv(count, share)


def _shape(size: int) -> dict[str, int]:
    """The factors of a block, [L, T], and the tile that holds it."""
    T = 1 << size.bit_length() // 2
    L = size // T
    return {"L": L, "T": T, "ROWS": max(L, 32), "COLUMNS": max(T, 32)}


def _seed(key: Key) -> int:
    """A key as one signed number of 64 bits, so that Triton sees one type whatever the key."""
    seed = key[0] | key[1] << 32
    return seed - (1 << 64) if seed >> 63 else seed


def _flips(key: Key, first: int, count: int, device: torch.device) -> Tensor:
    """Sign bits of the coordinates from `first`, a multiple of 128, on: int32 words."""
    counters = triton.cdiv(count, 128)
    flips = torch.empty(4 * counters, dtype=torch.int32, device=device)
    _draw_flips[(triton.cdiv(counters, 256),)](flips, first // 128, counters, _seed(key), SIZE=256)
    return flips


def _matrix(device: torch.device) -> Tensor:
    # Triton's interpreter multiplies the bit patterns of bfloat16
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matrix = torch.empty(_SIDE, _SIDE, dtype=dtype, device=device)
    _draw_hadamard[(matrix.numel() // 1024,)](matrix)
    return matrix


def _permutations(key: Key, first: int, count: int, size: int, device: torch.device) -> Tensor:
    """`philox.permutations` as int32."""
    table = torch.empty(count, size, dtype=torch.int32, device=device)
    _draw_permutations[(count,)](table, first, _seed(key), SIZE=size)
    return table


def _drawn(
    sketch: AFFD, first: int, size: int, count: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Of some blocks: Hadamard's matrix, the permutations, the signs, the gains as permuted."""
    shape = _shape(size)
    leading, trailing = (
        _permutations(sketch.key(f"{name}/{size}"), first // size, count, shape[side], device)
        for name, side in (("leading", "L"), ("trailing", "T"))
    )
    gains = torch.empty(count, shape["COLUMNS"], shape["ROWS"], device=device)
    seed = _seed(sketch.key("gains"))
    _draw_gains[(gains.numel() // 512,)](gains, leading, trailing, first, seed, **shape, SIZE=512)
    flips = _flips(sketch.key("signs"), first, size * count, device)
    return _matrix(device), leading, trailing, flips, gains


def _add_up(partials: Tensor) -> Tensor:
    """The sum over the first dimension, in its order."""
    if len(partials) == 1 or not partials.numel():
        return partials[0]
    total = torch.empty_like(partials[0])
    with torch.cuda.device_of(total):
        grid = (triton.cdiv(total.numel(), 256),)
        _add[grid](partials, total, len(partials), total.numel(), SIZE=256)
    return total


# numbers too are annotated as tensors: Triton would take an `int` for one of 32 bits


@triton.jit
def _words(seed: tl.tensor, counter: tl.tensor) -> tl.tensor:
    """Words 4 counter .. 4 counter + 3 of the stream."""
    none = tl.zeros_like(counter).to(tl.uint32)
    return tl.philox(seed, counter.to(tl.uint32), (counter >> 32).to(tl.uint32), none, none)


@triton.jit(do_not_specialize=["first", "counters", "seed"])
def _draw_flips(
    flips: tl.tensor, first: tl.tensor, counters: tl.tensor, seed: tl.tensor, SIZE: tl.constexpr
) -> None:
    counter = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    w0, w1, w2, w3 = _words(seed, first + counter)
    word = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(SIZE, 4)
    place = 4 * counter[:, None] + tl.arange(0, 4)[None, :]
    tl.store(flips + place, word.to(tl.int32, bitcast=True), mask=(counter < counters)[:, None])


@triton.jit(do_not_specialize=["splits"])
def _add(
    partials: tl.tensor, total: tl.tensor, splits: tl.tensor, size: tl.tensor, SIZE: tl.constexpr
) -> None:
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    added = tl.load(partials + place, mask=place < size)
    for _ in range(1, splits):
        partials += size
        added += tl.load(partials + place, mask=place < size)
    tl.store(total + place, added, mask=place < size)


@triton.jit
def _tile(
    B: tl.tensor,
    D: tl.tensor,
    runs: tl.tensor,
    share: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tensor:
    """Of a program of countsketch: its split, its rows and its places in the runs."""
    columns = tl.cdiv(D, COLUMNS)
    splits = tl.cdiv(runs, share)
    program = tl.program_id(0)
    row = (program // (columns * splits)).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    split = program // columns % splits
    return split, row, program % columns * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def _run(
    run: tl.tensor,
    place: tl.tensor,
    shifts: tl.tensor,
    flips: tl.tensor,
    p: tl.tensor,
    D: tl.tensor,
) -> tl.tensor:
    """The coordinates of a run that are added up at `place`, which of them exist, their signs."""
    i = place - tl.load(shifts + run).to(tl.int32)
    i = tl.cast(run, tl.int64) * D + tl.where(i < 0, i + D, i)
    exists = (place < D) & (i < p)
    word = tl.load(flips + (i >> 5), mask=exists, other=0)
    sign = 1 - 2 * (word >> (i & 31).to(tl.int32) & 1)
    # but for the wrap around they are neighbours in memory, and so their lanes have to be. Nothing
    # is known to be aligned, not even D and strides, so that a lane still reads them one by one
    return tl.max_contiguous(i, 2), exists, sign


@triton.jit(do_not_specialize=["B", "D", "runs", "share", "stride_b", "stride_p"])
def _countsketch(
    x: tl.tensor,
    partials: tl.tensor,
    shifts: tl.tensor,
    flips: tl.tensor,
    B: tl.tensor,
    p: tl.tensor,
    D: tl.tensor,
    runs: tl.tensor,
    share: tl.tensor,
    stride_b: tl.tensor,
    stride_p: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    dtype: tl.constexpr = partials.dtype.element_ty
    split, row, place = _tile(B, D, runs, share, ROWS, COLUMNS)
    x += tl.minimum(row, B - 1)[:, None] * stride_b
    total = tl.zeros([ROWS, COLUMNS], dtype)
    for run in range(split * share, tl.minimum(split * share + share, runs)):
        i, exists, sign = _run(run, place, shifts, flips, p, D)
        spot = x + tl.max_contiguous(i * stride_p, 2)[None, :]
        part = tl.load(spot, mask=exists[None, :], other=0)
        total += part.to(dtype) * sign.to(dtype)[None, :]
    spot = partials + (row + split.to(tl.int64) * B)[:, None] * D + place[None, :]
    tl.store(spot, total, mask=(row < B)[:, None] & (place < D)[None, :])


@triton.jit(do_not_specialize=["B", "D", "runs", "share", "stride_b", "stride_d"])
def _countsketch_adjoint(
    total: tl.tensor,
    x: tl.tensor,
    shifts: tl.tensor,
    flips: tl.tensor,
    B: tl.tensor,
    p: tl.tensor,
    D: tl.tensor,
    runs: tl.tensor,
    share: tl.tensor,
    stride_b: tl.tensor,
    stride_d: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    split, row, place = _tile(B, D, runs, share, ROWS, COLUMNS)
    mask = (row < B)[:, None] & (place < D)[None, :]
    spot = (
        total
        + row[:, None] * stride_b
        + tl.max_contiguous(place.to(tl.int64) * stride_d, 2)[None, :]
    )
    part = tl.load(spot, mask=mask, other=0)
    for run in range(split * share, tl.minimum(split * share + share, runs)):
        i, exists, sign = _run(run, place, shifts, flips, p, D)
        mask = (row < B)[:, None] & exists[None, :]
        spot = x + row[:, None] * p + i[None, :]
        tl.store(spot, part * sign.to(part.dtype)[None, :], mask=mask)


@triton.jit
def _draw_hadamard(matrix: tl.tensor) -> None:
    place = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    bits = place // _WIDTH & place % _WIDTH
    bits ^= bits >> 4
    bits ^= bits >> 2
    bits ^= bits >> 1
    tl.store(matrix + place, (1 - 2 * (bits & 1)).to(matrix.dtype.element_ty))


@triton.jit(do_not_specialize=["first", "seed"])
def _draw_permutations(
    table: tl.tensor, first: tl.tensor, seed: tl.tensor, SIZE: tl.constexpr
) -> None:
    block, place = tl.program_id(0).to(tl.int64), tl.arange(0, SIZE)
    i = (first + block) * SIZE + place
    w0, w1, w2, w3 = _words(seed, i >> 2)
    even, odd = tl.where((i & 2) != 0, w2, w0), tl.where((i & 2) != 0, w3, w1)
    word = tl.where((i & 1) != 0, odd, even).to(tl.int64)
    # words and their places in one number, so that ties go by place
    word = word * SIZE + place
    rank = tl.sum((word[None, :] < word[:, None]).to(tl.int32), axis=1)
    tl.store(table + block * SIZE + rank, place)


@triton.jit(do_not_specialize=["first", "seed"])
def _draw_gains(
    gains: tl.tensor,
    leading: tl.tensor,
    trailing: tl.tensor,
    first: tl.tensor,
    seed: tl.tensor,
    L: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SIZE: tl.constexpr,
) -> None:
    """Gains in the order of the permuted blocks, transposed: [blocks, COLUMNS, ROWS]."""
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    row, column, block = place % ROWS, place // ROWS % COLUMNS, place // (ROWS * COLUMNS)
    exists = (row < L) & (column < T)
    row = tl.load(leading + block * L + row, mask=exists, other=0)
    column = tl.load(trailing + block * T + column, mask=exists, other=0)
    i = tl.cast(first, tl.int64) + (block * (L * T) + row * T + column)
    w0, w1, w2, w3 = _words(seed, i >> 2)
    radius = tl.sqrt(-2.0 * tl.log(_uniform(tl.where((i & 2) != 0, w2, w0))))
    turns = _uniform(tl.where((i & 2) != 0, w3, w1)) - 0.25 * (i & 1).to(tl.float64)
    gain = radius * tl.cos(turns * _TURN) * (L * T) ** -0.5
    tl.store(gains + place, tl.where(exists, gain, 0.0).to(tl.float32))


@triton.jit
def _uniform(word: tl.tensor) -> tl.tensor:
    return (word.to(tl.float64) + 0.5) * 2.0**-32


@triton.jit
def _head(x: tl.tensor) -> tl.tensor:
    """The first 8 significant bits."""
    return (x.to(tl.int32, bitcast=True) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def _thirds(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Three numbers of 8 significant bits that add up to x, exactly."""
    high = _head(x)
    middle = _head(x - high)
    return high.to(dtype), middle.to(dtype), (x - high - middle).to(dtype)


@triton.jit
def _signed_sums(signs: tl.tensor, x: tl.tensor) -> tl.tensor:
    """The product signs x, of signs in bfloat16 and x in float32, to float32's precision."""
    high, middle, low = _thirds(x, signs.dtype)
    return tl.dot(signs, high, tl.dot(signs, middle, tl.dot(signs, low)))


@triton.jit
def _sums_signed(x: tl.tensor, signs: tl.tensor, total: tl.tensor) -> tl.tensor:
    """The sum total + x signs, likewise."""
    high, middle, low = _thirds(x, signs.dtype)
    return tl.dot(high, signs, tl.dot(middle, signs, tl.dot(low, signs, total)))


@triton.jit
def _places(
    L: tl.constexpr, T: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> tl.tensor:
    """Of a block's tile as [ROWS, COLUMNS / 32, 32]: where words begin, places, which exist."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS // 32)[None, :] * 32
    lane = tl.arange(0, 32)[None, None, :]
    word = row * T + column
    return word, word[:, :, None] + lane, (row < L)[:, :, None] & (column[:, :, None] + lane < T)


@triton.jit
def _flip(
    tile: tl.tensor, flips: tl.tensor, word: tl.tensor, place: tl.tensor, SIZE: tl.constexpr
) -> tl.tensor:
    bits = tl.load(flips + (word >> 5), mask=word < SIZE, other=0)
    return tl.where((bits[:, :, None] >> (place & 31) & 1) != 0, -tile, tile)


@triton.jit
def _permuted(permutation: tl.tensor, place: tl.tensor, SIZE: tl.constexpr) -> tl.tensor:
    """Where the rows of Hadamard's matrix begin that come to `place`."""
    return tl.load(permutation + place, mask=place < SIZE, other=0) * _WIDTH


@triton.jit(do_not_specialize=["B", "count", "share"])
def _affd(
    x: tl.tensor,
    partials: tl.tensor,
    matrix: tl.tensor,
    leading: tl.tensor,
    trailing: tl.tensor,
    flips: tl.tensor,
    gains: tl.tensor,
    B: tl.tensor,
    p: tl.tensor,
    stride_b: tl.tensor,
    stride_p: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    share: tl.tensor,
    L: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POINTS: tl.constexpr,
) -> None:
    """One row's share of blocks, transposed when they are transformed: [COLUMNS, ROWS].

    Half of its ROWS are added up onto the other half at once, and all that is folded at the end.
    """
    HALF: tl.constexpr = ROWS // 2
    split, row = tl.program_id(0) // B, (tl.program_id(0) % B).to(tl.int64)
    a, b, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, HALF)
    word, place, exists = _places(L, T, ROWS, COLUMNS)
    none = tl.zeros([COLUMNS, HALF], tl.float32)
    total = none
    for block in range(split * share, tl.minimum(split * share + share, count)):
        start = first + tl.cast(block, tl.int64) * (L * T)
        spot = x + row * stride_b + start * stride_p + place.to(tl.int64) * stride_p
        tile = tl.load(spot, mask=exists & (place < p - start), other=0).to(tl.float32)
        column = _permuted(trailing + block * T, b, T)
        row0 = _permuted(leading + block * L, k, L)
        row1 = _permuted(leading + block * L, k + HALF, L)
        left = tl.load(matrix + column[:, None] + b[None, :])
        right0 = tl.load(matrix + row0[None, :] + a[:, None])
        right1 = tl.load(matrix + row1[None, :] + a[:, None])
        tile = _flip(tile, flips + block * (L * T // 32), word, place, L * T)
        tile = tl.trans(tile.reshape(ROWS, COLUMNS))
        if x.dtype.element_ty == tl.bfloat16:
            tile = tl.dot(left, tile.to(left.dtype))
        else:
            tile = _signed_sums(left, tile)
        gain = gains + (block * COLUMNS + b[:, None]) * ROWS + k[None, :]
        gain0, gain1 = tl.load(gain), tl.load(gain + HALF)
        total += _sums_signed(tile, right0, none) * gain0
        total += _sums_signed(tile, right1, none) * gain1
    FC: tl.constexpr = POINTS if POINTS < T else T
    FR: tl.constexpr = POINTS // FC
    folded = tl.sum(total.reshape(COLUMNS // FC, FC, HALF // FR, FR), axis=2)
    point = tl.arange(0, FR)[None, :] * FC + tl.arange(0, FC)[:, None]
    spot = partials + (split * B + row) * POINTS + point
    tl.store(spot, tl.load(spot) + tl.sum(folded, axis=0))


@triton.jit(do_not_specialize=["B", "count", "share"])
def _affd_adjoint(
    total: tl.tensor,
    x: tl.tensor,
    matrix: tl.tensor,
    leading: tl.tensor,
    trailing: tl.tensor,
    flips: tl.tensor,
    gains: tl.tensor,
    B: tl.tensor,
    p: tl.tensor,
    stride_b: tl.tensor,
    stride_d: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    share: tl.tensor,
    L: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POINTS: tl.constexpr,
) -> None:
    """One row's share of blocks, from the transformed and transposed tile back."""
    HALF: tl.constexpr = ROWS // 2
    FC: tl.constexpr = POINTS if POINTS < T else T
    FR: tl.constexpr = POINTS // FC
    split, row = tl.program_id(0) // B, (tl.program_id(0) % B).to(tl.int64)
    a, b, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, HALF)
    word, place, exists = _places(L, T, ROWS, COLUMNS)
    point = (k % FR)[None, :] * FC + (b % FC)[:, None]
    folded = tl.load(total + row * stride_b + point.to(tl.int64) * stride_d).to(tl.float32)
    none = tl.zeros([COLUMNS, ROWS], tl.float32)
    for block in range(split * share, tl.minimum(split * share + share, count)):
        start = first + tl.cast(block, tl.int64) * (L * T)
        gain = gains + (block * COLUMNS + b[:, None]) * ROWS + k[None, :]
        gain0, gain1 = tl.load(gain), tl.load(gain + HALF)
        column = _permuted(trailing + block * T, b, T)
        row0 = _permuted(leading + block * L, k, L)
        row1 = _permuted(leading + block * L, k + HALF, L)
        left = tl.load(matrix + column[:, None] + b[None, :])
        right0 = tl.load(matrix + row0[:, None] + a[None, :])
        right1 = tl.load(matrix + row1[:, None] + a[None, :])
        tile = _sums_signed(folded * gain0, right0, none)
        tile = _sums_signed(folded * gain1, right1, tile)
        tile = _sums_signed(tl.trans(tile), left, tl.trans(none))
        tile = tile.reshape(ROWS, COLUMNS // 32, 32)
        tile = _flip(tile, flips + block * (L * T // 32), word, place, L * T)
        tl.store(x + row * p + start + place, tile, mask=exists & (place < p - start))


@triton.jit
def _hadamard(
    rows: tl.tensor,
    result: tl.tensor,
    matrix: tl.tensor,
    stride_b: tl.tensor,
    stride_n: tl.tensor,
    L: tl.constexpr,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    a, b = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    place = a[:, None] * T + b[None, :]
    exists = (a < L)[:, None] & (b < T)[None, :]
    tile = tl.load(rows + row * stride_b + place.to(tl.int64) * stride_n, mask=exists, other=0)
    left = tl.load(matrix + a[:, None] * _WIDTH + a[None, :])
    right = tl.load(matrix + b[:, None] * _WIDTH + b[None, :])
    tile = _signed_sums(left, tile.to(tl.float32))
    tile = _sums_signed(tile, right, tl.zeros([ROWS, COLUMNS], tl.float32))
    tl.store(result + row * (L * T) + place, tile, mask=exists)
