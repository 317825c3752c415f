"""Arrivals: files into examples, or into quarantine with a reason."""

import dagster as dg

from dsel_assets.assets.declare import Home, arrival_partitions, key, result, table
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import Task


def pool(task: Task) -> dg.AssetsDefinition:
    """Declare the task's `pool` asset, partitioned by arrival."""
    usable = dg.AssetCheckSpec(
        "usable",
        asset=key(task, "pool"),
        blocking=True,
        description="The file can be read, and no more of its rows are in quarantine than "
        f"pool.max_quarantine allows ({task.pool.max_quarantine:.0%}). An arrival that fails is "
        "held back: it is never differentiated, and no selection sees it.",
    )
    leaks = dg.AssetCheckSpec(
        "no_leaks",
        asset=key(task, "pool"),
        description="No row repeats an input of target, validation or test. Rows that do are in "
        "quarantine; the check says that a vendor sent them.",
    )

    @dg.asset(
        key=key(task, "pool"),
        deps=[key(task, "target")],
        partitions_def=arrival_partitions(task),
        group_name="arrivals",
        kinds={"parquet"},
        code_version="1",
        check_specs=[usable, leaks],
        retry_policy=dg.RetryPolicy(max_retries=2, delay=5, backoff=dg.Backoff.EXPONENTIAL),
        description="Rows of an arrival that meet the schema, under ids made of their content. "
        "The others are in quarantine with a reason and a count; nothing is dropped in silence.",
    )
    def pool(context: dg.AssetExecutionContext, home: Home) -> dg.MaterializeResult:
        from dsel_assets.data import LEAK
        from dsel_assets.steps.pool import held_back, ingest

        ws = Workspace(task, home)
        entry = ingest(ws, context.partition_key)
        summary = entry.summary
        details = summary.get("details", summary["reasons"])
        why = held_back(ws, entry)
        leaked = summary["reasons"].get(LEAK, 0)
        return result(
            task,
            "pool",
            entry,
            {
                "rows_seen": summary["seen"],
                "duplicates": summary["duplicates"],
                "quarantined": summary["quarantined"],
                "quarantine": table([{"rows": n, "reason": why} for why, n in details.items()]),
                "undeclared_columns": ", ".join(summary["undeclared_columns"]) or "none",
                "held_back": why or "no",
                "classes": table([summary["classes"]] if summary["classes"] else []),
                "sources": table([summary["sources"]] if summary["sources"] else []),
            },
            [
                dg.AssetCheckResult(
                    check_name="usable",
                    passed=why is None,
                    metadata={
                        "quarantined": summary["quarantined"],
                        "why": why or "fine",
                        "reasons": "; ".join(f"{n} rows: {r}" for r, n in details.items()),
                    },
                ),
                dg.AssetCheckResult(
                    check_name="no_leaks",
                    passed=leaked == 0,
                    severity=dg.AssetCheckSeverity.WARN,
                    metadata={"leaks": leaked},
                ),
            ],
        )

    return pool
