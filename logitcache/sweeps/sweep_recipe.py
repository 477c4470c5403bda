"""The recipe of a sweep: a student, what varies, and over which seeds."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from logitcache.config.recipe import NOWHERE, Component, Count, Float
from logitcache.student.training_recipes import Seed, StudentRecipe
from logitcache.sweeps.search.search_recipe import Search
from logitcache.sweeps.search.space import Choices

CellName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.,=+-]*$", max_length=100)]
_DECIDED = ("out", "seed", "cell")
COSTS = {"latency", "parameters", "flops"}
"""Objectives that are measured of a model without training it, of which less is better."""


class SweptStudent(StudentRecipe):
    """The recipe of a student without `out`: each run of a sweep has its own folder."""

    out: str = Field(default=NOWHERE, description="Decided by the sweep.")


class Halving(Component):
    """Successive halving: after given epochs, only the best cells continue, with all their seeds.

    Jamieson and Talwalkar, "Non-stochastic best arm identification and hyperparameter optimization" (AISTATS 2016).
    With several metrics, cells are ranked by Pareto front, and within a front by crowding distance, as in Schmucker et
    al., "Multi-objective asynchronous successive halving" (2021).
    """

    epochs: Annotated[tuple[Count, ...], Field(min_length=1)] = Field(
        description="Epochs after which students are compared, ascending.", examples=[[2, 6]]
    )
    keep: Annotated[Float, Field(gt=0.0, lt=1.0)] = Field(
        default=1 / 3, description="Share of the cells that continue after each comparison; at least one does."
    )
    metrics: Annotated[tuple[str, ...], Field(min_length=1)] | None = Field(
        default=None,
        description="What to compare by: objectives, as in `search`, or columns of `metrics.jsonl`, of which more is "
        "better, or less if written as in `-loss`. By default the objectives of `search`, or `accuracy`.",
        examples=[["accuracy", "latency"]],
    )

    @model_validator(mode="after")
    def _ascend(self) -> Self:
        if list(self.epochs) != sorted(set(self.epochs)):
            raise ValueError("epochs must ascend")
        return self


class Timing(Component):
    """How to measure a model's latency: once, alternately with others, on black images of the training size."""

    batch_size: Count = Field(default=1, description="Images per batch.")
    threads: Count = Field(default=1, description="CPU threads.")
    warm_up: Count = Field(default=5, description="Untimed batches before the timed ones.")
    repeats: Count = Field(default=30, description="Timed batches, of which the median is taken.")


class SweepRecipe(Component):
    """Students with one recipe except for the keys that `grid`, `search` and `cells` change, each trained with every
    seed.

    A key of `grid` is a key of the student's recipe, as `--set` takes it, or several with commas between them that
    change together; a mapping gives the values names. `cells` are trained in addition to the grid or the search.
    """

    kind: Literal["sweep"] = "sweep"
    student: SweptStudent = Field(
        description="Recipe of a student, without `out`: each run has its own folder.",
        examples=[{"cache": "caches/fashion_mnist/train.zarr", "model": {"kind": "small_cnn"}, "epochs": 16}],
    )
    grid: dict[str, Choices] = Field(
        default={},
        description="Values by key of the student's recipe; every combination is a cell. Keys with commas between them "
        "change together; a mapping gives its values names.",
        examples=[{"losses.0.temperature": [1, 2, 4]}],
    )
    cells: dict[CellName, dict[str, JsonValue]] = Field(
        default={},
        description="Cells in addition to those of the grid: by name, values by key of the student's recipe.",
        examples=[{"labels": {"losses": [{"kind": "cross_entropy"}]}}],
    )
    search: Search | None = Field(
        default=None,
        description="Search of a space, instead of `grid`: each trial is a cell.",
        examples=[{"kind": "random", "space": {"model.width": [4, 8]}, "trials": 2}],
    )
    seeds: Count | Annotated[tuple[Seed, ...], Field(min_length=1)] = Field(
        default=1, description="Seeds of each cell: how many, counted from the student's `seed`, or a list."
    )
    baseline: str | None = Field(
        default=None,
        description="Cell that the others are compared with, seed by seed; by default the first.",
        examples=["labels"],
    )
    group_size: Count | None = Field(
        default=None,
        description="Largest number of students that share batches; by default all that can.",
        examples=[16],
    )
    halving: Halving | None = Field(
        default=None,
        description="Successive halving of the cells; by default all are trained to the end.",
        examples=[{"epochs": [2, 6]}],
    )
    latency: Timing = Field(default=Timing(), description="How latency is measured, if anything is compared by it.")
    inexact_targets: Literal["refuse", "warn"] = Field(
        default="refuse",
        description="Handling of cells at whose temperature the error of the cache's encoding exceeds its bound.",
    )

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of each cell."""
        first = self.student.seed
        return self.seeds if isinstance(self.seeds, tuple) else tuple(range(first, first + self.seeds))

    @property
    def compared_by(self) -> tuple[str, ...]:
        """What halving compares cells by."""
        stated = None if self.halving is None else self.halving.metrics
        return stated or (("accuracy",) if self.search is None else self.search.objectives)

    @property
    def needed_costs(self) -> set[str]:
        """The costs of a model that halving or the search compares by."""
        objectives = () if self.search is None else self.search.objectives
        return COSTS & {*objectives, *(self.compared_by if self.halving else ())}

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        space = {} if self.search is None else self.search.space
        keys = [key.strip() for names in (*self.grid, *space) for key in names.split(",")]
        keys += [key for changes in self.cells.values() for key in changes]
        for key in keys:
            if key in _DECIDED:
                raise ValueError(f"{key} is not for grid and cells to change: the sweep decides it. Fix: `seeds`")
        if self.search is not None:
            if self.grid:
                raise ValueError("a search takes the place of the grid. Fix: the grid's keys in search.space")
            images = self.student.validation is not None or any(key.startswith("validation") for key in space)
            if missing := [name for name in self.search.objectives if name not in COSTS and not images]:
                raise ValueError(f"{missing[0]} is measured on validation images. Fix: student.validation")
        if len(set(self.all_seeds)) < len(self.all_seeds):
            raise ValueError("seeds has one of them twice. Fix: each once")
        if self.halving is not None and self.halving.epochs[-1] >= self.student.epochs:
            raise ValueError(f"halving.epochs must be less than the {self.student.epochs} epochs of a student")
        return self


def as_sweep(student: StudentRecipe, **entries: Any) -> dict[str, Any]:
    """Return the entries of a sweep over a student's recipe, as its file states it."""
    stated = student.model_dump(mode="json", by_alias=True, exclude_unset=True)
    stated.pop("out", None)
    return {"kind": "sweep", "student": stated} | {key: value for key, value in entries.items() if value}
