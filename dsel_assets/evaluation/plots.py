"""Figures of a comparison as PNG bytes: small, and the same bytes for the same data.

A strategy has one colour and one marker in every figure, from the colour-blind safe palette of
Okabe and Ito.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy import stats

WIDTH = 7.0  # inches
DPI = (140, 100, 72, 50)  # dots an inch: sharp on a page 700 pixels wide, fewer for crowded figures
LIMIT = 50_000  # bytes: figures are embedded in pages and records
GREY, INK = "#767676", "#222222"
STYLE = {
    "random": (GREY, "o"),
    "full": (INK, "*"),
    "target_only": ("#CC79A7", "h"),
    "skmm": ("#0072B2", "s"),
    "bads": ("#D55E00", "^"),
    "itl": ("#009E73", "D"),
    "gradmatch": ("#E69F00", "v"),
    "smallloss": ("#56B4E9", "P"),
}
OTHERS = (("#8C6D1F", "X"), ("#5D3A9B", "p"), ("#A3A500", "d"), ("#AD5C72", "<"))
VERDICTS = {"better": "#0072B2", "no difference shown": GREY, "worse": "#D55E00"}
WITHOUT_BUDGET = ("full", "target_only", "bads_joint")
PASTEL = (  # Tol's light scheme, then three more: dark text is legible on each
    *("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#AAAA00"),
    *("#DDDDDD", "#C9A0DC", "#D2A679", "#9FB0BF"),
)
NOTE: dict[str, Any] = {"loc": "left", "fontsize": 8.5, "color": GREY}
CHURN = ("kept", "added", "dropped")
LEGEND: dict[str, Any] = {"fontsize": 8.5, "frameon": False}


def style(strategy: str) -> tuple[str, str]:
    """A strategy's colour and marker, the same in every figure and every process."""
    return STYLE.get(strategy) or OTHERS[zlib.crc32(strategy.encode()) % len(OTHERS)]


def budget_curve(records: Iterable[Mapping[str, Any]], label: str, value: str = "value") -> bytes:
    """Score against budget: a line a strategy, and its band.

    records: one a strategy, budget and seed, with the keys `strategy`, `budget` and the one that
    `value` names. A line is the mean over seeds, a band its 95 % t-interval over seeds: it says
    nothing about other evaluation examples. `full` and `target_only` do not look at the budget and
    are horizontal. label: of the y axis. ValueError without records.
    """
    scores: dict[str, dict[int, list[float]]] = {}
    for record in records:
        of_strategy = scores.setdefault(record["strategy"], {})
        of_strategy.setdefault(record["budget"], []).append(record[value])
    if not scores:
        raise ValueError("no records to draw a budget curve of")
    every = sorted({budget for of_strategy in scores.values() for budget in of_strategy})
    figure, axes = _figure(4.2)
    ends: dict[str, float] = {}
    for name in _in_order(scores):
        colour, marker = style(name)
        budgets = sorted(scores[name])
        means, halves = np.array([_interval(scores[name][budget]) for budget in budgets]).T
        ends[name] = means[-1]
        if name in WITHOUT_BUDGET:
            low, high = means[-1] - halves[-1], means[-1] + halves[-1]
            axes.axhspan(low, high, color=colour, alpha=0.1, lw=0)
            axes.axhline(means[-1], color=colour, lw=1.4, ls="-" if name == "full" else ":")
            continue
        dashes = "--" if name == "random" else "-"
        axes.plot(budgets, means, color=colour, marker=marker, ms=5, lw=1.8, ls=dashes)
        if len(budgets) > 1:
            axes.fill_between(
                budgets, means - halves, means + halves, color=colour, alpha=0.14, lw=0
            )
        else:
            axes.errorbar(budgets, means, halves, color=colour, capsize=3)
    axes.set(xscale="log", xlabel="budget (examples)", ylabel=label)
    axes.set_xlim(every[0] / 1.08, every[-1] * 1.08)
    axes.xaxis.set_major_locator(FixedLocator(every))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{budget:,}" for budget in every])
    axes.set_title("mean over seeds; bands: 95 % interval over seeds", **NOTE)
    _label_right(figure, axes, ends)
    return _png(figure)


