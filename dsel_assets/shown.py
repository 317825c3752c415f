"""What the commands show to people: a few tables, and lines around them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dsel_assets.steps.plan import Plan
    from dsel_assets.task import Task

LEADERBOARD = """
    select budget, strategy, mean, diff, diff_low, diff_high, verdict, select_seconds,
           train_seconds, seeds
    from leaderboard where task = ? and generation = ? order by budget, mean desc
"""
WIDTH = 100  # where there is no terminal that says otherwise
Rows = Sequence[Mapping[str, Any]]


def show(parts: Iterable[RenderableType]) -> None:
    """Print them one below the other; text is never cut and never markup."""
    console = Console(width=max(WIDTH, Console().width), highlight=False, markup=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str))


def table(rows: Rows, title: str = "", sections: str = "") -> Table:
    """A column for each name that is not empty throughout; a gap where `sections` changes."""
    names = dict.fromkeys(n for row in rows for n, value in row.items() if value is not None)
    found = Table(
        title=Text(title) if title else None,
        box=SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
        collapse_padding=True,
    )
    for name in names:
        numbers = all(_is_number(row.get(name)) for row in rows)
        found.add_column(Text(name), justify="right" if numbers else "left", overflow="fold")
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        ends = bool(sections) and after is not None and after[sections] != row[sections]
        cells = (Text(_short(row[name]) if row.get(name) is not None else "") for name in names)
        found.add_row(*cells, end_section=ends)
    return found


def alike(rows: Rows, name: str) -> list[dict[str, Any]]:
    """Rows that differ in one column only as one, which names all that stand there."""
    found: dict[str, tuple[Mapping[str, Any], list[Any]]] = {}
    for row in rows:
        rest = repr({key: value for key, value in row.items() if key != name})
        found.setdefault(rest, (row, []))[1].append(row[name])
    return [{**row, name: _listed(values)} for row, values in found.values()]


def _listed(values: Sequence[Any]) -> str:
    first, last = values[0], values[-1]
    if len(values) > 2 and list(values) == list(range(first, first + len(values))):
        return f"{first}-{last}"
    return ", ".join(map(str, values))


def _is_number(value: Any) -> bool:
    """A number, one that is written already, or nothing."""
    if isinstance(value, str):
        return value.replace(",", "").replace(".", "").isdigit()
    return isinstance(value, int | float | None)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def stands(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Of `status` or a part of it: a line a fact."""
    for name, value in found.items():
        said = value
        if name == "champion" and value:
            said = _champion(value)
        elif isinstance(value, Mapping):
            said = "; ".join(f"{key}: {one}" for key, one in value.items()) or "none"
        elif isinstance(value, Sequence) and not isinstance(value, str):
            said = ", ".join(map(str, value)) or "none"
        yield f"{name.replace('_', ' ')}: {'none' if said is None else said}"


def _champion(chosen: Mapping[str, Any]) -> str:
    return (
        f"{chosen['strategy']} at {chosen['budget']} (generation {chosen['generation']}, "
        f"selection {chosen['selection']}), by {chosen['by']}"
    )


