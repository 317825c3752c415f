"""Counter-based random numbers: Philox 4x32-10 (Salmon et al., SC 2011), the same on every machine.

A stream is a 64-bit key made from (seed, tensor name, purpose); element i of a stream depends on
the key and on i alone, so any piece can be drawn without drawing what stands before it.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

Key = tuple[int, int]

_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox(counter: NDArray[np.uint32], key: Key) -> NDArray[np.uint32]:
    """Philox 4x32-10 of counters [..., 4] under one key of two 32-bit words: [..., 4] uint32."""
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0 = (second >> _SHIFT) ^ c1 ^ np.uint64(k0)
        c1 = second & _LOW
        c2 = (first >> _SHIFT) ^ c3 ^ np.uint64(k1)
        c3 = first & _LOW
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return np.stack((c0, c1, c2, c3), axis=-1).astype(np.uint32)


def stream_key(seed: int, name: str, stream: str) -> Key:
    """The key of one stream: a BLAKE2b hash of the seed, the tensor's name and the purpose."""
    digest = hashlib.blake2b(json.dumps([seed, name, stream]).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def words(key: Key, start: int, count: int) -> NDArray[np.uint32]:
    """Words start .. start+count-1 of the stream, uniform on 32 bits: [count] uint32."""
    blocks = np.arange(start // 4, -(-(start + count) // 4), dtype=np.uint64)
    counter = np.zeros((len(blocks), 4), dtype=np.uint32)
    counter[:, 0] = blocks & _LOW
    counter[:, 1] = blocks >> _SHIFT
    return philox(counter, key).reshape(-1)[start % 4 :][:count]


def signs(key: Key, start: int, count: int) -> NDArray[np.int8]:
    """Fair signs, one bit each (bit i mod 32 of word i // 32): [count] int8 of +1 and -1."""
    first = start // 32
    packed = words(key, first, -(-(start + count) // 32) - first)
    bits = np.unpackbits(packed.astype("<u4").view(np.uint8), bitorder="little")
    return (1 - 2 * bits.astype(np.int8))[start % 32 :][:count]


def normals(key: Key, start: int, count: int) -> NDArray[np.float64]:
    """Independent N(0, 1) by Box-Muller, a pair from words 2i and 2i+1: [count] float64."""
    first = start // 2
    pairs = -(-(start + count) // 2) - first
    uniform = (words(key, 2 * first, 2 * pairs).reshape(-1, 2) + 0.5) * 2.0**-32
    radius = np.sqrt(-2.0 * np.log(uniform[:, 0]))
    angle = 2.0 * np.pi * uniform[:, 1]
    values = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=-1)
    return values.reshape(-1)[start % 2 :][:count]


def integers(key: Key, start: int, count: int, bound: int) -> NDArray[np.int64]:
    """Integers on 0 .. bound-1 (bound <= 2**32), one word each: [count] int64."""
    product = words(key, start, count).astype(np.uint64) * np.uint64(bound)
    return (product >> _SHIFT).astype(np.int64)


def permutation(key: Key, size: int) -> NDArray[np.int64]:
    """A random permutation: the order of the first `size` words, ties by position."""
    return np.argsort(words(key, 0, size), kind="stable")
