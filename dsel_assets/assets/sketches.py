"""Gradients and sketches: two outputs of one backward pass an example."""

from collections.abc import Iterator

import dagster as dg

from dsel_assets.assets.declare import Home, arrival_partitions, key, result
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import Task


def sketches(task: Task) -> dg.AssetsDefinition:
    """Declare `gradients` and `sketches`, partitioned by arrival; either may be asked for alone."""
    deps = [key(task, "pool"), key(task, "base_model")]
    spec = task.sketch
    of_operator = [*deps, key(task, "hessian_spectrum")] if spec.dim == "auto" else deps

    promise = dg.AssetCheckSpec(
        "keeps_inner_products",
        asset=key(task, "sketches"),
        blocking=True,
        description="Inner products of a few gradients, exact and sketched: the share of pairs "
        "within three standard deviations of what the kind of sketch promises.",
    )

    finite = dg.AssetCheckSpec(
        "finite",
        asset=key(task, "gradients"),
        description="No more than pool.max_quarantine of an arrival's rows have a gradient that is "
        "zero or not finite. Such rows are out in any case; many of them mean that something is "
        "wrong with the file or the base model.",
    )

    @dg.multi_asset(
        name=f"{task.name}_gradients_and_sketches",
        specs=[
            dg.AssetSpec(
                key(task, "gradients"),
                deps=deps,
                group_name="gradients",
                kinds={"pytorch", "parquet"},
                skippable=True,
                code_version="1",
                description="Loss and gradient norm of each example at the base checkpoint; raw "
                "gradients only below gradients.keep_raw_bytes. Zero or non-finite gradients are "
                "in quarantine.",
            ),
            dg.AssetSpec(
                key(task, "sketches"),
                deps=of_operator,
                group_name="gradients",
                kinds={"pytorch"},
                skippable=True,
                code_version="1",
                description=f"Each gradient through one fixed linear operator: {spec.kind} into "
                f"{spec.dim} dimensions, seed {spec.seed}. Only new arrivals are sketched.",
            ),
        ],
        partitions_def=arrival_partitions(task),
        check_specs=[promise, finite],
        can_subset=True,
    )
    def gradients_and_sketches(
        context: dg.AssetExecutionContext, home: Home
    ) -> Iterator[dg.MaterializeResult | dg.AssetCheckResult]:
        from dsel_assets.steps.pool import ingest
        from dsel_assets.steps.sketched import broken_promise
        from dsel_assets.steps.sketches import sketch

        ws = Workspace(task, home)
        made = sketch(ws, ingest(ws, context.partition_key))
        for name, entry in (("gradients", made.gradients), ("sketches", made.sketches)):
            if key(task, name) in context.selected_asset_keys:
                shown = {name: value for name, value in entry.summary.items() if name != "quality"}
                shown |= entry.summary.get("quality") or {}
                yield result(task, name, entry, {"source": made.source, **shown})
        if finite.key in context.selected_asset_check_keys:
            bad, good = (
                made.gradients.summary["quarantined"],
                made.gradients.manifest["rows"],
            )
            yield dg.AssetCheckResult(
                asset_key=finite.asset_key,
                check_name=finite.name,
                passed=bad <= task.pool.max_quarantine * (bad + good),
                metadata={"quarantined": bad, "rows": bad + good},
            )
        if promise.key in context.selected_asset_check_keys:
            why = broken_promise(ws, made.sketches)
            yield dg.AssetCheckResult(
                asset_key=promise.asset_key,
                check_name=promise.name,
                passed=why is None,
                metadata={"why": why or "kept", **(made.sketches.summary["quality"] or {})},
            )

    return gradients_and_sketches
