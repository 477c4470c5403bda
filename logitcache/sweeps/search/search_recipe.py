"""The entry `search` of a sweep's recipe: how trials are chosen, what they vary, and what they are compared by."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from logitcache.config.recipe import Component, Count
from logitcache.student.training_recipes import Seed
from logitcache.sweeps.search.space import RANGES, Space

Objective = Literal["accuracy", "agreement", "latency", "parameters", "flops"]
Objectives = Annotated[tuple[Objective, ...], Field(min_length=1)]


class Finalists(Component):
    """Trials to train again with fresh seeds, as the results that selected them are biased in their favour."""

    seeds: Count = Field(default=3, description="Seeds of each finalist, which follow those of the search.")
    count: Count | None = Field(
        default=None,
        description="Number of finalists, by Pareto front; by default the first front: with one objective, only the "
        "best trial.",
        examples=[4],
    )


class SearchBase(Component):
    """What all kinds of search have: the space, the number of trials, their objectives, and the finalists."""

    space: Space = Field(
        description="Values by key of the student's recipe: a list of choices, a mapping that names them, or a range. "
        "Keys with commas between them change together.",
        examples=[{"optimizer.lr": {"kind": "log_uniform", "low": 1e-3, "high": 0.1}, "model.width": [4, 8, 16]}],
    )
    trials: Count = Field(description="Total number of trials; a larger number continues a search.", examples=[16])
    seed: Seed = Field(default=0, description="Seed of the sampler.")
    objectives: Objectives = Field(
        default=("accuracy",),
        description="What trials are compared by, after their last epoch: `accuracy` (top-1, or mean average "
        "precision) and `agreement` with the teacher on the validation images, of which more is better; `latency`, "
        "`parameters` and `flops` of the model, of which less is better.",
    )
    finalists: Finalists | None = Field(
        default=None,
        description="Trials to train again with other seeds and compare; by default none.",
        examples=[{"seeds": 3}],
    )

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError("objectives has one of them twice. Fix: each once")
        for keys, values in self.space.items():
            if isinstance(values, dict) and "kind" in values:
                raise ValueError(
                    f"space.{keys} is neither choices nor a range. Fix: a list, or a mapping with kind "
                    f"({', '.join(RANGES)}), low and high, low being less than high"
                )
            if "," in keys and isinstance(values, Component):
                raise ValueError(f"space.{keys}: a range is of one key. Fix: a list of lists, one value for each key")
        return self


class Random(SearchBase):
    """Trials drawn at random: trial n depends on the seed, n and the key alone."""

    kind: Literal["random"] = "random"
    batch: Count | None = Field(
        default=None,
        description="Number of trials that are trained together, and of which halving keeps the best; by default all.",
        examples=[8],
    )

    @property
    def batch_size(self) -> int:
        """The number of trials that train together."""
        return self.batch or self.trials


class Optuna(SearchBase):
    """Trials chosen by Optuna from the results of earlier ones; needs `pip install 'logitcache[tune]'`.

    One objective is searched by TPE (Bergstra et al. 2011), several by NSGA-II (Deb et al. 2002).
    """

    kind: Literal["optuna"] = "optuna"
    batch: Count = Field(
        default=8,
        description="Number of trials that are drawn and trained together; those that halving trains to the end are a "
        "generation of NSGA-II.",
    )

    @property
    def batch_size(self) -> int:
        """The number of trials that train together."""
        return self.batch


Search = Annotated[Random | Optuna, Field(discriminator="kind")]
