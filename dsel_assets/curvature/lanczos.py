"""Lanczos with full re-orthogonalisation, its state on disk so that it can be killed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsel_assets.sketching.philox import normals, stream_key

Matvec = Callable[[Tensor], Tensor]
Coefficients = NDArray[np.float64]
_INVARIANT = 1e-12
_SAME_OPERATOR = 1e-4


@dataclass(frozen=True)
class Krylov:
    """H Q' = Q' T + (beside[-1] q) e_m', Q the basis and T tridiagonal; all float64.

    basis    [m, dim] orthonormal rows
    diagonal [m] of T
    beside   [m] what stands beside it, then the norm of what is left over
    """

    basis: Tensor
    diagonal: Coefficients
    beside: Coefficients


class StateError(ValueError):
    """The state on disk is damaged, or belongs to another run; the message says what differs."""


def lanczos(
    product: Matvec,
    dim: int,
    steps: int,
    *,
    seed: int = 0,
    enough: Callable[[Coefficients, Coefficients], bool] | None = None,
    state: str | Path | None = None,
    every: int = 20,
    settings: dict[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> Krylov:
    """An orthonormal basis of the Krylov space of a random vector, and H in it.

    product: v -> H v for a symmetric H, from float64 [dim] on `device` to the same.
    enough: looks at (diagonal, beside) every five steps and may end it.
    state: a safetensors file that holds the basis every `every` steps (temporary name, fsync,
    rename); if it is there, the run goes on from it, with the same bits as if it had not been
    interrupted, given products with the same bits. A longer run may go on from a shorter one's.
    It stays; delete it once the result is safe. settings: plain values that it must agree in.

    Every vector is orthogonalised against all before it, twice where that takes much away; where
    the space is invariant before the steps are done, it goes on in a random direction orthogonal to
    it.

    Raises StateError for a state of other settings, of another operator (its first step is
    repeated, and must agree to 1e-4), or one that cannot be read.
    """
    made_of = {"version": 1, "dim": dim, "seed": seed} | (settings or {})
    basis = torch.empty(steps, dim, dtype=torch.float64, device=device)
    diagonal, beside = np.zeros(steps), np.zeros(steps)

    def gaussian(stream: str) -> Tensor:
        return normals(stream_key(seed, "lanczos", stream), 0, dim, device)

    first = 0
    if state is not None and steps > 1 and Path(state).is_file():
        first = _load(Path(state), made_of, basis, diagonal, beside)
        _check_operator(Path(state), product, basis, diagonal, beside)
        if enough and first % 5 == 0 and enough(diagonal[:first], beside[:first]):
            steps = first
    else:
        basis[0] = _normalised(gaussian("start"))
    for j in range(first, steps):
        w = product(basis[j])
        diagonal[j] = torch.dot(basis[j], w).item()
        done = j + 1
        w = _orthogonalised(w, basis[max(0, j - 1) : done])  # enough, but for rounding
        w = _orthogonalised(w, basis[:done])
        beside[j] = w.norm().item()
        if done == steps:
            break
        if beside[j] <= _INVARIANT * np.abs([diagonal[:done], beside[:done]]).max():
            beside[j] = 0.0
            w = _orthogonalised(gaussian(f"restart {j}"), basis[:done])
        basis[done] = _normalised(w)
        if state is not None and done % every == 0:
            _save(Path(state), made_of, basis[: done + 1], diagonal[:done], beside[:done])
        if enough and done % 5 == 0 and enough(diagonal[:done], beside[:done]):
            steps = done
            break
    return Krylov(basis[:steps], diagonal[:steps], beside[:steps])


def _orthogonalised(w: Tensor, basis: Tensor) -> Tensor:
    """Twice is enough, and once where little is taken away (Daniel et al. 1976)."""
    for _ in range(2):
        before = w.norm()
        w = w - (basis @ w) @ basis
        if w.norm() > 0.7 * before:
            break
    return w


def _normalised(w: Tensor) -> Tensor:
    return w / w.norm()


def _save(
    path: Path, made_of: dict[str, Any], basis: Tensor, diagonal: Coefficients, beside: Coefficients
) -> None:
    tensors = {
        "basis": basis.cpu(),
        "diagonal": torch.from_numpy(diagonal),
        "beside": torch.from_numpy(beside),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    save_file(tensors, part, metadata={"made_of": json.dumps(made_of)})
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.rename(path)


def _load(
    path: Path, made_of: dict[str, Any], basis: Tensor, diagonal: Coefficients, beside: Coefficients
) -> int:
    """Fill in what is known; how many steps that is."""
    try:
        with safe_open(path, "pt") as file:
            known = json.loads(file.metadata()["made_of"])
            if known != made_of:
                both = known.keys() | made_of.keys()
                differs = sorted(name for name in both if known.get(name) != made_of.get(name))
                raise StateError(
                    f"{path} is of another run, which differs in {', '.join(differs)}; "
                    "delete it to start anew"
                )
            done = min(len(diagonal), file.get_slice("diagonal").get_shape()[0])
            rows = min(len(basis), done + 1)
            basis[:rows] = file.get_slice("basis")[:rows].to(basis)
            diagonal[:done] = file.get_slice("diagonal")[:done].numpy()
            beside[:done] = file.get_slice("beside")[:done].numpy()
            return done
    except StateError:
        raise
    except (SafetensorError, ValueError, TypeError, KeyError, OSError) as error:
        raise StateError(f"{path} cannot be read ({error}); delete it to start anew") from error


def _check_operator(
    path: Path, product: Matvec, basis: Tensor, diagonal: Coefficients, beside: Coefficients
) -> None:
    expected = diagonal[0] * basis[0] + beside[0] * basis[1]
    if (product(basis[0]) - expected).norm() > _SAME_OPERATOR * expected.norm():
        raise StateError(f"{path} is of another operator; delete it to start anew")
