"""Independent pieces of work over the cores: one small map behind every fan-out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

from tqdm import tqdm

Job = TypeVar("Job")
Result = TypeVar("Result")


def workers() -> int:
    """`DSEL_WORKERS`, else one a core."""
    return int(os.environ.get("DSEL_WORKERS", os.cpu_count() or 1))


def each(
    function: Callable[[Job], Result], jobs: Iterable[Job], what: str, *, threads: bool = False
) -> list[Result]:
    """`function` of every job, in order, with a progress bar; one thread of torch in every worker.

    threads: the workers share this process, and with it the pool that it has loaded; for work that
    lets go of the interpreter. A failing job raises here; what others wrote before stays.
    """
    import torch
    from joblib import Parallel, delayed

    todo = list(jobs)
    if not todo:
        return []
    count, before = min(workers(), len(todo)), torch.get_num_threads()
    alone = threads and count == 1  # and has all of torch's threads
    prefer = "threads" if threads else "processes"
    run = Parallel(n_jobs=count, return_as="generator", pre_dispatch="all", prefer=prefer)
    one = delayed(function) if alone else delayed(partial(_single_threaded, function))
    try:
        results = run(one(job) for job in todo)
        return list(tqdm(results, total=len(todo), desc=what, unit="cell", leave=False))
    finally:
        torch.set_num_threads(before)


def _single_threaded(function: Callable[[Job], Result], job: Job) -> Result:
    import torch

    torch.set_num_threads(1)
    return function(job)
