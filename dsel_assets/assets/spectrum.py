"""The Hessian spectrum at the base checkpoint and along finetuning."""

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
            (found["measured_error"]["dimension"], found["measured_error"]["rms"]),
        )
        return result(task, "hessian_spectrum", entry, {"spectrum": picture(plot), **entry.summary})

    return hessian_spectrum


def finetuning_spectra(task: Task) -> dg.AssetsDefinition:
    """Declare the task's `finetuning_spectra`, partitioned by step of one finetuning run."""
    steps = [step for step in task.spectrum.steps if step <= task.finetune.steps]

    @dg.asset(
        key=key(task, "finetuning_spectra"),
        deps=[key(task, "hessian_spectrum")],
        partitions_def=dg.StaticPartitionsDefinition([str(step) for step in steps]),
        group_name="gradients",
        kinds={"pytorch"},
        code_version="1",
        description="The spectrum after some steps of finetuning on the first arrival: do outliers "
        "appear, do negative eigenvalues fade, does the gradient lie in the outliers' space? Not "
        "part of a job; materialise the steps that you want to see.",
    )
    def finetuning_spectra(context: dg.AssetExecutionContext, home: Home) -> dg.MaterializeResult:
        from dsel_assets.evaluation.plots import spectra
        from dsel_assets.steps.spectrum import spectra_so_far, spectrum_on_the_way

        ws = Workspace(task, home)
        entry = spectrum_on_the_way(ws, int(context.partition_key))
        metadata = {"spectra": picture(spectra(spectra_so_far(ws))), **entry.summary}
        return result(task, "finetuning_spectra", entry, metadata)

    return finetuning_spectra
