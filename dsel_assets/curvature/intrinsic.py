"""Intrinsic dimension: the smallest random subspace in which training reaches a target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from dsel_assets.sketching import ModelSketch
from dsel_assets.sketching.operator import accumulation_dtype

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Round:
    """The score after `step` steps, the last of them in `dimension` dimensions."""

    step: int
    dimension: int
    score: float


@dataclass(frozen=True)
class IntrinsicDimension:
    """What `search_intrinsic_dimension` found.

    dimension    in which the target was reached; 0 if the start is there already
    history      of the search, the start first
    verified     whether half of it, trained from the start for as many steps, stays below the
                 target; None if that was not asked
    verification the history of that run
    """

    dimension: int
    history: list[Round]
    verified: bool | None
    verification: list[Round]


class NotReachedError(RuntimeError):
    """The target needs more dimensions than the sketch has. `history` tells how far it came."""

    def __init__(self, message: str, history: list[Round]) -> None:
        super().__init__(message)
        self.history = history


def search_intrinsic_dimension(
    parameters: Mapping[str, Tensor],
    gradient: Callable[[Tensors, int], Mapping[str, Tensor]],
    evaluate: Callable[[Tensors], float],
    sketch: ModelSketch,
    *,
    target: float,
    delta: float,
    steps: int,
    start: int = 1,
    lr: float = 1e-3,
    verify: bool = True,
) -> IntrinsicDimension:
    """The dimension that training needs, searched for in one run (arXiv:2402.03994).

    Training moves theta0 + S'w along the first d coordinates of w. Every `steps` steps the score is
    taken: at the target, d is the answer; if it has risen by less than `delta`, d doubles. Nothing
    is reset. Then half of d is trained from theta0: if it stays below the target, d is right within
    a factor of 2; if not, d is an upper bound, as steps in fewer dimensions were spent on the way.

    parameters: theta0. gradient(parameters, step): of the loss at these parameters, by name, on
    whatever batch belongs to this step (they count from 0 in both runs).
    evaluate(parameters): the score, higher is better. target, delta: in its units.
    sketch: S, of the parameters' shapes; its out_features is D_max. Take one whose first d rows are
    a sketch too, as they are of `affd` and the dense ones; those of `countsketch` reach d/D_max of
    the parameters only.
    start: the first d. lr: of Adam.

    The paper is silent on two points. S keeps its scale, that of D_max: a step of Adam moves each
    open coordinate by about lr, hence the parameters by lr * sqrt(d p / D_max) all in all, lr each
    when d = D_max. And coordinates opened by a doubling start with fresh moments and their own bias
    correction, so that their first step is of length lr too, while the others keep theirs.

    Raises NotReachedError if d would have to exceed D_max; ValueError for numbers out of range, for
    a score that is not finite, and for names and shapes that are not the sketch's.
    """
    if not 1 <= start <= sketch.out_features or steps < 1 or not delta > 0 or not lr > 0:
        raise ValueError(
            f"need 1 <= start <= {sketch.out_features}, steps >= 1, delta > 0 and lr > 0, "
            f"got start={start}, steps={steps}, delta={delta}, lr={lr}"
        )
    point = {name: tensor.detach() for name, tensor in parameters.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in point.items()}
    if shapes != sketch.shapes:
        raise ValueError(f"the sketch is of {sketch.shapes}, the parameters are {shapes}")

    def score(values: Tensors) -> float:
        result = float(evaluate(values))
        if not math.isfinite(result):
            raise ValueError(f"the score is {result}: the training diverged or cannot be judged")
        return result

    def run(subspace: _Subspace) -> Iterator[float]:
        step = 0
        while True:
            for _ in range(steps):
                subspace.step(gradient(subspace.parameters(), step))
                step += 1
            yield score(subspace.parameters())

    history = [Round(0, 0, score(point))]
    if history[0].score >= target:
        return IntrinsicDimension(0, history, True if verify else None, [])
    subspace = _Subspace(point, sketch, start, lr)
    for reached in run(subspace):
        history.append(Round(len(history) * steps, subspace.dimension, reached))
        if reached >= target:
            break
        if reached - history[-2].score < delta:
            if 2 * subspace.dimension > sketch.out_features:
                best = max(known.score for known in history)
                raise NotReachedError(
                    f"the target {target} was not reached in {subspace.dimension} dimensions of "
                    f"{sketch.out_features} at most; the best score was {best}",
                    history,
                )
            subspace.open(subspace.dimension)

    half = subspace.dimension // 2
    verification = history[:1]
    if not verify:
        return IntrinsicDimension(subspace.dimension, history, None, [])
    if half:
        for reached in run(_Subspace(point, sketch, half, lr)):
            verification.append(Round(len(verification) * steps, half, reached))
            if reached >= target or len(verification) == len(history):
                break
    verified = verification[-1].score < target
    return IntrinsicDimension(subspace.dimension, history, verified, verification)


class _Subspace:
    """theta0 + S'w with the first coordinates of w trained by Adam, opened a segment at a time."""

    def __init__(self, point: Tensors, sketch: ModelSketch, dimension: int, lr: float) -> None:
        self.point, self.sketch = point, sketch
        self.segments = [self._segment(dimension)]
        self.optimiser = torch.optim.Adam(self.segments, lr=lr)

    @property
    def dimension(self) -> int:
        return sum(len(segment) for segment in self.segments)

    def open(self, count: int) -> None:
        """Train `count` coordinates more."""
        self.segments.append(self._segment(count))
        self.optimiser.add_param_group({"params": self.segments[-1:]})

    def _segment(self, count: int) -> Tensor:
        like = next(iter(self.point.values()))
        return like.new_zeros(count, dtype=accumulation_dtype(like.dtype)).requires_grad_()

    @torch.no_grad()
    def parameters(self) -> Tensors:
        """theta0 + S'w by name."""
        w = pad(torch.cat(self.segments), (0, self.sketch.out_features - self.dimension))
        moved = self.sketch.adjoint(w[None])
        return {name: tensor + moved[name][0].to(tensor) for name, tensor in self.point.items()}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """One of Adam's, along the sketched gradient."""
        sketched = self.sketch({name: tensor[None] for name, tensor in gradients.items()})[0]
        sizes = [len(segment) for segment in self.segments]
        parts = sketched[: self.dimension].split(sizes)
        for segment, part in zip(self.segments, parts, strict=True):
            segment.grad = part
        self.optimiser.step()
