"""The Hessian spectrum at the base checkpoint."""

import json

import dagster as dg

from dsel_assets.assets.declare import Home, all_of, key, picture, result
from dsel_assets.steps.workspace import Workspace
from dsel_assets.task import Task


def hessian_spectrum(task: Task) -> dg.AssetsDefinition:
    """Declare the task's `hessian_spectrum` asset."""

    @dg.asset(
        key=key(task, "hessian_spectrum"),
        deps=[all_of(task, "pool"), key(task, "base_model")],
        group_name="gradients",
        kinds={"pytorch"},
        code_version="1",
        description="Eigenvalues of the loss's Hessian by exact Lanczos, their density, and the "
        "sketch dimension that keeps the outliers. Taken once, on the first arrival.",
    )
    def hessian_spectrum(home: Home) -> dg.MaterializeResult:
        from dsel_assets.evaluation.plots import spectrum
        from dsel_assets.steps.spectrum import SPECTRUM, hessian_spectrum

        entry = hessian_spectrum(Workspace(task, home))
        found = json.loads(entry.file(SPECTRUM).read_text())
        plot = spectrum(
            found["eigenvalues"],
            found["density"]["grid"],
            found["density"]["values"],
            found["predicted_error"]["dimension"],
            found["predicted_error"]["relative_error"],
            entry.summary["advised_dimension"],
        )
        return result(task, "hessian_spectrum", entry, {"spectrum": picture(plot), **entry.summary})

    return hessian_spectrum
