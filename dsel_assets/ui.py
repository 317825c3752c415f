"""Dagster's and MLflow's pages side by side, on this machine only."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from dsel_assets.resources.tracking import Tracking
from dsel_assets.runner import ROOT
from dsel_assets.steps.workspace import home

HOST = "127.0.0.1"


def serve(dagster_port: int, mlflow_port: int) -> int:
    """Run both until one ends or the user interrupts; returns an exit code."""
    tracking = Tracking.at(home())
    quiet = {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # ten processes and two gigabytes less
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PYTHONWARNINGS": "ignore",  # dagster's notices of what supersedes `dagster dev`
    }
    pages = f"http://{HOST}:{mlflow_port}"
    environment = os.environ | quiet | {"DSEL_HOME": str(home())}
    if not tracking.served:
        environment["DSEL_MLFLOW_UI"] = pages
    python = [sys.executable, "-m"]
    commands = {
        "Dagster": [
            *python, "dagster", "dev", "-w", str(ROOT / "workspace.yaml"), "-h", HOST,
            "-p", str(dagster_port), "--log-level", "warning",
        ],
        "MLflow": [
            *python, "mlflow", "server", "--host", HOST, "--port", str(mlflow_port),
            "--workers", "1", "--backend-store-uri", tracking.uri,
            "--artifacts-destination", str(tracking.artifacts),
        ],
    }  # fmt: skip
    # sessions of their own and default signal handlers: dagster maps SIGTERM onto SIGINT, which a
    # background shell has switched off
    if tracking.served:  # somebody runs that server already
        del commands["MLflow"]
    processes = {
        name: subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True, preexec_fn=_default_signals
        )
        for name, command in commands.items()
    }
    mlflow = tracking.uri if tracking.served else pages
    print(f"Dagster http://{HOST}:{dagster_port}   MLflow {mlflow}   Ctrl-C ends")
    for number in (signal.SIGINT, signal.SIGTERM):  # a background shell starts us with SIGINT off
        signal.signal(number, signal.default_int_handler)
    try:
        while all(process.poll() is None for process in processes.values()):
            time.sleep(0.5)
        ended = [name for name, process in processes.items() if process.poll() is not None]
        print(f"{' and '.join(ended)} ended; is the port taken?", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        for process in processes.values():
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGINT)
        for process in processes.values():
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
