from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dsel_assets.evaluation import plots

STRATEGIES = ("random", "full", "target_only", "skmm", "bads", "itl", "gradmatch", "another")
RNG = np.random.default_rng(0)


def records(budgets: tuple[int, ...] = (50, 100, 200)) -> list[dict[str, Any]]:
    return [
        {"strategy": s, "budget": b, "seed": k, "accuracy": 0.8 + 1e-4 * b + 0.02 * RNG.random()}
        for s in STRATEGIES
        for b in budgets
        for k in range(5)
    ]


def comparisons(budgets: tuple[int, ...] = (50, 100, 200)) -> list[dict[str, Any]]:
    return [
        {
            "strategy": s,
            "budget": b,
            "metric": "accuracy",
            "confidence": 0.95,
            "diff": 0.01 * i,
            "diff_low": 0.01 * i - 0.02,
            "diff_high": 0.01 * i + 0.02,
            "verdict": verdict,
            "corrected": b == 100,
        }
        for i, (s, verdict) in enumerate(zip(STRATEGIES[1:], cycle(plots.VERDICTS), strict=False))
        for b in budgets
    ]


def draw_spectrum(chosen: int = 1024) -> bytes:
    eigenvalues = np.array([40.0, 30, 12, 5, 1, -0.5, -2])
    grid = np.linspace(-5, 45, 400)
    density = np.exp(-0.5 * (grid[:, None] - eigenvalues) ** 2).mean(1)
    dimensions = 2 ** np.arange(6, 15)
    return plots.spectrum(eigenvalues, grid, density, dimensions, 4 / np.sqrt(dimensions), chosen)


def draw_spectra() -> bytes:
    return plots.spectra(
        [
            {
                "step": step,
                "eigenvalues": np.linspace(40 / (1 + place), -2, 12),
                "outliers": 9,
                "all_outliers_seen": place > 0,
                "negative_ratio": 0.05 * place,
                "gradient_in_outliers": 0.5,
            }
            for place, step in enumerate((0, 10, 100))
        ]
    )


def draw_rounds() -> bytes:
    history = [{"step": 50 * i, "dimension": 2**i if i else 0, "score": i / 9} for i in range(8)]
    return plots.rounds(history, history[:4], 0.75)


def draw_picks() -> bytes:
    left = np.exp(-np.arange(50) / 20)
    return plots.picks(left, left, np.minimum(1, 1.5 * left))


def draw_labelling(rounds: int = 4, targets: bool = True) -> bytes:
    return plots.labelling(
        [
            {
                "round": i + 1,
                "pool": 50 * i,
                "validation_accuracy": 0.5 + i / 10,
                "target_variance": 0.9 - i / 10 if targets else None,
            }
            for i in range(rounds)
        ]
    )


def draw_composition(categories: int = 10) -> bytes:
    def count() -> dict[str, float]:
        return {str(i): float(RNG.integers(0, 40)) for i in range(categories)}

    return plots.composition({name: count() for name in STRATEGIES}, count(), "class")


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.budget_curve(records(), "test accuracy", "accuracy"),
        lambda: plots.budget_curve(records((100,)), "test accuracy", "accuracy"),
        lambda: plots.budget_curve(records()[:1], "test accuracy", "accuracy"),
        lambda: plots.differences(comparisons()),
        lambda: plots.differences(comparisons()[:1]),
        draw_spectrum,
        lambda: draw_spectrum(chosen=32),
        draw_spectra,
        draw_rounds,
        draw_picks,
        draw_labelling,
        lambda: draw_labelling(rounds=1),
        lambda: draw_labelling(targets=False),
        draw_composition,
        lambda: draw_composition(categories=30),
        lambda: plots.composition({"random": {}}, {"clean": 3}, "vendor"),
    ],
)
def test_a_figure_is_a_small_png_of_the_width_that_pages_show(draw: Callable[[], bytes]) -> None:
    png = draw()
    assert len(png) < 50_000
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    assert picture.width == 980
    assert not {"Software", "Creation Time", "date"} & picture.info.keys()


def test_a_crowded_figure_is_coarser_rather_than_large() -> None:
    png = plots.differences(comparisons(tuple(range(50, 500, 50))))
    assert len(png) < 50_000
    assert Image.open(io.BytesIO(png)).width < 980


def test_a_figure_depends_on_the_data_alone() -> None:
    rows = records()
    curve = plots.budget_curve(rows, "accuracy", "accuracy")
    by_seed = sorted(rows, key=lambda row: (-row["budget"], row["seed"]))
    assert plots.budget_curve(by_seed, "accuracy", "accuracy") == curve
    rows[0]["accuracy"] += 0.1
    assert plots.budget_curve(rows, "accuracy", "accuracy") != curve
    forest = comparisons()
    assert plots.differences(forest) == plots.differences(forest[::-1])
    assert draw_spectrum() == draw_spectrum()


def test_a_strategy_keeps_its_colour_in_every_process() -> None:
    code = (
        "from dsel_assets.evaluation import plots; print(plots.style('mine'), plots.style('itl'))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == f"{plots.style('mine')} {plots.style('itl')}"
    assert len({plots.style(name) for name in STRATEGIES}) == len(STRATEGIES)


def test_lines_bands_and_verdicts_are_drawn_in_their_colours() -> None:
    def colours(png: bytes) -> set[tuple[int, ...]]:
        return set(
            map(tuple, np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3))
        )

    def near(colour: str, found: set[tuple[int, ...]]) -> bool:
        wanted = tuple(bytes.fromhex(colour[1:]))
        return any(max(abs(a - int(b)) for a, b in zip(wanted, f, strict=True)) < 12 for f in found)

    found = colours(plots.budget_curve(records(), "accuracy", "accuracy"))
    assert all(near(plots.style(name)[0], found) for name in STRATEGIES)
    found = colours(plots.differences(comparisons()))
    assert all(near(colour, found) for colour in plots.VERDICTS.values())


def test_categories_are_in_order_and_the_rarest_of_many_are_one() -> None:
    few = plots._categories({"pool": {"10": 1, "2": 1, "1": 1}, "random": {"3": 1}})
    assert list(few) == ["1", "2", "3", "10"]
    counts = {f"c{i}": 30.0 - i for i in range(30)}
    many = plots._categories({"pool": counts})
    assert len(many) == len(plots.PASTEL)
    assert sorted(part for parts in many.values() for part in parts) == sorted(counts)
    assert "c29" in many["other"] and "c0" not in many["other"]


def test_an_interval_is_that_of_a_t_test() -> None:
    from scipy import stats

    values = RNG.normal(size=5)
    mean, half = plots._interval(list(values))
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((expected.low, expected.high))
    assert plots._interval([0.7]) == (0.7, 0.0)


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="no records"):
        plots.budget_curve([], "accuracy")
    with pytest.raises(ValueError, match="no differences"):
        plots.differences([])
    with pytest.raises(ValueError, match="no spectra"):
        plots.spectra([])
    with pytest.raises(ValueError, match="no rounds"):
        plots.rounds([], [], 0.5)
    with pytest.raises(ValueError, match="no picks"):
        plots.picks([], [], [])
    with pytest.raises(ValueError, match="no rounds"):
        plots.labelling([])