def spectrum(
    eigenvalues: ArrayLike,
    grid: ArrayLike,
    density: ArrayLike,
    dimensions: ArrayLike,
    errors: ArrayLike,
    chosen: int,
    measured: tuple[ArrayLike, ArrayLike] = ((), ()),
) -> bytes:
    """The Hessian's spectrum, and what it predicts of a sketch.

    Left: the spectral density at `grid` (both [n]), with the extreme eigenvalues [k] as ticks.
    Right: the predicted relative error of the smallest outlier at ascending `dimensions` (both [m],
    positive), and where it lies at the chosen sketch dimension, if that is among them. measured:
    dimensions and errors of gradients' inner products, for the second curve.
    """
    values, heights = np.asarray(eigenvalues, float), np.asarray(density, float)
    figure, (left, right) = _figure(3.4, columns=2)
    floor = max(heights.max() * 1e-6, np.finfo(float).tiny)
    left.fill_between(grid, floor, np.maximum(heights, floor), color="#0072B2", alpha=0.25, lw=0)
    left.plot(grid, np.maximum(heights, floor), color="#0072B2", lw=1.2)
    left.plot(values, np.full(len(values), floor * 1.5), "|", color="#D55E00", ms=11, mew=1.2)
    left.set(yscale="log", ylim=(floor, None), xlabel="eigenvalue of the Hessian")
    left.set_ylabel("spectral density")
    left.set_title("ticks: extreme eigenvalues", **NOTE)

    D, error = np.asarray(dimensions, float), np.asarray(errors, float)
    outside = {"left": np.nan, "right": np.nan}
    at = float(np.exp(np.interp(np.log(chosen), np.log(D), np.log(error), **outside)))
    right.plot(D, error, color="#0072B2", marker="o", ms=3.5, lw=1.6, label="outlier, predicted")
    if np.size(measured[0]):
        right.plot(*measured, color="#009E73", marker="s", ms=3.5, label="gradients, measured")
        right.legend(loc="lower left", **LEGEND)
    right.axvline(chosen, color="#D55E00", lw=1.2, ls="--")
    right.plot([chosen], [at], "o", color="#D55E00", ms=8, zorder=3)
    beyond = chosen > D[-1] / 8
    right.annotate(
        f"D = {chosen:,}" + (f"\nerror {at:.2g}" if at == at else ""),
        (chosen, 0.97),
        (-6 if beyond else 6, 0),
        xycoords=right.get_xaxis_transform(),
        textcoords="offset points",
        ha="right" if beyond else "left",
        va="top",
        color="#B34700",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
    right.set(yscale="log", ylim=(None, 2.2 * error.max()), xlabel="sketch dimension D")
    right.set_xscale("log", base=2)
    right.set_ylabel("relative error")
    right.set_title("smallest outlier; gradients' inner products", **NOTE)
    return _png(figure)


def spectra(records: Sequence[Mapping[str, Any]]) -> bytes:
    """Spectra along a finetuning run.

    records: one a step, ascending, with the keys `step`, `eigenvalues` (descending), `outliers`,
    `all_outliers_seen`, `negative_ratio` and `gradient_in_outliers`. Left: the eigenvalues, filled
    if above 20 % of the top one; a + says that more may be among those that were not asked for.
    Right: the share of the gradient in the outliers' space, and RNEG. ValueError without records.
    """
    if not records:
        raise ValueError("no spectra to draw")
    steps = [record["step"] for record in records]
    places = np.arange(len(steps))
    figure, (left, right) = _figure(3.4, columns=2)
    left.axhline(0, color=INK, lw=0.8)
    for place, record in zip(places, records, strict=True):
        values = np.asarray(record["eigenvalues"], float)
        count = record["outliers"]
        left.plot(np.full(len(values), place), values, "o", ms=4, mfc="white", color=GREY)
        left.plot(np.full(count, place), values[:count], "o", ms=5, color="#D55E00")
        left.annotate(
            f"{count}" if record["all_outliers_seen"] else f"{count}+",
            (place, values[0]),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
            color="#B34700",
        )
    left.margins(y=0.12)
    left.set_ylabel("eigenvalue")
    left.set_title("filled and counted: outliers", **NOTE)
    shown = {
        "gradient in outliers": ("gradient_in_outliers", "#009E73", "s"),
        "negative / top": ("negative_ratio", "#0072B2", "o"),
    }
    for label, (name, colour, marker) in shown.items():
        values = np.array([record[name] for record in records], float)
        right.plot(places, values, color=colour, marker=marker, ms=4, lw=1.6, label=label)
    right.set_ylim(0, None)
    right.legend(**LEGEND)
    for axes in (left, right):
        axes.set_xticks(places, [f"{step:,}" for step in steps])
        axes.set_xlabel("step of finetuning")
    return _png(figure)


def rounds(
    history: Sequence[Mapping[str, Any]], verification: Sequence[Mapping[str, Any]], target: float
) -> bytes:
    """The search for an intrinsic dimension: score against step, the dimension beside its doubling.

    history, verification: rounds with the keys `step`, `dimension` and `score`, the start first;
    the second may be empty. ValueError without a history.
    """
    if not history:
        raise ValueError("no rounds to draw")
    figure, axes = _figure(3.4)
    steps, scores = ([one[name] for one in history] for name in ("step", "score"))
    axes.axhline(target, color=INK, lw=1, ls="--", label="target")
    axes.plot(steps, scores, color="#0072B2", marker="o", ms=3.5, lw=1.6, label="search")
    before = 0
    for one in history[1:]:
        if one["dimension"] != before:
            axes.annotate(
                f"{one['dimension']:,}",
                (one["step"], one["score"]),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color="#0072B2",
            )
        before = one["dimension"]
    if len(verification) > 1:
        label = f"{verification[-1]['dimension']:,} dimensions from the start"
        steps, scores = ([one[name] for one in verification] for name in ("step", "score"))
        axes.plot(steps, scores, color="#D55E00", marker="s", ms=3.5, lw=1.6, label=label)
    axes.margins(y=0.12)
    axes.set(xlabel="steps", ylabel="accuracy on validation")
    axes.set_title("numbers: dimensions", **NOTE)
    axes.legend(loc="lower right", **LEGEND)
    return _png(figure)


def picks(gains: ArrayLike, left: ArrayLike, worst: ArrayLike) -> bytes:
    """What each pick of a greedy choice brought: where to stop.

    gains [n] in nats; left, worst [n]: mean and largest variance of f at the targets after each
    pick, as shares of the mean before the first. ValueError without picks.
    """
    gain = np.asarray(gains, float)
    if len(gain) == 0:
        raise ValueError("no picks to draw")
    number = np.arange(1, len(gain) + 1)
    figure, (first, second) = _figure(3.0, columns=2)
    first.plot(number, gain, color="#009E73", lw=1.6)
    first.set(xlabel="pick", ylabel="nats about the targets")
    first.set_ylim(bottom=0)
    first.set_title("gain of each pick", **NOTE)
    second.plot(number, np.asarray(left, float), color="#0072B2", lw=1.6, label="mean")
    second.plot(number, np.asarray(worst, float), color="#D55E00", lw=1.6, label="worst target")
    second.set(xlabel="pick", ylabel="share of the prior variance")
    second.set_ylim(bottom=0)
    second.set_title("variance left at the targets", **NOTE)
    second.legend(loc="upper right", **LEGEND)
    return _png(figure)


def labelling(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rounds of asking for labels.

    rows: one a round with the keys `round`, `pool` (labelled examples that the model was trained
    on), `validation_accuracy` and `target_variance` (None where there are no targets). ValueError
    without rounds.
    """
    if not rows:
        raise ValueError("no rounds to draw")
    number = [row["round"] for row in rows]
    figure, (left, right) = _figure(3.0, columns=2)
    labels = [row["pool"] for row in rows]
    left.plot(labels, [row["validation_accuracy"] for row in rows], "o-", color="#0072B2", lw=1.6)
    left.set(xlabel="labelled examples", ylabel="accuracy on validation")
    left.set_title("trained before each round", **NOTE)
    known = [(n, row["target_variance"]) for n, row in zip(number, rows, strict=True)]
    known = [(n, value) for n, value in known if value is not None]
    right.plot([n for n, _ in known], [v for _, v in known], "o-", color="#009E73", lw=1.6)
    right.set(xlabel="round", ylabel="variance left at the targets")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.set_title("once the round is labelled", **NOTE)
    return _png(figure)


def churn(rows: Sequence[Mapping[str, Any]], aim: str = "") -> bytes:
    """What each generation kept of the selection before, and what that did to the objective.

    rows: one a generation with the keys `generation`, `kept`, `added`, `dropped`, and, where there
    is an objective called `aim`, `objective_before` (of the old choice in the new pool) and
    `objective`. ValueError without rows.
    """
    if not rows:
        raise ValueError("no generations to draw")
    judged = [row for row in rows if row.get("objective_before") is not None]
    figure, axes = _figure(3.0, columns=2 if judged else 1)
    left = np.atleast_1d(axes)[0]
    place = np.arange(len(rows))
    kept, added, dropped = (np.array([r[k] for r in rows], float) for k in CHURN)
    left.bar(place, kept, 0.7, color="#0072B2", label="kept")
    left.bar(place, added, 0.7, bottom=kept, color="#009E73", label="added")
    left.bar(place, -dropped, 0.7, color="#D55E00", label="dropped")
    left.axhline(0, color=INK, lw=0.8)
    left.set_xticks(place, [str(row["generation"]) for row in rows])
    left.set(xlabel="generation", ylabel="examples, mean over seeds")
    left.legend(loc="upper left", ncols=3, **LEGEND)
    left.margins(y=0.2)
    if judged:
        right = axes[1]
        number = [str(row["generation"]) for row in judged]
        before = [row["objective_before"] for row in judged]
        after = [row["objective"] for row in judged]
        right.plot(number, before, "o--", color=GREY, lw=1.4, label="the selection before")
        right.plot(number, after, "o-", color="#0072B2", lw=1.6, label="the new one")
        right.set(xlabel="generation", ylabel=aim.replace("_", " "))
        right.set_title("in the new pool", **NOTE)
        right.legend(loc="best", **LEGEND)
    return _png(figure)


def gallery(
    images: Sequence[Sequence[NDArray]], titles: Sequence[Sequence[str]], side: float = 0.8
) -> bytes:
    """Lines of images, each under its title: [H, W] in grey, or [C, H, W] with one or three C."""
    columns = max(len(line) for line in images)
    size = (max(2.0, side * columns), (side + 0.25) * len(images))
    figure = Figure(figsize=size, dpi=DPI[0], layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(images), columns, squeeze=False)
    for line, said, own in zip(images, titles, axes, strict=True):
        for axis in own:
            axis.axis("off")
        for image, title, axis in zip(line, said, own, strict=False):
            shown = np.asarray(image, float)
            shown = np.moveaxis(shown, 0, -1) if shown.ndim == 3 else shown
            low, high = shown.min(), shown.max()
            axis.imshow((shown - low) / max(high - low, 1e-12), cmap="gray_r")
            axis.set_title(title, fontsize=7, color=INK)
    return _png(figure)


def composition(
    counts: Mapping[str, Mapping[str, float]], pool: Mapping[str, float], label: str
) -> bytes:
    """What each strategy takes: shares by class, vendor or the like, beside the pool's.

    counts: by strategy, then by category; pool: by category. label: what the categories are.
    """
    rows = {"pool": pool} | {name: counts[name] for name in _in_order(counts)}
    names = _categories(rows)
    figure, axes = _figure(1.15 + 0.42 * len(rows))
    colours = dict(zip(names, PASTEL, strict=False))
    unnamed = dict(colours)
    for place, found in enumerate(rows.values()):
        total, left = sum(found.values()), 0.0
        for name, colour in colours.items():
            share = sum(found.get(part, 0) for part in names[name]) / max(total, 1)
            axes.barh(place, share, 0.74, left=left, color=colour, edgecolor="white", lw=0.8)
            if share > 0.008 + 0.012 * len(name):
                middle = left + share / 2
                axes.text(middle, place, name, ha="center", va="center", fontsize=8, color=INK)
                unnamed.pop(name, None)
            left += share
        axes.text(1.01, place, f"{total:,.0f}", va="center", fontsize=9, color=GREY)
    axes.text(1.01, -0.72, "examples", fontsize=8.5, color=GREY)
    if unnamed:
        patches = [Patch(color=colour, label=name) for name, colour in unnamed.items()]
        figure.legend(handles=patches, loc="outside upper left", ncols=6, **LEGEND)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5), xlabel=f"share by {label}")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False)
    return _png(figure)


def differences(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Forest plot of the differences to random, with intervals and verdicts.

    rows: one a strategy and budget with the keys `strategy`, `budget`, `metric`, `confidence`,
    `diff`, `diff_low`, `diff_high`, `verdict` and `corrected` (is it the judged budget, or
    descriptive?), as in the table `comparisons`. ValueError without rows.
    """
    if not rows:
        raise ValueError("no differences to draw")
    order = {name: rank for rank, name in enumerate(_in_order({r["strategy"] for r in rows}))}
    rows = sorted(rows, key=lambda row: (order[row["strategy"]], row["budget"]))
    figure, axes = _figure(1.3 + 0.25 * len(rows) + 0.12 * len(order))
    axes.axvline(0, color=INK, lw=1)
    places, place, before = [], 0.0, rows[0]["strategy"]
    for row in rows:
        place += 0.5 if row["strategy"] != before else 0.0
        before = row["strategy"]
        colour = VERDICTS[row["verdict"]]
        axes.plot([row["diff_low"], row["diff_high"]], [place, place], color=colour, lw=1.8)
        face = colour if row["corrected"] else "white"
        axes.plot(row["diff"], place, "o", color=colour, mfc=face, ms=6, mew=1.5)
        axes.text(
            1.02,
            place,
            f"{row['diff']:+.3f}  [{row['diff_low']:+.3f}, {row['diff_high']:+.3f}]",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=8.5,
            color=colour,
        )
        places.append(place)
        place += 1
    axes.set_yticks(places, [f"{row['strategy']}  {row['budget']:,}" for row in rows])
    axes.set_ylim(places[-1] + 0.7, -0.7)
    axes.set_xlabel(f"difference to random in {rows[0]['metric']}")
    axes.grid(visible=False, axis="y")
    for name, colour in VERDICTS.items():
        axes.plot([], [], color=colour, marker="o", lw=1.8, label=name)
    figure.legend(loc="outside upper left", ncols=3, **LEGEND)
    level = f"{100 * rows[0]['confidence']:g} % intervals"
    axes.set_title(f"{level}; filled: the judged budget; hollow: descriptive", **NOTE)
    return _png(figure)


def _figure(height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), dpi=DPI[0], layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    for part in np.atleast_1d(axes):
        part.spines[["top", "right"]].set_visible(False)
        part.spines[["bottom", "left"]].set_color(GREY)
        part.tick_params(colors=INK, labelsize=9, color=GREY)
        part.grid(color="#e6e6e6", lw=0.6)
        part.set_axisbelow(True)
    return figure, axes


def _png(figure: Figure) -> bytes:
    """The figure in 256 colours below `LIMIT` bytes, without a date or the name of a program."""
    for dpi in DPI:
        raw, small = io.BytesIO(), io.BytesIO()
        figure.savefig(raw, format="png", dpi=dpi, metadata={"Software": None})
        picture = Image.open(raw).convert("RGB").quantize(256, kmeans=1, dither=Image.Dither.NONE)
        picture.save(small, format="png", optimize=True)
        if small.tell() < LIMIT:
            break
    return small.getvalue()


def _in_order(strategies: Iterable[str]) -> list[str]:
    """The known ones first, in their fixed order; others as they come."""
    known = list(STYLE)
    return sorted(strategies, key=lambda s: known.index(s) if s in known else len(known))


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half of its 95 % t-interval, 0 for a single value."""
    count = len(values)
    if count < 2:
        return float(np.mean(values)), 0.0
    half = stats.t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count)
    return float(np.mean(values)), float(half)


def _categories(rows: Mapping[str, Mapping[str, float]]) -> dict[str, list[str]]:
    """The categories of a bar by name, and what each is made of; the rarest of many are `other`."""
    totals: dict[str, float] = {}
    for found in rows.values():
        for name, count in found.items():
            totals[name] = totals.get(name, 0) + count / max(sum(found.values()), 1)
    names = sorted(totals, key=lambda name: name.zfill(9) if name.isdigit() else name)
    if len(names) <= len(PASTEL):
        return {name: [name] for name in names}
    common = set(sorted(names, key=lambda name: -totals[name])[: len(PASTEL) - 1])
    kept = {name: [name] for name in names if name in common}
    return kept | {"other": [name for name in names if name not in common]}


def _label_right(figure: Figure, axes: Axes, ends: Mapping[str, float]) -> None:
    """Name each line at its right end, moved apart where they would overlap."""
    figure.canvas.draw()
    low, high = axes.get_ylim()
    gap = 13 / 72 * figure.dpi / axes.get_window_extent().height * (high - low)
    order = sorted(ends, key=lambda name: ends[name])
    heights = np.array([ends[name] for name in order])
    for _ in range(200):
        close = np.flatnonzero(np.diff(heights) < gap * 0.999)
        if not len(close):
            break
        for i in close:
            middle = (heights[i] + heights[i + 1]) / 2
            heights[i], heights[i + 1] = middle - gap / 2, middle + gap / 2
    for name, height in zip(order, heights, strict=True):
        colour = style(name)[0]
        axes.annotate(
            name,
            (1, ends[name]),
            (1.03, height),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            color=colour,
            fontsize=9.5,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 0},
        )
