"""Trackers: what writes a run's metrics to a service or a format of others.

A new tracker is a component in a file of its own; import it here and add it to the union.
"""

from typing import Annotated

from pydantic import Field

from logitcache.student.trackers.base import TrackedRun as TrackedRun
from logitcache.student.trackers.mlflow import MLflow
from logitcache.student.trackers.tensorboard import TensorBoard
from logitcache.student.trackers.trackio import Trackio
from logitcache.student.trackers.wandb import WandB

Tracker = Annotated[TensorBoard | WandB | Trackio | MLflow, Field(discriminator="kind")]
"""An entry of `trackers`."""

Trackers = Annotated[
    tuple[Tracker, ...],
    Field(
        description="Trackers to which the first process writes the metrics of each epoch: the same rows as "
        "`logitcache log RUN` writes afterwards.",
        examples=[[{"kind": "tensorboard"}]],
    ),
]
"""The entry `trackers` of a recipe."""
