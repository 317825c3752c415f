"""What the task's file declares, as assets that Dagster observes: they tell it what is stale.

A changed setting of one strategy makes that strategy's subsets stale and no other's; a changed
training every checkpoint; a changed rule the verdict.
"""

import warnings

import dagster as dg

from dsel_assets.assets.declare import key, strategy_partitions
from dsel_assets.resources.store import identity
from dsel_assets.selection.strategies import STRATEGIES
from dsel_assets.task import Task

DATA_VERSION = "dagster/data_version"  # the tag under which Dagster keeps it


def declared(task: Task) -> list[dg.SourceAsset | dg.AssetsDefinition]:
    """The observed assets: `settings` by strategy, `training`, `rule`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)

        @dg.observable_source_asset(
            key=key(task, "settings"),
            partitions_def=strategy_partitions(task),
            group_name="selection",
            tags={"dagster/kind/yaml": ""},
            description="What the task's file says of a strategy, of budgets, seeds and quotas.",
        )
        def settings() -> dg.DataVersionsByPartition:
            return dg.DataVersionsByPartition(settings_versions(task))

        return [
            settings,
            _observed(task, "training", "finetuning", "the finetuning"),
            _observed(task, "rule", "comparison", "the promotion"),
        ]


def _observed(task: Task, name: str, group: str, what: str) -> dg.SourceAsset | dg.AssetsDefinition:
    @dg.observable_source_asset(
        key=key(task, name),
        group_name=group,
        tags={"dagster/kind/yaml": ""},
        description=f"What the task's file says of {what}.",
    )
    def observed() -> dg.DataVersion:
        return dg.DataVersion(_versions(task)[name, None])

    return observed


def settings_versions(task: Task) -> dict[str, str]:
    """The data version of each strategy's settings."""
    common = {"budgets": task.budgets, "budget_in": task.budget_in, "quotas": task.quotas}
    found = {}
    for name in task.strategies.chosen():
        what = {"settings": task.settings(name), "seeds": task.seeds}
        if not STRATEGIES[name].whole:
            what |= common
        if STRATEGIES[name].warms:
            what["reselect"] = task.reselect
        found[name] = identity(what)
    return found


def _versions(task: Task) -> dict[tuple[str, str | None], str]:
    """The data version of all that is declared, by asset and partition."""
    found: dict[tuple[str, str | None], str] = {
        ("settings", name): version for name, version in settings_versions(task).items()
    }
    found["training", None] = identity(task.finetune.model_dump())
    found["rule", None] = identity(task.promote.model_dump())
    return found


def declare(task: Task, instance: dg.DagsterInstance) -> list[str]:
    """Tell Dagster what is declared now, where it knows otherwise; says what that was."""
    changed = []
    for (name, partition), version in _versions(task).items():
        which = dg.AssetRecordsFilter(key(task, name), [partition] if partition else None)
        last = instance.fetch_observations(which, limit=1).records
        known = last[0].asset_observation if last else None
        if known is None or known.tags.get(DATA_VERSION) != version:
            instance.report_runless_asset_event(
                dg.AssetObservation(
                    key(task, name), partition=partition, tags={DATA_VERSION: version}
                )
            )
            changed.append(f"{name} {partition}" if partition else name)
    return changed
