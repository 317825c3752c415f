"""Coordinates in blocks of a power of two."""

from __future__ import annotations

from torch import Tensor

BLOCK = 2**14  # coordinates that an operator works on at a time


def next_power_of_two(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def block_sizes(features: int, least: int, block: int = BLOCK) -> list[int]:
    """Of the blocks that cover the coordinates: `block` (or `least`, if more) each.

    The last one is the least power of two, `least` at the minimum, that holds the rest.
    """
    block = max(block, least)
    blocks, rest = divmod(features, block)
    return [block] * blocks + ([max(least, next_power_of_two(rest))] if rest else [])


def factors(size: int, count: int) -> tuple[int, ...]:
    """A power of two as a product of `count` that are as equal as can be, smaller ones leading."""
    exponent = size.bit_length() - 1
    return tuple(1 << (exponent + i) // count for i in range(count))


def fold(x: Tensor, size: int) -> Tensor:
    """Add the rows whose indices agree modulo `size`: [n, ...] -> [size, ...], powers of two."""
    while len(x) > size:
        x = x[: len(x) // 2] + x[len(x) // 2 :]
    return x
