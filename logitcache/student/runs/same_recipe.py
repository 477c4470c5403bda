"""Compare a recipe with that of the run which it continues."""

from pathlib import Path
from typing import Any

from logitcache.config.recipe import Component
from logitcache.config.yaml_text import flattened
from logitcache.errors import MismatchError

# A continuation may change how fast and where a run computes, never what. Places are free: the identity of what lies
# there is compared.
_FREE = (
    *("device", "num_workers", "start_method", "checkpoint_steps", "verify", "teachers", "trackers"),
    *("validation.groups", "validation.taps"),
    *("out", "cache", "dataset", "validation.cache", "validation.dataset"),
    *("pairing", "teacher_dataset", "validation.pairing"),
)


def require_same(run: Path, begun: Component, recipe: Component) -> int | None:
    """Raise MismatchError unless a run that has begun has the same recipe, apart from places and speed.

    More epochs extend the run: returns how many it had, else None.
    """
    old, new = _entries(begun), _entries(recipe)
    extends = old["epochs"] < new["epochs"]
    # Releases without `tap_layouts` took every tap for channels first, those without `fused` knew no fused kernels.
    assumed: list[tuple[str, object, object]] = [("fused", "auto", False)]
    assumed += [(key, None, "channels_first") for key in new if key.startswith("tap_layouts.")]
    lines = [
        f"{key}: the run has {old.get(key)!r}, the recipe {new.get(key)!r}"
        for key in dict.fromkeys([*old, *new])
        if key != "tap_layouts"
        and old.get(key) != new.get(key)
        and not (key == "epochs" and extends)
        and (key, old.get(key), new.get(key)) not in assumed
    ]
    if lines:
        raise MismatchError(
            f"{run} is a run of another recipe:\n  "
            + "\n  ".join(lines)
            + "\n  Fix: change these back to continue it, or give another `out:`"
        )
    return int(old["epochs"]) if extends else None


def _entries(recipe: Component) -> dict[str, Any]:
    """List what decides the numbers, by dotted key."""
    return {
        key: value
        for key, value in flattened(recipe.model_dump(mode="json", by_alias=True))
        if not any(f"{key}.".startswith(f"{free}.") for free in _FREE)
    }
