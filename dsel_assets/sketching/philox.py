"""Counter-based random numbers: Philox 4x32-10 (Salmon et al., SC 2011), the same on every device.

A stream is a 64-bit key made from (seed, tensor name, purpose); element i of a stream depends on
the key and on i alone, so any piece can be drawn without drawing what stands before it. The
integers are equal bit for bit on every device; `normals` agree to an ulp of its logarithm.
"""

from __future__ import annotations

import hashlib
import json

import torch
from torch import Tensor

Key = tuple[int, int]
Device = torch.device | str

_LOW = 0xFFFFFFFF
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def philox(counter: Tensor, key: Key) -> Tensor:
    """Philox 4x32-10 of counters [..., 4] under one key of two 32-bit words: [..., 4].

    Both are int64 that hold 32-bit words, since torch has no arithmetic on uint32.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(_ROUNDS):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # wrap around as they should
        c0 = (second >> 32 & _LOW) ^ c1 ^ k0
        c2 = (first >> 32 & _LOW) ^ c3 ^ k1
        c1, c3 = second & _LOW, first & _LOW
        k0, k1 = (k0 + WEYL[0]) & _LOW, (k1 + WEYL[1]) & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


def stream_key(seed: int, name: str, stream: str) -> Key:
    """The key of one stream: a BLAKE2b hash of the seed, the tensor's name and the purpose."""
    digest = hashlib.blake2b(json.dumps([seed, name, stream]).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def words(key: Key, start: int, count: int, device: Device = "cpu") -> Tensor:
    """Words start .. start+count-1 of the stream, uniform on 32 bits: [count] int64."""
    blocks = torch.arange(start // 4, -(-(start + count) // 4), device=device)
    none = torch.zeros_like(blocks)
    counter = torch.stack((blocks & _LOW, blocks >> 32, none, none), dim=-1)
    return philox(counter, key).flatten()[start % 4 :][:count]


def signs(key: Key, start: int, count: int, device: Device = "cpu") -> Tensor:
    """Fair signs, one bit each (bit i mod 32 of word i // 32): [count] int8 of +1 and -1."""
    first = start // 32
    packed = words(key, first, -(-(start + count) // 32) - first, device)
    bits = packed[:, None] >> torch.arange(32, device=device) & 1
    return (1 - 2 * bits).to(torch.int8).flatten()[start % 32 :][:count]


def normals(key: Key, start: int, count: int, device: Device = "cpu") -> Tensor:
    """Independent N(0, 1) by Box-Muller, a pair from words 2i and 2i+1: [count] float64."""
    first = start // 2
    pairs = -(-(start + count) // 2) - first
    uniform = (words(key, 2 * first, 2 * pairs, device).double() + 0.5) * 2.0**-32
    radius = (-2.0 * uniform[::2].log()).sqrt()
    angle = 2.0 * torch.pi * uniform[1::2]
    values = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1)
    return values.flatten()[start % 2 :][:count]


def integers(key: Key, start: int, count: int, bound: int, device: Device = "cpu") -> Tensor:
    """Integers on 0 .. bound-1 (bound <= 2**31), one word each: [count] int64."""
    return words(key, start, count, device) * bound >> 32


def permutations(key: Key, first: int, count: int, size: int, device: Device = "cpu") -> Tensor:
    """Random permutations first .. first+count-1 of 0 .. size-1: [count, size] int64.

    Each is the order of `size` words, ties by position.
    """
    drawn = words(key, first * size, count * size, device).reshape(count, size)
    return drawn.argsort(dim=1, stable=True)


def permutation(key: Key, size: int, device: Device = "cpu") -> Tensor:
    """The first of the stream's permutations of 0 .. size-1: [size] int64."""
    return permutations(key, 0, 1, size, device)[0]
