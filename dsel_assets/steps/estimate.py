"""What stages take: as it was before, or as a probe says.

What the store has done before under today's settings it will do as fast again: that is scaled to
what is missing. For the rest there is the probe, on two samples of what has landed: what a stage
took on both gives its fixed part and the part that grows. Seconds are those of the manifests: of
one thread where cells run side by side.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from dsel_assets.resources.store import Entry, StoreError
from dsel_assets.selection import STRATEGIES
from dsel_assets.steps.cells import BACK, cells
from dsel_assets.steps.generation import (
    Generation,
    current_generation,
    generation_at,
    generation_of,
    members,
    sketched_rows,
)
from dsel_assets.steps.probe import ROWS, STEPS, Probe, probes, taken
from dsel_assets.steps.warm import AGAIN, STATE
from dsel_assets.steps.workspace import Workspace

KINDS = {"ingest": ("pool",), "sketch": ("gradients", "sketches")}
TRAINED = {"finetune": "checkpoints", "evaluate": "metrics"}
BEFORE, PROBE = "before", "probe"


class Take(NamedTuple):
    """What something takes."""

    seconds: float
    mib: float
    source: str


class Estimate:
    """What stages take: as it was before, or as the probe says, which runs once it is asked.

    pool: how many rows there will be.
    """

    def __init__(self, ws: Workspace, files: list[str], folder: Path, waiting: int) -> None:
        """waiting: rows that are not ingested yet."""
        self._ws, self._files, self._folder = ws, files, folder
        self._there = sum(pool.manifest["rows"] for pool, _, _ in self._parts)
        self.pool = self._there + waiting

    @cached_property
    def _probes(self) -> list[Probe]:
        return probes(self._ws, self._files, self._folder)

    @cached_property
    def _generations(self) -> list[Generation]:
        """The current one and some before it, the newest first."""
        try:
            last = current_generation(self._ws, enter=False)
        except StoreError:  # none yet, or what is there is of other settings
            return []
        numbers = range(last.number - 1, max(0, last.number - 1 - BACK), -1)
        return [last, *(generation_at(self._ws, number) for number in numbers)]

    @cached_property
    def _made(self) -> dict[str, dict[tuple[str, int, int], Entry]]:
        """By kind, and by strategy, budget and seed, the newest artifact under today's settings."""
        found: dict[str, dict[tuple[str, int, int], Entry]] = {}
        every = (cell for generation in self._generations for cell in cells(self._ws, generation))
        for cell in every:
            for kind, name in cell.identities.items():
                if entry := self._ws.store.entry(self._ws.task.name, kind, name):
                    of_kind = found.setdefault(kind, {})
                    of_kind.setdefault((cell.strategy, cell.budget, cell.seed), entry)
        return found

    @cached_property
    def _parts(self) -> list[tuple[Entry, Entry, Entry]]:
        """Pool, gradients and sketches of the arrivals that are there."""
        return [part for last in self._generations[:1] for part in members(self._ws, last)]

    def rows(self, name: str, count: int) -> Take:
        """Of ingesting or sketching so many rows."""
        if self._there >= ROWS[-1]:
            every = [part[:1] if name == "ingest" else part[1:] for part in self._parts]
            seconds, disk = taken(entry for entries in every for entry in entries)
            return Take(count * seconds / self._there, count * disk / self._there, BEFORE)
        small, large = self._probes
        (s1, m1), (s2, m2) = (taken(probe.of(KINDS[name])) for probe in self._probes)
        seconds = _line(small.rows, s1, large.rows, s2, count)
        return Take(seconds, _line(small.rows, m1, large.rows, m2, count), PROBE)

    def selections(self, strategy: str, wanted: list[tuple[int, int]]) -> list[Take]:
        """Of each (seed, budget); of a seed the largest budget comes first, and shares its work."""
        begun, takes = set[int](), []
        for seed, budget in sorted(wanted, key=lambda place: -place[1]):
            takes.append(
                self._selected_before(strategy, seed, budget)
                or self._selected_in_probe(strategy, seed, budget, int(seed in begun))
            )
            begun.add(seed)
        return takes

    def _selected_before(self, strategy: str, seed: int, budget: int) -> Take | None:
        """As the last selection took, by how the strategy's time grows with what it looks at.

        Those that train grow with their steps, which are the same. A new seed takes what the first
        did, but for what quotas cost, which only that one finds out.
        """
        made, selector, looked = self._made.get("subsets", {}), STRATEGIES[strategy], self.pool
        if entry := made.get((strategy, budget, seed)):
            looked = self._looked_at(entry)
        elif not self._ws.task.quotas:
            entry = made.get((strategy, budget, 0))
        if entry is None or "rows_read" not in entry.summary:
            return None
        n, (seconds, disk) = max(1, entry.manifest["rows"]), taken([entry])
        if "steps" not in self._ws.task.settings(strategy):
            seconds *= selector.work(looked, n) / selector.work(entry.summary["rows_read"], n)
        return Take(seconds, disk, BEFORE)

    def _looked_at(self, before: Entry) -> int:
        """How many examples a selection looks at that may go on from this one."""
        if STATE not in before.manifest["files"] or "looked_at" not in before.summary:
            return self.pool
        saw = generation_of(self._ws, before.manifest["fields"]["generation"])
        again = self.pool > AGAIN * before.summary["looked_at"]
        if saw is None or again or self._ws.task.reselect == "cold":
            return self.pool
        if self._generations[0].members[: len(saw.members)] != saw.members:
            return self.pool
        return int(before.manifest["rows"]) + self.pool - sketched_rows(self._ws, saw)

    def _selected_in_probe(self, strategy: str, seed: int, budget: int, which: int) -> Take:
        """which: 0 for the first of its seed, 1 for another.

        Those that train grow with the steps, not with the rows. Each quota is priced by one more
        selection of the first seed, where the strategy has an objective.
        """
        large = self._probes[-1]
        selector, steps = STRATEGIES[strategy], self._ws.task.settings(strategy).get("steps")
        n = min(int(budget / large.cost), self.pool)
        made = [probe.selected[strategy][which] for probe in self._probes]
        (t1, _), (t2, disk) = (taken([entry]) for entry in made)
        if steps is not None:  # quotas share it
            seconds = _line(STEPS[0], t1, STEPS[1], t2, max(steps, STEPS[1]))
        else:
            w1, w2 = (selector.work(p.rows, min(p.budgets[which], p.rows)) for p in self._probes)
            seconds = _line(w1, t1, w2, t2, selector.work(self.pool, n))
            if seed == 0 and selector.aim and not selector.whole:
                seconds *= 1 + sum(map(len, self._ws.task.quotas.values()))
        return Take(seconds, disk, PROBE)

    def training(self, name: str) -> Take:
        """Of one checkpoint, or of judging one."""
        kind = TRAINED[name]
        if made := self._made.get(kind):
            seconds, disk = taken(made.values())
            return Take(seconds / len(made), disk / len(made), BEFORE)
        small, large = self._probes
        (t1, _), (t2, disk) = small.a_cell(kind), large.a_cell(kind)
        steps = self._ws.task.finetune.steps
        seconds = _line(STEPS[0], t1, STEPS[1], t2, steps) if name == "finetune" else t2
        return Take(seconds, disk, PROBE)

    @property
    def memory(self) -> float:
        """MiB, as `Plan` has it."""
        peak, made = 0.0, [entry for of_kind in self._made.values() for entry in of_kind.values()]
        if self._parts:
            pools, _, sketches = zip(*self._parts, strict=True)
            held = (taken(pools)[1] + 2 * taken(sketches)[1]) / self._there
            peak = max(entry.manifest["process_peak_mib"] for entry in (*made, *sketches))
            peak += (self.pool - self._there) * held
        if "_probes" in self.__dict__:
            large = self._probes[-1]
            held = large.mib_a_row("pool") + 2 * large.mib_a_row("sketches")
            peak = max(peak, large.peak + self.pool * held)
        return float(peak)


def _line(x1: float, y1: float, x2: float, y2: float, x: float) -> float:
    """The line through two points, at x; where it would fall, in proportion to the second."""
    if x == 0:
        return 0.0
    slope = (y2 - y1) / (x2 - x1) if x2 > x1 else 0.0
    if slope <= 0:
        return y2 * max(1.0, x / x2)
    return max(0.0, y2 - slope * x2) + slope * x
