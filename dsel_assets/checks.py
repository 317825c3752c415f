"""Asset checks: what must hold before a selection is made, and before a verdict is given.

Checks about one arrival or one table stand with the asset that makes it; these look across.
"""

import dagster as dg

from dsel_assets.assets.declare import Home, key, table
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import Task


def sketches_fit(task: Task) -> dg.AssetChecksDefinition:
    """Blocking, before the subsets: every member of the generation is sketched, row by row."""

    @dg.asset_check(
        asset=key(task, "sketches"),
        name="fit",
        blocking=True,
        description="Every example of the generation has a finite sketch of the task's space, or "
        "stands in quarantine; no artifact is damaged, no sketch too far from its gradient.",
    )
    def fit(home: Home) -> dg.AssetCheckResult:
        import numpy as np

        from dsel_assets.steps.generation import current_generation, members
        from dsel_assets.steps.loading import pool_rows
        from dsel_assets.steps.sketched import broken_promise, map_sketches

        ws = Workspace(task, home)
        generation = current_generation(ws)
        damaged, broken, rows, quarantined, finite = [], [], 0, 0, True
        for pool, gradients, sketches in members(ws, generation):
            damaged += [
                str(entry.path / name)
                for entry in (pool, gradients, sketches)
                for name in entry.damaged()
            ]
            if why := broken_promise(ws, sketches):
                broken.append(f"{pool.manifest['fields']['arrival']}: {why}")
            rows += pool.manifest["rows"]
            quarantined += gradients.summary["quarantined"]
            finite &= bool(np.isfinite(map_sketches(ws, sketches)).all())
        if damaged or broken:
            found = {"damaged": ", ".join(damaged), "distorted": "; ".join(broken)}
            shown = {name: text for name, text in found.items() if text}
            return dg.AssetCheckResult(passed=False, metadata=shown)
        there = pool_rows(ws, generation)
        counts = {
            "sketched": len(there.examples),
            "quarantined": quarantined,
            "duplicates": len(there.duplicates),
            "conflicts": len(there.conflicts),
        }
        return dg.AssetCheckResult(
            passed=finite and rows == sum(counts.values()),
            metadata={"pool_rows": rows, **counts},
        )

    return fit


def dimension_is_enough(task: Task) -> dg.AssetChecksDefinition:
    """A warning when the spectrum advises a larger sketch than the task asks for."""

    @dg.asset_check(
        asset=key(task, "hessian_spectrum"),
        name="dimension_is_enough",
        description="The sketch dimension is at least what the spectrum advises. Changing it is an "
        "explicit re-sketch: set sketch.dim and run the ingest job for every arrival.",
    )
    def dimension_is_enough(home: Home) -> dg.AssetCheckResult:
        from dsel_assets.steps.spectrum import hessian_spectrum, pin_dimension

        ws = Workspace(task, home)
        advised = hessian_spectrum(ws).summary["advised_dimension"]
        return dg.AssetCheckResult(
            passed=(used := pin_dimension(ws)) >= advised,
            severity=dg.AssetCheckSeverity.WARN,
            metadata={"advised": advised, "used": used},
        )

    return dimension_is_enough


def more_than_chance(task: Task) -> dg.AssetChecksDefinition:
    """A warning when a strategy's subsets can't be told from uniform draws."""

    @dg.asset_check(
        asset=key(task, "subsets"),
        name="more_than_chance",
        description="What a strategy chooses differs from uniform draws: its seeds agree on more "
        "(or fewer) examples than chance would have them, or its own measure says so.",
    )
    def more_than_chance(home: Home) -> dg.AssetCheckResult:
        from dsel_assets.steps.chosen import beyond_chance
        from dsel_assets.steps.generation import current_generation

        ws = Workspace(task, home)
        found = beyond_chance(ws, current_generation(ws))
        alike = [f"{row['strategy']} at {row['budget']}" for row in found if not row["chosen"]]
        return dg.AssetCheckResult(
            passed=not alike,
            severity=dg.AssetCheckSeverity.WARN,
            metadata={
                "like_a_uniform_draw": ", ".join(alike) or "none",
                "overlap_of_seeds": table(found),
            },
        )

    return more_than_chance


def covers(task: Task) -> dg.AssetChecksDefinition:
    """A warning when a choice has collapsed to one class or one source."""

    @dg.asset_check(
        asset=key(task, "subsets"),
        name="covers",
        description="No choice takes more than 70 % of one class or source that makes up less than "
        "half as much of the pool.",
    )
    def covers(home: Home) -> dg.AssetCheckResult:
        from dsel_assets.steps.chosen import collapsed
        from dsel_assets.steps.generation import current_generation

        ws = Workspace(task, home)
        found = collapsed(ws, current_generation(ws))
        return dg.AssetCheckResult(
            passed=not found,
            severity=dg.AssetCheckSeverity.WARN,
            metadata={
                "collapsed": ", ".join(dict.fromkeys(row["strategy"] for row in found)) or "none",
                "choices": table(found[:20]),
            },
        )

    return covers


