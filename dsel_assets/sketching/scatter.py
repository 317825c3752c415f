"""Adding rows at given places, with the same bits at every call."""

from __future__ import annotations

from torch import Tensor


def add_rows(total: Tensor, places: Tensor, rows: Tensor) -> None:
    """total[places[i]] += rows[i], in the order of i: [m, B], [n] int64, [n, B]."""
    if total.device.type == "cuda":
        total.index_put_((places,), rows, accumulate=True)  # sorts; index_add_ is atomic there
    else:
        total.index_add_(0, places, rows)
