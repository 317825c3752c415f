"""The workflow as plain functions over the store: look it up, else make it, write it.

Nothing here knows an orchestrator. A script may call these in order (`dsel_assets/pipeline.py`);
the assets declare the same steps to Dagster and show what came out.

Cores are used by processes (`parallel.each`), and every process computes on one thread: threads on
top of processes slow torch down many times over, and the bits of a sum depend on their number.
"""

import os

for _library in ("OMP", "MKL", "OPENBLAS"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")
