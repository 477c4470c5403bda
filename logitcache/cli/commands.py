"""All commands by name, in the order of the help.

Each parses its arguments, calls one function of the library and returns the result. The library is imported inside the
functions: `--help` must not wait for torch.
"""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option, Typer

from logitcache.cli import caches, explain, stage_one, stage_two
from logitcache.cli.common import CommandResult, Overrides, add_command
from logitcache.config.shipped_recipes import copy_recipes, find_recipes, shipped_recipes
from logitcache.runtime import console

app = Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run a teacher once, then train any number of students on the pixels it saw.",
)
recipe_app = Typer(rich_markup_mode=None, help="List, copy and check recipes.")
app.add_typer(recipe_app, name="recipe")


def _print_version(wanted: bool) -> None:
    if wanted:
        import logitcache

        console.write(f"logitcache {logitcache.__version__}\n")
        raise Exit


@app.callback()
def _program(
    version: Annotated[
        bool, Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def demo(
    out: Annotated[Path, Option("--out", metavar="DIR", help="Folder of the cache and the students.")] = Path(
        "logitcache-demo"
    ),
    quick: Annotated[bool, Option("--quick", help="A few seconds; the numbers mean little.")] = False,
) -> CommandResult:
    """Run both stages on bundled images, in about a minute."""
    from logitcache.report.demo import run_demo

    return CommandResult(asdict(run_demo(out, quick=quick)))


def recipe_check(
    recipes: Annotated[list[Path], Argument(metavar="RECIPE", help="YAML files of any kind.")],
    overrides: Overrides,
) -> CommandResult:
    """Check whether recipes are valid. Names every mistake in them; reads no images."""
    from logitcache.errors import RecipeError
    from logitcache.report.recipe_check import check_recipes

    checked = check_recipes(recipes, overrides)
    errors = tuple(recipe.error for recipe in checked if recipe.error is not None)
    lines = ([f"OK {r.path} ({r.command})", *(f"Warning: {w}" for w in r.warnings)] for r in checked if r.error is None)
    text = "".join(f"{line}\n" for one in lines for line in one)
    document = {"recipes": [asdict(recipe) for recipe in checked]}
    code = RecipeError.exit_code if errors else 0
    return CommandResult(document, text, errors, RecipeError.__name__, code)


Name = Annotated[str, Argument(metavar="NAME", help="A recipe, fashion_mnist/student, or a folder, fashion_mnist.")]


def recipe_ls() -> CommandResult:
    """List the recipes that ship with logitcache."""
    recipes = shipped_recipes()
    document = {"recipes": [{"name": r.name, "command": r.command, "summary": r.summary} for r in recipes]}
    width, command_width = max(len(r.name) for r in recipes), max(len(r.command) for r in recipes)
    text = "".join(f"{r.name:{width}}  {r.command:{command_width}}  {r.summary}\n" for r in recipes)
    return CommandResult(document, text)


def recipe_show(name: Name) -> CommandResult:
    """Print a recipe that ships with logitcache, or all of a folder."""
    texts = {recipe.name: recipe.file.read_text() for recipe in find_recipes(name)}
    return CommandResult({"recipes": texts}, "\n".join(texts.values()))


def recipe_cp(
    name: Name,
    folder: Annotated[Path, Argument(metavar="DIR", help="Where to copy to; recipes keep their folder's name.")] = Path(
        "pipelines"
    ),
) -> CommandResult:
    """Copy a recipe that ships with logitcache, or all of a folder; nothing is overwritten."""
    files = [str(file) for file in copy_recipes(name, folder)]
    return CommandResult({"files": files}, "".join(f"{file}\n" for file in files))


def recipe_new(
    images: Annotated[str, Option("--images", metavar="DIR", help="A folder of images, in class folders or not.")],
    teacher: Annotated[str, Option("--teacher", metavar="MODEL", help="timm:NAME, torchvision:NAME or run:DIR.")],
    student: Annotated[str, Option("--student", metavar="MODEL", help="The same, of the model to train.")],
    out: Annotated[
        Path | None, Option("--out", metavar="DIR", show_default="pipelines/IMAGES", help="Folder of the recipes.")
    ] = None,
) -> CommandResult:
    """Write commented recipes of both stages for a folder of your own; nothing is overwritten."""
    from logitcache.report.new_recipes import new_recipes

    made = new_recipes(images, teacher, student, out)
    return CommandResult(asdict(made), "".join(f"{file}\n" for file in made.files))


def env() -> CommandResult:
    """Show the versions and devices that decide results."""
    from logitcache.report.environment import environment

    return CommandResult(environment())


_COMMANDS: dict[str, Callable[..., CommandResult]] = {
    "demo": demo,
    "plan": stage_one.plan,
    "precompute": stage_one.precompute,
    "derive": stage_one.derive,
    "train-student": stage_two.train_student,
    "train-teacher": stage_two.train_teacher,
    "evaluate": stage_two.evaluate,
    "predict": stage_two.predict,
    "summary": caches.summary,
    "inspect": caches.inspect,
    "suspects": caches.suspects,
    "verify": caches.verify,
    "gc": caches.gc,
    "env": env,
}
_RECIPE_COMMANDS: dict[str, Callable[..., CommandResult]] = {
    "new": recipe_new,
    "check": recipe_check,
    "ls": recipe_ls,
    "show": recipe_show,
    "cp": recipe_cp,
    "explain": explain.recipe_explain,
    "schema": explain.recipe_schema,
}
for _group, _commands in ((app, _COMMANDS), (recipe_app, _RECIPE_COMMANDS)):
    for _name, _function in _commands.items():
        add_command(_group, _name, _function)
