"""A task as Dagster definitions: its assets, checks, jobs, sensors and schedule."""

from pathlib import Path

import dagster as dg

from dsel_assets.assets.base_model import base_model
from dsel_assets.assets.checkpoints import checkpoints
from dsel_assets.assets.declare import key
from dsel_assets.assets.declared import declared
from dsel_assets.assets.intrinsic import intrinsic_dimension
from dsel_assets.assets.label_requests import label_requests
from dsel_assets.assets.metrics import metrics
from dsel_assets.assets.pool import pool
from dsel_assets.assets.sketches import sketches
from dsel_assets.assets.spectrum import finetuning_spectra, hessian_spectrum
from dsel_assets.assets.subsets import subsets
from dsel_assets.assets.target import target
from dsel_assets.assets.verdict import verdict
from dsel_assets.automation import automation, jobs, model_sensor
from dsel_assets.checks import checks
from dsel_assets.resources.warehouse import SOURCES
from dsel_assets.sql import load_checks, load_models, sql_assets
from dsel_assets.task import Task

ASSETS = (
    target,
    base_model,
    pool,
    sketches,
    hessian_spectrum,
    finetuning_spectra,
    intrinsic_dimension,
    subsets,
    checkpoints,
    metrics,
    verdict,
)


def build(task: Task, sql: Path) -> dg.Definitions:
    """Everything that one task declares; `sql` is the folder of the SQL models."""
    models = load_models(sql)
    # the verdict publishes the views that the models read
    sources = dict.fromkeys(SOURCES, key(task, "verdict"))
    named = jobs(task, [model.name for model in models])
    sensors, schedules = automation(task, named)
    sensors.append(model_sensor(task, [model.name for model in models]))
    return dg.Definitions(
        assets=[
            *declared(task),
            *(asset(task) for asset in (*ASSETS, *([label_requests] if task.active else []))),
            *sql_assets(task.name, models, load_checks(sql / "checks"), sources),
        ],
        asset_checks=checks(task),
        jobs=list(named.values()),
        sensors=sensors,
        schedules=schedules,
    )
