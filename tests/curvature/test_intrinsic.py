"""The one-run search on quadratics whose minimum needs a known number of directions."""

import pytest
import torch

from dsel_assets.curvature import NotReachedError, search_intrinsic_dimension
from dsel_assets.sketching import ModelSketch


class Quadratic:
    """|P theta - goal|^2 with P of `need` orthonormal rows: a random subspace of `need` dimensions
    holds a minimum, one of half as many leaves about half of the loss.
    """

    def __init__(self, need, p=120, seed=0, dtype=torch.float32):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.linalg.qr(torch.randn(p, need, generator=generator).to(dtype))[0].T
        self.P, goal = rows, torch.randn(need, generator=generator).to(dtype)
        self.goal = goal / goal.norm()
        self.start = {"a": torch.zeros(p // 4, 2, dtype=dtype), "b": torch.zeros(p // 2).to(dtype)}
        self.asked = []

    def residual(self, parameters):
        flat = torch.cat([tensor.flatten() for tensor in parameters.values()])
        return self.P @ flat - self.goal

    def gradient(self, parameters, step):
        self.asked.append(step)
        flat = self.P.T @ self.residual(parameters)
        half = len(flat) // 2
        return {"a": flat[:half].reshape(-1, 2), "b": flat[half:]}

    def score(self, parameters):
        return 1 - self.residual(parameters).square().sum().item()

    def sketch(self, D=32, kind="gaussian", seed=0):
        return ModelSketch({k: t.shape for k, t in self.start.items()}, kind, D, seed)

    def search(self, sketch=None, **options):
        known = {"target": 0.9, "delta": 0.02, "steps": 40, "lr": 0.03}
        return search_intrinsic_dimension(
            self.start, self.gradient, self.score, sketch or self.sketch(), **known | options
        )


@pytest.mark.parametrize("seed", range(3))
def test_within_a_factor_of_two(seed):
    problem = Quadratic(12, seed=seed)
    found = problem.search(problem.sketch(seed=seed), start=2)
    assert 12 / 2 <= found.dimension <= 12 * 2
    assert found.verified
    # half of it, for as many steps, stays below the target
    assert [known.dimension for known in found.verification[1:]] == [found.dimension // 2] * (
        len(found.history) - 1
    )
    assert max(known.score for known in found.verification) < 0.9 <= found.history[-1].score
    assert [known.step for known in found.history] == [40 * i for i in range(len(found.history))]


def test_enough_directions_reach_the_target_and_half_do_not():
    problem = Quadratic(12)
    assert problem.search(start=24, verify=False).dimension == 24
    with pytest.raises(
        NotReachedError, match=r"not reached in 5 dimensions of 5 at most"
    ) as raised:
        problem.search(problem.sketch(5), start=5)
    history = raised.value.history
    assert len(history) > 2 and max(known.score for known in history) < 0.9


def test_it_doubles_only_when_the_score_stalls():
    found = Quadratic(12).search(start=2)
    rounds = found.history[1:]
    assert found.history[0].dimension == 0 and rounds[0].dimension == 2
    for before, now, after in zip(found.history, rounds, rounds[1:], strict=False):
        stalled = now.score - before.score < 0.02
        assert after.dimension == now.dimension * (2 if stalled else 1)
    assert {known.dimension for known in rounds} == {2, 4, 8, 16}


def test_nothing_is_reset():
    """The score does not fall back when a dimension opens, and the steps count on."""
    problem = Quadratic(12)
    found = problem.search(start=2, verify=False)
    for before, now in zip(found.history, found.history[1:], strict=False):
        assert now.score > before.score - 0.02
    assert problem.asked == list(range(found.history[-1].step))
    assert found.verified is None and found.verification == []


def test_only_open_coordinates_move():
    """After the first round the parameters lie in the span of the first rows of S."""
    problem, seen = Quadratic(12, dtype=torch.float64), []

    def score(parameters):
        seen.append(torch.cat([tensor.flatten() for tensor in parameters.values()]))
        return float(len(seen))

    S = problem.sketch(8)
    search_intrinsic_dimension(
        problem.start, problem.gradient, score, S, target=3, delta=1.5, steps=5, start=3
    )
    rows = S.adjoint(torch.eye(8, dtype=torch.float64))
    basis = torch.cat([tensor.flatten(1) for tensor in rows.values()], 1)
    assert seen[0].norm() == 0
    for count, moved in zip((3, 6), seen[1:3], strict=True):
        inside = torch.linalg.lstsq(basis[:count].T, moved[:, None]).solution
        assert (basis[:count].T @ inside - moved[:, None]).norm() < 1e-10 * moved.norm()
        coordinates = inside.flatten().abs()
        assert (coordinates > 0).all()


def test_the_first_step_of_a_coordinate_is_of_length_lr():
    """Also of one that opens later: its moments and their bias correction are its own."""
    problem, seen = Quadratic(12, dtype=torch.float64), []
    S = problem.sketch(4)
    rows = S.adjoint(torch.eye(4, dtype=torch.float64))
    basis = torch.cat([tensor.flatten(1) for tensor in rows.values()], 1)

    def gradient(parameters, step):
        return {name: torch.ones_like(tensor) for name, tensor in parameters.items()}

    def score(parameters):
        flat = torch.cat([tensor.flatten() for tensor in parameters.values()])
        seen.append(torch.linalg.lstsq(basis.T, flat[:, None]).solution.flatten().abs())
        return 0.0

    with pytest.raises(NotReachedError):
        search_intrinsic_dimension(
            problem.start, gradient, score, S, target=1, delta=1, steps=1, start=1, lr=0.01
        )
    moved = [[1, 0, 0, 0], [2, 1, 0, 0], [3, 2, 1, 1]]
    for expected, found in zip(moved, seen[1:], strict=True):
        wanted = 0.01 * torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_a_search_that_began_too_high_is_not_verified():
    problem = Quadratic(4)
    found = problem.search(start=16)
    assert found.dimension == 16 and found.verified is False
    assert found.verification[-1].score >= 0.9


def test_a_start_that_is_there_already():
    problem = Quadratic(4)
    found = problem.search(target=-1.0)
    assert found.dimension == 0 and found.verified and problem.asked == []
    assert problem.search(target=-1.0, verify=False).verified is None


def test_one_dimension_has_no_half():
    problem = Quadratic(1)
    found = problem.search(problem.sketch(1), steps=200)
    assert found.dimension == 1 and found.verified and len(found.verification) == 1


def test_same_seed_same_search():
    first, again = (Quadratic(12).search(start=4) for _ in range(2))
    assert first == again
    problem = Quadratic(12)
    other = problem.search(problem.sketch(seed=1), start=4)
    assert other.history != first.history
    assert all(tensor.norm() == 0 for tensor in problem.start.values())


def test_refusals():
    problem = Quadratic(4)
    for bad in (
        {"start": 0},
        {"start": 33},
        {"steps": 0},
        {"delta": 0.0},
        {"delta": float("nan")},
        {"lr": 0.0},
    ):
        with pytest.raises(ValueError, match="start <= 32"):
            problem.search(**bad)
    with pytest.raises(ValueError, match="sketch is of"):
        problem.search(ModelSketch({"a": (30, 2)}, "gaussian", 8))
    for score in (float("nan"), float("inf")):
        problem.score = lambda parameters, score=score: score
        with pytest.raises(ValueError, match="score is"):
            problem.search()
    problem = Quadratic(4)
    problem.gradient = lambda parameters, step: {"a": parameters["a"]}
    with pytest.raises(ValueError, match="missing"):
        problem.search()
