"""MLflow as a projection of the store: what is missing there is logged, what is stale is removed.

One experiment a task, one parent run a generation, one child run a cell; the champion is a version
of the registered model that bears the task's name. Every call compares what is logged with what
should be, so that a call that failed or was killed is made good by the next one.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

CHAMPION = "champion"
UI = "http://127.0.0.1:5000"
TRAINING = "workflowType=machine_learning"
LOCK_SECONDS = 120  # how long to wait for other processes that log to the same MLflow
EVERY = 50_000  # the most runs that MLflow returns at once
DEFAULTS = {  # read by mlflow: no telemetry, no chatter, and seconds instead of minutes when down
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": "false",
}


@dataclass(frozen=True)
class TrackedCell:
    """One strategy at one budget with one seed, as MLflow shows it.

    selection, metric  identities of the cell's artifacts; another metric supersedes a logged one
    settings, finetune of the strategy and of the training; logged with their prefix
    scores             by split, then by name, as in {"test": {"accuracy": 0.9}}
    curve              mean training loss of each tenth of the steps
    picks              by name, (number of the pick, value): what a greedy choice gained on the way
    digest, source     the generation's identity, and where its examples landed
    ended              Unix time at which the cell was finished, in seconds
    """

    strategy: str
    budget: int
    seed: int
    selection: str
    metric: str
    settings: Mapping[str, Any]
    finetune: Mapping[str, Any]
    scores: Mapping[str, Mapping[str, float]]
    curve: Sequence[float]
    select_seconds: float
    train_seconds: float
    digest: str
    source: str
    picks: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    ended: float = field(default_factory=time.time)

    @property
    def place(self) -> tuple[str, str, str]:
        """What a child run stands for within a generation: strategy, budget, seed."""
        return self.strategy, str(self.budget), str(self.seed)

    @property
    def tags(self) -> dict[str, str]:
        """The child run's tags that say what it stands for and what it was made from."""
        strategy, budget, seed = self.place
        return {
            "dsel.strategy": strategy,
            "dsel.budget": budget,
            "dsel.seed": seed,
            "dsel.selection": self.selection,
            "dsel.metric": self.metric,
        }


