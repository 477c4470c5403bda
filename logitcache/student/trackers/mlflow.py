"""MLflow: a run of an experiment, on a server or in a folder."""

import time
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from logitcache.student.trackers.base import Sink, TrackedRun, TrackerBase

_TAG = "logitcache.run"
_LONGEST = 500


class MLflow(TrackerBase):
    """Log metrics and the recipe to MLflow."""

    extra: ClassVar[str] = "mlflow"

    kind: Literal["mlflow"] = "mlflow"
    experiment: str = Field(default="logitcache", description="Name of the experiment, created if it does not exist.")
    tracking_uri: str | None = Field(
        default=None,
        description="Server or store; by default the environment's `MLFLOW_TRACKING_URI`.",
        examples=["sqlite:///mlflow.db"],
    )

    def open(self, run: TrackedRun) -> Sink:
        """Find the run by its tag, or create it."""
        return _Run(self, run)


class _Run(Sink):
    def __init__(self, entry: MLflow, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        self._client, self._metric, identity = MlflowClient(entry.tracking_uri), Metric, run.note()["id"]
        found = self._client.get_experiment_by_name(entry.experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(entry.experiment)
        known = self._client.search_runs([experiment], f"tags.`{_TAG}` = '{identity}'")
        if known:
            self._id = known[0].info.run_id
        else:
            self._id = self._client.create_run(experiment, tags={_TAG: identity}, run_name=run.name).info.run_id
            params = [Param(key, str(value)[:_LONGEST]) for key, value in run.recipe.items()]
            self._client.log_batch(self._id, params=params[:100], tags=[RunTag("logitcache.path", str(run.path))])
        self._written: dict[str, set[int]] = {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of a step that MLflow does not have."""
        new = [name for name in values if step not in self._steps(name)]
        now = int(1000 * time.time())
        metrics: list[Any] = [self._metric(name, values[name], now, step) for name in new]
        self._client.log_batch(self._id, metrics=metrics)
        for name in new:
            self._steps(name).add(step)

    def _steps(self, name: str) -> set[int]:
        if name not in self._written:
            self._written[name] = {one.step for one in self._client.get_metric_history(self._id, name)}
        return self._written[name]

    def close(self) -> None:
        """End the run."""
        self._client.set_terminated(self._id)
