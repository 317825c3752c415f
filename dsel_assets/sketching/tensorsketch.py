"""TensorSketch (Pham and Pagh 2013) of linear layers' gradients, which are never formed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dsel_assets.sketching.matrix import MatrixSketch, sum_over_tokens
from dsel_assets.sketching.operator import accumulation_dtype
from dsel_assets.sketching.philox import integers, permutation, signs

_CHUNK = 2**19  # numbers of one signal that exist at a time
_BLOCK = 2**14  # entries of a matrix whose buckets exist at a time
_SMALL = 64  # of many tokens, a matrix of so many times D entries is sooner formed than transformed


class Side(NamedTuple):
    """Of each index of one side of the matrix: its place, int64, and its sign, float32."""

    places: Tensor
    signs: Tensor

    def to(self, device: torch.device) -> Side:
        """The same on another device."""
        return Side(self.places.to(device), self.signs.to(device))


class TensorSketch(MatrixSketch):
    """A CountSketch of matrices whose bucket and sign are made of the row's and of the column's.

    The D buckets are q circles of L. An index of the longer side of the matrix has a random circle
    and place, an index of the shorter one a number of steps from there. So the sketch of d x^T is a
    circular convolution of the longer vector's sketch, on all circles, with the shorter one's, on
    one: FFTs of length L for every token, products summed over tokens in the frequency domain, one
    inverse FFT an example. q is the largest divisor of D with L no less than the shorter side. With
    q = 1 it is Pham and Pagh's sketch; a larger q halves the work and costs no accuracy.

    Steps are 0, 1, 2, ..., with a random shift for each run of D if the side is longer than D. Each
    run of D indices of the longer side lies on D distinct places. It is unbiased nonetheless: for
    that, signs suffice, whatever the buckets. Entries of a row or column then never collide, but
    for sides longer than D. Two entries at lines j, j' of the longer side and i, i' of the shorter
    one do if j' lies i - i' steps after j, which has probability 1/(D-1) at most. Hence for every
    matrix D * Var(|Sx|^2) / |x|^4 is at most 2 D/(D-1), as for a CountSketch, and about 2 more for
    each side longer than D, since then whole rows or columns may meet.

    Keeps 2 (rows + columns) numbers. Time T (D log L + rows + columns) from T factors, rows columns
    from the matrix. A prime D, which FFTs do not like, is up to 40 times slower.
    """

    kind = "tensorsketch"
    variance = 8.0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        seed: int = 0,
        name: str = "",
        *,
        columns: int = 1,
    ) -> None:
        """See `MatrixSketch`."""
        super().__init__(in_features, out_features, seed, name, columns=columns)
        D, short, long = out_features, *sorted((self.rows, columns))
        self.circle = min(n for n in range(1, D + 1) if D % n == 0 and n >= min(short, D))
        shifts = integers(self.key("shifts"), 0, -(-short // D), D) * (short > D)
        steps = torch.arange(short, device="cpu") + shifts.repeat_interleave(D)[:short]
        runs = [permutation(self.key(f"places/{run}"), D) for run in range(-(-long // D))]
        self.short = Side(steps % self.circle, signs(self.key("short"), 0, short).float())
        self.long = Side(torch.cat(runs)[:long], signs(self.key("long"), 0, long).float())

    def _of_factors(self, inputs: Tensor, output_gradients: Tensor, dtype: torch.dtype) -> Tensor:
        D, circle, T = self.out_features, self.circle, inputs.shape[1]
        if self.in_features * (T + _SMALL) <= _SMALL * D * T:
            return self._of_products(inputs, output_gradients, dtype)
        chunk = max(_CHUNK // D, 1)
        short, long = self.short.to(inputs.device), self.long.to(inputs.device)
        steps, circles = (inputs.new_zeros(chunk, n, circle, dtype=dtype) for n in (1, D // circle))

        def transformed(x: Tensor, d: Tensor) -> Tensor:
            narrow, wide = (x, d) if self.rows >= self.columns else (d, x)
            spectrum = _spectrum(wide.flatten(0, 1), long, circles)
            spectrum *= _spectrum(narrow.flatten(0, 1), short, steps)
            return spectrum.unflatten(0, x.shape[:2]).sum(1)

        spectra = sum_over_tokens(transformed, inputs, output_gradients, chunk)
        return torch.fft.irfft(spectra, n=circle).flatten(1)

    def _of_products(self, inputs: Tensor, output_gradients: Tensor, dtype: torch.dtype) -> Tensor:
        """By way of the matrices themselves, some examples at a time."""

        def product(x: Tensor, d: Tensor) -> Tensor:
            return (d.to(dtype).mT @ x.to(dtype)).flatten(1)

        chunk = max(_CHUNK // max(self.rows, self.columns), 1)
        together = max(_CHUNK // self.in_features, 1)
        parts = zip(inputs.split(together), output_gradients.split(together), strict=True)
        return torch.cat([self._partial(sum_over_tokens(product, *f, chunk)) for f in parts])

    def _of_lookups(self, indices: Tensor, output_gradients: Tensor, dtype: torch.dtype) -> Tensor:
        rows, columns = self._sides(indices.device)

        def shifted(index: Tensor, d: Tensor) -> Tensor:
            buckets = self._buckets(rows.places[index][..., None], columns.places)
            values = (d * columns.signs * rows.signs[index][..., None]).to(dtype)
            total = values.new_zeros(len(d), self.out_features)
            return total.scatter_add_(1, buckets.flatten(1), values.flatten(1))

        return sum_over_tokens(shifted, indices, output_gradients, _CHUNK // self.columns)

    def _partial(self, x: Tensor) -> Tensor:
        total = x.new_zeros(len(x), self.out_features, dtype=accumulation_dtype(x.dtype))
        matrices = x.unflatten(1, (self.rows, self.columns))
        for rows, columns, buckets, flips in self._blocks(x.device):
            part = (matrices[:, rows, columns] * flips).flatten(1)
            total.scatter_add_(1, buckets.flatten().expand(len(x), -1), part)
        return total

    def _partial_adjoint(self, total: Tensor) -> Tensor:
        x = total.new_empty(len(total), self.rows, self.columns)
        for rows, columns, buckets, flips in self._blocks(total.device):
            part = total.index_select(1, buckets.flatten()).unflatten(1, buckets.shape)
            torch.mul(part, flips, out=x[:, rows, columns])
        return x.flatten(1)

    def _blocks(self, device: torch.device) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """Pieces of the matrix: rows, columns, their entries' buckets and signs.

        At most D indices of the longer side and, but on a CPU, which adds in order, one of the
        shorter: no bucket stands there twice, so that nothing depends on the order.
        """
        rows, columns = self._sides(device)
        D, short, long = self.out_features, len(self.short.places), len(self.long.places)
        step = max(_BLOCK // min(D, long), 1) if device.type == "cpu" else 1
        for i in range(0, short, step):
            for j in range(0, long, D):
                r, c = slice(i, i + step), slice(j, j + D)
                r, c = (c, r) if self.rows >= self.columns else (r, c)
                buckets = self._buckets(rows.places[r, None], columns.places[c])
                yield r, c, buckets, rows.signs[r, None] * columns.signs[c]

    def _sides(self, device: torch.device) -> tuple[Side, Side]:
        """Rows and columns."""
        short, long = self.short.to(device), self.long.to(device)
        return (long, short) if self.rows >= self.columns else (short, long)

    def _buckets(self, places: Tensor, others: Tensor) -> Tensor:
        """Where the places of two lines meet, one of the longer side and one of the shorter."""
        circles = places // self.circle + others // self.circle  # 0 for the shorter side
        return circles * self.circle + (places + others) % self.circle


def _spectrum(values: Tensor, side: Side, signals: Tensor) -> Tensor:
    """FFTs of the sketches of vectors: [m, k] -> [m, q, L/2+1], by way of signals [>= m, q, L]."""
    signals = signals[: len(values)]
    flat, places = signals.flatten(1), side.places.expand(len(values), -1)
    signed = (values * side.signs).to(signals.dtype)
    if len(side.places) <= flat.shape[1]:
        flat.scatter_(1, places, signed)  # on distinct places: the others stay zero
    else:
        flat.zero_().scatter_add_(1, places, signed)
    return torch.fft.rfft(signals)