@dataclass(frozen=True)
class Tracking:
    """An MLflow, at a database URI or a server's address. Safe for several processes of one home.

    artifacts: folder for figures and weights where `uri` is a database; a server has its own.
    """

    uri: str
    artifacts: Path

    @classmethod
    def at(cls, home: Path) -> Tracking:
        """The SQLite database under the home, or the MLflow that `DSEL_MLFLOW_URI` names."""
        folder = home.absolute() / "mlflow"
        uri = os.environ.get("DSEL_MLFLOW_URI", f"sqlite:///{folder / 'mlflow.db'}")
        return cls(uri, folder / "artifacts")

    def initialise(self) -> None:
        """Create the database if it is not there; takes seconds the first time."""
        with self._locked() as client:
            client.search_experiments(max_results=1)

    def url(self, task: str) -> str:
        """The task's experiment in MLflow's pages: the server's, or a database's on port 5000 here.

        Without a workflow type MLflow shows an empty page of traces. `DSEL_MLFLOW_UI` names another
        address.
        """
        with self._locked() as client:
            base = os.environ.get("DSEL_MLFLOW_UI", self.uri if self.served else UI)
            number = self._experiment(client, task)
            return f"{base.rstrip('/')}/#/experiments/{number}/runs?{TRAINING}"

    def log_cells(
        self, task: str, generation: int, cells: Sequence[TrackedCell], run_tags: Mapping[str, str]
    ) -> str:
        """Log the cells that are not logged yet, each as a child run; returns the parent's id.

        run_tags go on every new child, e.g. `dagster.run_id`. A child of the same strategy, budget
        and seed that holds another metric, or was left unfinished, is deleted.
        """
        with self._locked() as client:
            parent = self._parent(client, task, generation)
            experiment, parent_id = parent.info.experiment_id, parent.info.run_id
            places = _children(client, experiment, parent_id)
            for cell in cells:
                logged = False
                for run in places.get(cell.place, []):
                    if not logged and _holds(run, cell):
                        logged = True
                    else:
                        client.delete_run(run.info.run_id)
                if not logged:
                    tags = {
                        **run_tags,
                        **cell.tags,
                        "dsel.generation": str(generation),
                        "mlflow.parentRunId": parent_id,
                    }
                    _log_cell(client, experiment, f"{task} pool {generation}", cell, tags)
            client.set_terminated(parent_id)
            return parent_id

    def log_summary(
        self,
        task: str,
        generation: int,
        metrics: Mapping[str, float],
        figures: Mapping[str, bytes],
        leaderboard: Sequence[Mapping[str, Any]],
        identity: str,
    ) -> str:
        """Put a generation's findings on its parent run, which is what MLflow's charts show first.

        metrics: named as in `accuracy/random:100` (MLflow refuses an @); figures: PNG bytes by
        name; leaderboard: rows, shown as a table. identity: of what all this was made from; if the
        parent already holds it, nothing is done. Returns the parent's id.
        """
        with self._locked() as client:
            from mlflow.entities import Metric, RunTag

            parent = self._parent(client, task, generation)
            run_id = parent.info.run_id
            if parent.data.tags.get("dsel.summary") == identity:
                return run_id
            with tempfile.TemporaryDirectory() as folder:
                for name, png in figures.items():
                    path = Path(folder, "figures", f"{name}.png")
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(png)
                Path(folder, "leaderboard.json").write_text(json.dumps(_table(leaderboard)))
                client.log_artifacts(run_id, folder)
            now = round(1000 * time.time())
            tags = {
                "mlflow.loggedArtifacts": '[{"path": "leaderboard.json", "type": "table"}]',
                "dsel.summary": identity,
            }
            client.log_batch(
                run_id,
                metrics=[Metric(name, value, now, 0) for name, value in metrics.items()],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )
            client.set_terminated(run_id)
            return run_id

    def register_champion(
        self, task: str, champion: Mapping[str, Any] | None, weights: Path
    ) -> None:
        """Point the alias `champion` of the task's registered model at the promoted checkpoint.

        champion: has `strategy`, `budget`, `generation`, `selection`, `checkpoint` (identity of the
        weights) and `evidence`; None takes the alias away. weights: the safetensors file. A
        checkpoint that is registered already, say before a rollback, keeps its version.
        """
        with self._locked() as client:
            found = client.search_registered_models(f"name = '{task}'")
            alias = found[0].aliases.get(CHAMPION) if found else None
            if champion is None:
                if alias:
                    client.delete_registered_model_alias(task, CHAMPION)
                return
            if not found:
                client.create_registered_model(task)
            versions = {
                version.tags.get("dsel.checkpoint"): version.version
                for version in client.search_model_versions(f"name = '{task}'")
            }
            version = versions.get(champion["checkpoint"])
            if version is None:
                version = self._new_version(client, task, champion, weights)
            if str(alias) != str(version):
                client.set_registered_model_alias(task, CHAMPION, version)

    def _new_version(
        self, client: MlflowClient, task: str, champion: Mapping[str, Any], weights: Path
    ) -> str:
        # on the parent run, as a child may be superseded while its weights are still the champion
        parent = self._parent(client, task, champion["generation"]).info
        folder = f"{CHAMPION}/{champion['checkpoint']}"
        client.log_artifact(parent.run_id, str(weights), folder)
        keys = ("strategy", "budget", "generation", "selection", "checkpoint")
        created = client.create_model_version(
            task,
            source=f"{parent.artifact_uri}/{folder}",
            run_id=parent.run_id,
            tags={f"dsel.{key}": str(champion[key]) for key in keys},
            description=json.dumps(champion["evidence"], sort_keys=True),
            await_creation_for=0,
        )
        return created.version

    @property
    def served(self) -> bool:
        """Whether it is a server's address, and not a database of our own."""
        return self.uri.startswith("http")

    @contextmanager
    def _locked(self) -> Iterator[MlflowClient]:
        """The client, while no other process of this home uses one.

        Creating the database and looking for a run before creating it are races otherwise.
        """
        self.artifacts.mkdir(parents=True, exist_ok=True)
        with FileLock(self.artifacts.with_name("lock"), timeout=LOCK_SECONDS):
            yield self._client

    @cached_property
    def _client(self) -> MlflowClient:
        for key, value in DEFAULTS.items():
            os.environ.setdefault(key, value)
        from mlflow import MlflowClient

        for name in ("alembic", "mlflow.store.db.utils"):  # a screenful about each migration
            logging.getLogger(name).setLevel(logging.WARNING)
        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def _experiment(self, client: MlflowClient, task: str) -> str:
        found = client.get_experiment_by_name(task)
        if found is None:
            folder = None if self.served else (self.artifacts / task).absolute().as_uri()
            return client.create_experiment(task, folder)
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        return found.experiment_id

    def _parent(self, client: MlflowClient, task: str, generation: int) -> Run:
        experiment = self._experiment(client, task)
        tags = {"dsel.level": "generation", "dsel.generation": str(generation)}
        wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
        found = client.search_runs([experiment], wanted, max_results=1)
        if found:
            return found[0]
        return client.create_run(experiment, tags=tags, run_name=f"generation {generation}")


@contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Go on without MLflow: an error inside becomes a warning that names what was not logged."""
    try:
        yield
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:120]
        warnings.warn(
            f"not in MLflow: {what}; the next run logs it ({type(error).__name__}: {reason})",
            stacklevel=3,
        )


def _children(
    client: MlflowClient, experiment: str, parent: str
) -> dict[tuple[str, str, str], list[Run]]:
    found: dict[tuple[str, str, str], list[Run]] = {}
    wanted = f"tags.`mlflow.parentRunId` = '{parent}'"
    for run in client.search_runs([experiment], wanted, max_results=EVERY):
        tags = run.data.tags
        place = tags["dsel.strategy"], tags["dsel.budget"], tags["dsel.seed"]
        found.setdefault(place, []).append(run)
    return found


def _holds(run: Run, cell: TrackedCell) -> bool:
    return run.info.status == "FINISHED" and cell.tags.items() <= run.data.tags.items()


def _log_cell(
    client: MlflowClient, experiment: str, dataset: str, cell: TrackedCell, tags: dict[str, str]
) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    end = round(1000 * cell.ended)
    start = round(end - 1000 * (cell.select_seconds + cell.train_seconds))
    name = f"{cell.strategy} {cell.budget} seed {cell.seed}"
    run_id = client.create_run(experiment, start, tags, name).info.run_id
    params = {
        "strategy": cell.strategy,
        "budget": cell.budget,
        "seed": cell.seed,
        **{f"{cell.strategy}.{key}": value for key, value in cell.settings.items()},
        **{f"finetune.{key}": value for key, value in cell.finetune.items()},
    }
    metrics = {
        "select_seconds": cell.select_seconds,
        "train_seconds": cell.train_seconds,
    }
    for split, scores in cell.scores.items():
        metrics |= {f"{split}/{key}": value for key, value in scores.items()}
    curve = [Metric("train/loss", v, end, tenth) for tenth, v in enumerate(cell.curve, 1)]
    for name, points in cell.picks.items():
        client.log_batch(run_id, [Metric(f"select/{name}", v, end, pick) for pick, v in points])
    client.log_batch(
        run_id,
        metrics=[Metric(key, value, end, 0) for key, value in metrics.items()] + curve,
        params=[Param(key, str(value)) for key, value in params.items()],
    )
    kind = cell.source.partition("://")[0] if "://" in cell.source else "local"
    origin = json.dumps({"uri": cell.source})
    inputs = Dataset(dataset, cell.digest, source_type=kind, source=origin)
    client.log_inputs(run_id, [DatasetInput(inputs, [InputTag("mlflow.data.context", "training")])])
    # the last step: a child that is not finished counts as not logged
    client.set_terminated(run_id, end_time=end)


def _table(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows as MLflow reads a table: columns, and each row's values in their order; null for NaN."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    values = [[row.get(key) for key in columns] for row in rows]
    return {"columns": columns, "data": [[v if v == v else None for v in row] for row in values]}
