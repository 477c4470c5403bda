"""The recipe entry of a teacher that only the user's own code builds."""

from pydantic import Field

from logitcache.config.recipe import Component
from logitcache.models import Model, Preprocessing


class LiveTeacher(Component):
    """A teacher of the cache whose model is your own code, for `--online` and `evaluate`.

    Other teachers are built from the cache's manifest. `--teachers-from precompute.yaml` takes these entries from the
    recipe that filled the cache.
    """

    model: Model = Field(
        description="Model of the teacher.", examples=[{"kind": "custom", "factory": "mypackage.models:teacher"}]
    )
    preprocessing: Preprocessing | None = Field(
        default=None,
        description="Normalisation of the model's input; by default the model's own.",
        examples=[{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}],
    )
