"""Kronecker products of small random orthogonal matrices."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from dsel_assets.sketching.philox import Key, normals


def haar(
    key: Key, rows: Sequence[int], columns: Sequence[int], device: torch.device
) -> list[Tensor]:
    """The first rows of independent Haar orthogonal matrices: [m_i, n_i] float32 each, m_i <= n_i.

    The Q of a Gaussian's QR with the signs that make R's diagonal positive: fewer rows are a cut of
    more. Computed in float64 on the CPU, so that after rounding every device has the same numbers.
    """
    matrices = []
    start = 0
    for m, n in zip(rows, columns, strict=True):
        q, r = torch.linalg.qr(normals(key, start, m * n).view(m, n).T)
        matrices.append((q * r.diagonal().sign()).T.to(device, torch.float32))
        start += n * n
    return matrices


def kronecker(matrices: Sequence[Tensor], x: Tensor) -> Tensor:
    """(A_1 kron ... kron A_K) x, A_i of shape [m_i, n_i]: [prod n_i, B] -> [prod m_i, B].

    The factor that shrinks x most comes first. Sums run entry by entry in the order of the columns:
    a matrix product would choose its order, hence its bits, by the batch's shape.
    """
    shape = [matrix.shape[1] for matrix in matrices]
    batch = x.shape[1]

    def ratio(axis: int) -> float:
        return matrices[axis].shape[0] / matrices[axis].shape[1]

    for axis in sorted(range(len(shape)), key=ratio):
        columns = matrices[axis].T.to(x.dtype)
        x = x.reshape(prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :]) * batch)
        shape[axis] = columns.shape[1]
        total = x.new_zeros(len(x), shape[axis], x.shape[2])
        for column, part in zip(columns, x.unbind(1), strict=True):
            total += column[:, None] * part[:, None]
        x = total
    return x.reshape(prod(shape), batch)