def explained(found: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Of `explain`: seeds and budgets at which all is the same share a row."""
    yield f"{found['example_id']}, generation {found['generation']}"
    for part in ("arrivals", "quarantine", "nearest"):
        yield table(found[part], part) if found[part] else f"{part}: none"
    known = ("strategy", "budget", "seed", "rank", "weight")
    rows = alike(alike(found["selections"], "seed"), "budget")
    shown = [
        {name: row.get(name) for name in known}
        | {"scores": _named({k: v for k, v in row.items() if k not in known})}
        for row in rows
    ]
    yield table(shown, "selections", "strategy") if shown else "selections: none"
    yield f"gradient: {_named(found['gradient'] or {}) or 'none'}"


def _named(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_short(v)}" for name, v in values.items() if v is not None)


def changed(found: Rows, earlier: int, later: int) -> Iterator[RenderableType]:
    """Of `diff`: means over the seeds; budgets at which they are the same share a row."""
    if not found:
        yield "no strategy has selections in both under today's settings"
        return
    rows = []
    for (strategy, budget), group in groupby(found, lambda row: (row["strategy"], row["budget"])):
        seeds = list(group)
        row: dict[str, Any] = {"strategy": strategy, "budget": budget}
        row |= {n: fmean(len(seed[n]) for seed in seeds) for n in ("kept", "added", "dropped")}
        row["aim"] = seeds[0].get("aim", "").replace("_", " ")
        for name in ("objective", "shared_with_cold", "objective_cold"):
            known = [value for seed in seeds if (value := seed.get(name)) is not None]
            if known:
                row[name.replace("_", " ")] = fmean(known)
        rows.append(row)
    title = f"from generation {earlier} to {later}, means over the seeds"
    yield table(alike(rows, "budget"), title, "strategy")


def planned(plan: Plan) -> Iterator[RenderableType]:
    """Of `plan`: what is missing; beside it what it took, once it was made."""
    yield f"plan {plan.number}: a pool of {plan.rows:,} rows"
    if not plan.stages:
        yield "nothing is missing"
        return
    took = plan.took_memory_mib is not None
    rows = []
    for stage in plan.stages:
        row: dict[str, Any] = {"stage": stage.name, "missing": f"{stage.missing:,}"}
        row |= {
            "seconds": f"{stage.seconds:,.1f}",
            "MiB": f"{stage.mib:,.1f}",
            "from": stage.source,
        }
        if took and stage.took_seconds is not None:
            row |= {"took s": f"{stage.took_seconds:,.1f}", "took MiB": f"{stage.took_mib:,.1f}"}
        rows.append(row)
    yield table(rows)
    for name, unit in (("seconds", "s of work in all"), ("mib", "MiB of disk")):
        total = sum(getattr(stage, name) for stage in plan.stages)
        made = sum(getattr(stage, f"took_{name}") or 0 for stage in plan.stages)
        yield f"{total:,.1f} {unit}" + (f"; took {made:,.1f}" if took else "")
    yield f"{plan.memory_mib:,.0f} MiB of memory a process" + (
        f"; took {plan.took_memory_mib:,.0f}" if took else ""
    )


def board(task: Task, generation: int) -> list[dict[str, Any]]:
    """A generation's leaderboard, by column."""
    from dsel_assets.resources.warehouse import Warehouse
    from dsel_assets.steps.workspace import home

    with Warehouse(home() / "warehouse.duckdb").connect(read_only=True) as warehouse:
        found = warehouse.execute(LEADERBOARD, [task.name, generation])
        names = [column[0] for column in found.description or []]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def leaderboard(task: Task, generation: int) -> Iterator[RenderableType]:
    """A generation's leaderboard, what it says at the promoted budget, and the champion."""
    from dsel_assets.steps.champion import champion
    from dsel_assets.steps.workspace import Workspace, home

    rows, rule = board(task, generation), task.promote
    shown = [
        {
            "budget": row["budget"],
            "strategy": row["strategy"],
            "accuracy": f"{row['mean']:.3f}",
            "vs random": _against(row),
            "verdict": row["verdict"],
            "select s": f"{row['select_seconds']:.2f}",
            "train s": f"{row['train_seconds']:.2f}",
        }
        for row in rows
    ]
    title = f"{task.name}: test accuracy, {rows[0]['seeds']} seeds, {rule.confidence:.0%} intervals"
    yield table(shown, title, "budget")
    unit = "examples" if task.budget_in == "examples" else task.pool.columns.cost
    judged = [row for row in rows if row["budget"] == rule.budget]
    for answer, to in (("better", "than"), ("worse", "than"), ("no difference shown", "to")):
        others = (row for row in judged if row["strategy"] != rule.against)
        if names := ", ".join(row["strategy"] for row in others if row["verdict"] == answer):
            yield f"at {rule.budget} {unit}, {answer} {to} {rule.against}: {names}"
    if chosen := champion(Workspace(task, home())):
        yield f"champion: {_champion(chosen)}"
    else:
        yield f"no champion: on validation no strategy that chooses is better than {rule.against}"


def _against(row: Mapping[str, Any]) -> str:
    if row["diff"] is None:
        return ""
    return f"{row['diff']:+.3f}  [{row['diff_low']:+.3f}, {row['diff_high']:+.3f}]"
