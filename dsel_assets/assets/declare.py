"""What the assets have in common: keys, partitions, and how an artifact is shown in the UI."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

from dsel_assets.resources.store import Entry, identity
from dsel_assets.task import Task

Home = dg.ResourceParam[Path]


def key(task: Task, name: str) -> dg.AssetKey:
    """The asset's key: the task's name is the prefix."""
    return dg.AssetKey([task.name, name])


def arrival_partitions(task: Task) -> dg.DynamicPartitionsDefinition:
    """One partition an arrival, added as files land."""
    return dg.DynamicPartitionsDefinition(name=f"{task.name}_arrivals")


def strategy_partitions(task: Task) -> dg.StaticPartitionsDefinition:
    """One partition a strategy of the task."""
    return dg.StaticPartitionsDefinition(list(task.strategies.chosen()))


def all_of(task: Task, name: str) -> dg.AssetDep:
    """A dependency on every partition of an asset."""
    return dg.AssetDep(key(task, name), partition_mapping=dg.AllPartitionMapping())


def data_version(artifacts: Iterable[str]) -> str:
    """What Dagster knows artifacts by: the identity of the only one, or one made of all."""
    distinct = sorted(set(artifacts))
    return identity({"artifacts": distinct}) if len(distinct) > 1 else distinct[0]


def result(
    task: Task,
    name: str,
    entries: Entry | Iterable[Entry],
    metadata: Mapping[str, Any],
    checks: Iterable[dg.AssetCheckResult] = (),
) -> dg.MaterializeResult:
    """The artifacts as a materialisation: their identities are the data version."""
    made = [entries] if isinstance(entries, Entry) else list(entries)
    distinct = {entry.identity: entry for entry in made}
    return dg.MaterializeResult(
        asset_key=key(task, name),
        data_version=dg.DataVersion(data_version(distinct)),
        metadata={
            "dagster/row_count": sum(entry.manifest["rows"] for entry in distinct.values()),
            "artifacts": len(distinct),
            "seconds": sum(entry.manifest["seconds"] for entry in distinct.values()),
            "folder": dg.MetadataValue.path(str(made[0].path.parent)),
            **metadata,
        },
        check_results=list(checks),
    )


def picture(png: bytes) -> dg.MetadataValue:
    """A PNG as metadata; the UI shows it behind "Show Markdown"."""
    return dg.MetadataValue.md(f"![plot](data:image/png;base64,{base64.b64encode(png).decode()})")


def table(rows: Sequence[Mapping[str, Any]]) -> dg.MetadataValue:
    """Rows as a Markdown table; numbers to four digits."""
    text = markdown(list(rows[0]), [list(row.values()) for row in rows]) if rows else "nothing"
    return dg.MetadataValue.md(text)


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table as text."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
