"""Independent pieces of work over the cores: one small map behind every fan-out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TypeVar

from tqdm import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")


def workers() -> int:
    """`DSEL_WORKERS`, else one a core."""
    return int(os.environ.get("DSEL_WORKERS", os.cpu_count() or 1))


def each(function: Callable[[Job], Result], jobs: Iterable[Job], what: str) -> list[Result]:
    """`function` of every job, in order, with a progress bar; one thread of torch in every worker.

    A failing job raises here; what others wrote before stays.
    """
    from joblib import Parallel, delayed

    todo = list(jobs)
    if not todo:
        return []
    count = min(workers(), len(todo))
    run = Parallel(n_jobs=count, return_as="generator", pre_dispatch="all")
    results = run(delayed(_single_threaded)(function, job) for job in todo)
    return list(tqdm(results, total=len(todo), desc=what, unit="cell", leave=False))


def _single_threaded(function: Callable[[Job], Result], job: Job) -> Result:
    import torch

    torch.set_num_threads(1)
    return function(job)
