"""What people see: nothing of a row is lost, cut or taken for markup."""

from __future__ import annotations

import pytest

from dsel_assets.shown import alike, changed, show, table


def test_rows_that_are_alike_share_one() -> None:
    rows = [{"strategy": "itl", "budget": b, "seed": s, "rank": 1} for b in (5, 9) for s in (0, 1)]
    rows[-1]["rank"] = 2
    once = alike(rows, "seed")
    assert [(row["budget"], row["seed"], row["rank"]) for row in once] == [
        (5, "0, 1", 1),
        (9, "0", 1),
        (9, "1", 2),
    ]
    assert alike([{"seed": s} for s in range(5)], "seed") == [{"seed": "0-4"}]
    assert alike([{"seed": s} for s in (0, 2, 4)], "seed") == [{"seed": "0, 2, 4"}]


def test_text_is_neither_cut_nor_markup(capsys: pytest.CaptureFixture[str]) -> None:
    long = "y" * 500
    rows = [{"source": "[red]vendor[/red]", "text": long, "nothing": None}]
    show([table(rows, "[bold]title"), f"gradient: [dim] {long}"])
    said = capsys.readouterr().out
    assert "[red]vendor[/red]" in said and "[bold]title" in said and "[dim]" in said
    assert said.count("y") == 1000 and "nothing" not in said


def test_changes_are_means_over_the_seeds(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "strategy": "s",
            "budget": b,
            "seed": seed,
            "kept": ["a"] * seed,
            "added": [],
            "dropped": [],
        }
        for b in (5, 9)
        for seed in (0, 1)
    ]
    show(changed(rows, 1, 2))
    assert ["s", "5,", "9", "0.5", "0", "0"] in [
        line.split() for line in capsys.readouterr().out.splitlines()
    ]
