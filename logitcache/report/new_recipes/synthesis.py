"""The recipe of `synthesize` for a teacher that the command line names."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from logitcache.config.recipe import is_stated, load_recipe
from logitcache.models import read_stored
from logitcache.report.load_own import load_own
from logitcache.report.new_recipes.sources import read_source
from logitcache.stage_one.synthesize.synthesize_recipe import SynthesizeRecipe


def load_synthesis(teacher: str, overrides: Sequence[str] = ()) -> SynthesizeRecipe:
    """Load a recipe, or write one for a run folder, run:DIR, timm:NAME or torchvision:NAME; apply overrides.

    The images have the model's channels and size by default. Raises RecipeError.
    """
    if teacher.endswith((".yaml", ".yml")):
        return load_own(teacher, SynthesizeRecipe, overrides)
    named = f"run:{teacher}" if Path(teacher).expanduser().is_dir() else teacher
    kind, _, path = named.partition(":")
    if kind == "run" and is_stated("size", overrides):
        stored = read_stored(Path(path).expanduser() / "model.json")
        entry: dict[str, object] = {"channels": stored.in_channels}
        model: Mapping[str, object] = {"kind": kind, "path": path}
    else:
        found = read_source("TEACHER", named)
        entry = {"channels": len(found.facts.preprocessing.mean), "size": list(found.size)}
        model = found.entry
    return load_recipe({"teacher": {"model": model}, **entry}, SynthesizeRecipe, overrides)