def weights_hold(task: Task) -> dg.AssetChecksDefinition:
    """A warning when inferred weights have collapsed, run away or prefer what is merely easy."""

    @dg.asset_check(
        asset=key(task, "subsets"),
        name="weights_hold",
        description="No strategy that infers weights raised an alarm: a mean weight far from beta "
        "(collapsed), logits without bound (runaway), or rows of highest weight that lie outside "
        "the target and are easier than the rest (easy_junk).",
    )
    def weights_hold(home: Home) -> dg.AssetCheckResult:
        from dsel_assets.selection.guards import ALARMS
        from dsel_assets.steps.chosen import alarms
        from dsel_assets.steps.generation import current_generation

        ws = Workspace(task, home)
        found = alarms(ws, current_generation(ws))
        on = [
            f"{row['strategy']} at {row['budget']}: {name} in {row[name]} of {row['seeds']} seeds"
            for row in found
            for name in ALARMS
            if row[name]
        ]
        return dg.AssetCheckResult(
            passed=not on,
            severity=dg.AssetCheckSeverity.WARN,
            metadata={
                "alarms": "; ".join(on) or "none",
                "what_to_do": "; ".join(f"{name}: {ALARMS[name]}" for name in ALARMS),
                "seeds_with_an_alarm": table(found),
            },
        )

    return weights_hold


def metrics_complete(task: Task) -> dg.AssetChecksDefinition:
    """Blocking, before the verdict: every cell is there, on the same seeds and examples."""

    @dg.asset_check(
        asset=key(task, "metrics"),
        name="complete",
        blocking=True,
        description="Every strategy has a finite score at every budget with every seed, so that "
        "the comparison is paired; random and full are among them.",
    )
    def complete(home: Home) -> dg.AssetCheckResult:
        import math

        from dsel_assets.steps.cells import cells
        from dsel_assets.steps.generation import current_generation

        ws = Workspace(task, home)
        every = list(cells(ws, current_generation(ws)))
        missing, not_finite = [], []
        for cell in every:
            entry = ws.store.find(task.name, "metrics", cell.metric)
            place = f"{cell.strategy} at {cell.budget}, seed {cell.seed}"
            if entry is None:
                missing.append(place)
            elif not all(
                math.isfinite(v) for split in entry.summary.values() for v in split.values()
            ):
                not_finite.append(place)
        return dg.AssetCheckResult(
            passed=not missing and not not_finite,
            metadata={
                "cells": len(every),
                "missing": "; ".join(missing[:10]) or "none",
                "not_finite": "; ".join(not_finite[:10]) or "none",
            },
        )

    return complete


def champion_holds(task: Task) -> dg.AssetChecksDefinition:
    """A warning when the champion is no longer what the verdict would promote."""

    @dg.asset_check(
        asset=key(task, "verdict"),
        name="champion_holds",
        description="Validation still calls the champion's strategy better at its budget; a person "
        "who promoted another one is shown as the reason. Without a champion it holds.",
    )
    def champion_holds(home: Home) -> dg.AssetCheckResult:
        from dsel_assets.steps.champion import champion
        from dsel_assets.steps.generation import current_generation
        from dsel_assets.steps.verdict import find_verdict, said_of

        ws = Workspace(task, home)
        chosen, decided = champion(ws), find_verdict(ws, current_generation(ws))
        if chosen is None or decided is None:
            return dg.AssetCheckResult(passed=True, metadata={"champion": "none"})
        said = said_of(decided, chosen["strategy"], chosen["budget"])
        return dg.AssetCheckResult(
            passed=said is not None and said["verdict"] == "better",
            severity=dg.AssetCheckSeverity.WARN,
            metadata={
                "champion": f"{chosen['strategy']} at {chosen['budget']}",
                "of_generation": chosen["generation"],
                "promoted_by": chosen["by"],
                "why": chosen.get("why", ""),
                "validation_says": said["verdict"] if said else "it is not compared any more",
            },
        )

    return champion_holds


def checks(task: Task) -> list[dg.AssetChecksDefinition]:
    """All of them."""
    return [
        sketches_fit(task),
        dimension_is_enough(task),
        more_than_chance(task),
        covers(task),
        weights_hold(task),
        metrics_complete(task),
        champion_holds(task),
    ]
