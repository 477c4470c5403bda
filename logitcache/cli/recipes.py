"""The commands of `logitcache recipe`: write, list, copy and check recipes."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from logitcache.cli import completion
from logitcache.cli.common import CommandResult, Overrides, as_options
from logitcache.config.shipped_recipes import copy_recipes, find_recipes, shipped_recipes


def recipe_check(
    recipes: Annotated[list[Path], Argument(metavar="RECIPE", help="YAML files of any kind.")],
    overrides: Overrides,
) -> CommandResult:
    """Check recipes: report every mistake in them at once, with line, key and suggestion."""
    from logitcache.errors import RecipeError
    from logitcache.report.recipe_check import check_recipes

    checked = check_recipes(recipes, overrides)
    errors = tuple(recipe.error for recipe in checked if recipe.error is not None)
    lines = ([f"OK {r.path} ({r.command})", *(f"Warning: {w}" for w in r.warnings)] for r in checked if r.error is None)
    text = "".join(f"{line}\n" for one in lines for line in one)
    document = {"recipes": [asdict(recipe) for recipe in checked]}
    code = RecipeError.exit_code if errors else 0
    follows = (str(checked[0].command), checked[0].path, *as_options(overrides))
    return CommandResult(document, text, errors, RecipeError.__name__, code, follows=follows)


Name = Annotated[
    str,
    Argument(
        metavar="NAME",
        help="A recipe, as in fashion_mnist/student, or a folder, as in fashion_mnist.",
        autocompletion=completion.recipe_names,
    ),
]


def recipe_ls() -> CommandResult:
    """List the recipes that ship with logitcache."""
    recipes = shipped_recipes()
    document = {"recipes": [{"name": r.name, "command": r.command, "summary": r.summary} for r in recipes]}
    width, command_width = max(len(r.name) for r in recipes), max(len(r.command) for r in recipes)
    text = "".join(f"{r.name:{width}}  {r.command:{command_width}}  {r.summary}\n" for r in recipes)
    return CommandResult(document, text, follows=("recipe", "cp", "NAME"))


def recipe_show(name: Name) -> CommandResult:
    """Print a recipe that ships with logitcache, or all recipes of a folder."""
    texts = {recipe.name: recipe.file.read_text() for recipe in find_recipes(name)}
    return CommandResult({"recipes": texts}, "\n".join(texts.values()), follows=("recipe", "cp", name))


def recipe_cp(
    name: Name,
    folder: Annotated[
        Path, Argument(metavar="DIR", help="Folder to copy to; recipes keep the name of their own folder.")
    ] = Path("pipelines"),
) -> CommandResult:
    """Copy a recipe that ships with logitcache, or all recipes of a folder; overwrite nothing."""
    files = [str(file) for file in copy_recipes(name, folder)]
    text = "".join(f"{file}\n" for file in files)
    return CommandResult(
        {"files": files}, text, follows=("recipe", "check", *(file for file in files if file.endswith(".yaml")))
    )


def recipe_new(
    images: Annotated[str, Option("--images", metavar="DIR", help="A folder of images, in class folders or not.")],
    teacher: Annotated[str, Option("--teacher", metavar="MODEL", help="timm:NAME, torchvision:NAME or run:DIR.")],
    student: Annotated[
        str, Option("--student", metavar="MODEL", help="Model to train, given in the same way, or small_cnn.")
    ],
    out: Annotated[
        Path | None, Option("--out", metavar="DIR", show_default="pipelines/IMAGES", help="Folder of the recipes.")
    ] = None,
) -> CommandResult:
    """Write commented recipes of both stages for your own images; overwrite nothing."""
    from logitcache.report.new_recipes.new_recipes import new_recipes

    made = new_recipes(images, teacher, student, out)
    text = "".join(f"{file}\n" for file in made.files)
    fine_tuning = [file for file in made.files if Path(file).name == "teacher.yaml"]
    follows = ("train-teacher", *fine_tuning) if fine_tuning else ("plan", made.files[0])
    return CommandResult(asdict(made), text, follows=follows)
