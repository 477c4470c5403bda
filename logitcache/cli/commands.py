"""All commands by name, in the order of the help.

Each parses its arguments, calls one function of the library and returns the result. The library is imported inside the
functions: `--help` must not wait for torch.
"""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Exit, Option, Typer

from logitcache.cli import caches, explain, recipes, reports, shipping, stage_one, stage_two
from logitcache.cli.common import CommandResult, add_command
from logitcache.cli.help import Command, GroupedCommands, epilog
from logitcache.config.shipped_recipes import NEW_RECIPES
from logitcache.runtime import console

app = Typer(
    cls=GroupedCommands,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    # Typer's own limit is 80 columns, however wide the terminal.
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 1000},
    help="Run a teacher once, then train any number of students on the pixels it saw.",
    epilog=epilog("demo", "getting-started.md", shlex.join(["logitcache", *NEW_RECIPES])),
)
recipe_app = Typer(
    cls=GroupedCommands,
    rich_markup_mode=None,
    help="Write, list, copy and check recipes.",
    epilog=epilog("recipe ls", "reference/recipes.md", "logitcache recipe show NAME"),
)


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
    """Run both stages on bundled images, in about a minute; write demo.json and the chart demo.svg."""
    from logitcache.report.demo.demo import run_demo

    return CommandResult(asdict(run_demo(out, quick=quick)), follows=NEW_RECIPES)


_START, _ONE, _TWO, _CACHES = "Start", "Stage one: make a cache", "Stage two: train students", "Caches"
_SHIP = "Ship a student"
_COMMANDS = {
    "demo": Command(
        demo, _START, "demo --out logitcache-demo", "getting-started.md", shlex.join(["logitcache", *NEW_RECIPES])
    ),
    "env": Command(reports.env, _START, "env --json", "getting-started.md", "logitcache demo"),
    "plan": Command(
        stage_one.plan,
        *(_ONE, "plan pipelines/image_folder/precompute.yaml --set dataset.root=/data/photos"),
        *("how-to/plan-the-cost.md", "logitcache precompute RECIPE"),
    ),
    "precompute": Command(
        stage_one.precompute,
        *(_ONE, "precompute pipelines/image_folder/precompute.yaml --set dataset.root=/data/photos"),
        *("how-to/resume-and-grow.md", "logitcache train-student RECIPE"),
    ),
    "synthesize": Command(
        stage_one.synthesize,
        *(
            _ONE,
            "synthesize runs/teacher synthesized",
            "how-to/distil-without-images.md",
            "logitcache precompute RECIPE",
        ),
    ),
    "materialize": Command(
        stage_one.materialize,
        *(_ONE, "materialize pipelines/other_frameworks/precompute.yaml views --format npz"),
        *("how-to/teachers-of-other-frameworks.md", "logitcache import-targets RECIPE ANSWERS --whose TEXT"),
    ),
    "import-targets": Command(
        stage_one.import_targets,
        *(_ONE, 'import-targets pipelines/other_frameworks/precompute.yaml answers.npz --whose "Keras ResNet50"'),
        *("how-to/teachers-of-other-frameworks.md", "logitcache train-student RECIPE"),
    ),
    "derive": Command(
        stage_one.derive,
        *(_ONE, "derive pipelines/derive/recipe.yaml", "how-to/derive-a-cache.md", "logitcache inspect CACHE"),
    ),
    "train-student": Command(
        stage_two.train_student,
        *(_TWO, "train-student pipelines/fashion_mnist/student.yaml --set seed=1"),
        *("how-to/distil-your-photographs.md", "logitcache evaluate RUN"),
    ),
    "train-teacher": Command(
        stage_two.train_teacher,
        *(_TWO, "train-teacher pipelines/fashion_mnist/teacher.yaml --resume"),
        *("how-to/bring-your-teacher.md", "logitcache precompute RECIPE, with model: {kind: run, path: RUN}"),
    ),
    "sweep": Command(
        stage_two.sweep,
        *(_TWO, "sweep pipelines/fashion_mnist/student.yaml sweeps/t --grid losses.0.temperature=1,2,4 --seeds 3"),
        *("how-to/compare-many-students.md", "logitcache evaluate OUT/runs/NAME"),
    ),
    "evaluate": Command(
        stage_two.evaluate,
        *(_TWO, "evaluate runs/fashion_mnist/student --latency"),
        *("how-to/use-a-trained-student.md", "logitcache predict RUN IMAGE"),
    ),
    "predict": Command(
        stage_two.predict,
        *(_TWO, "predict runs/photos photo.jpg photos/ --top 3", "how-to/use-a-trained-student.md"),
        "logitcache.load_student(RUN), in Python",
    ),
    "app": Command(
        reports.app,
        *(
            _TWO,
            "app runs/student runs/wide --cache caches/fashion_mnist/train.zarr",
            "how-to/use-a-trained-student.md",
        ),
        "logitcache report RUN",
    ),
    "export": Command(
        shipping.export,
        *(_SHIP, "export runs/fashion_mnist/student student.onnx --latency", "how-to/ship-a-student.md"),
        "logitcache predict FILE IMAGE",
    ),
    "quantize": Command(
        shipping.quantize,
        *(_SHIP, "quantize runs/fashion_mnist/student student.int8.onnx --latency", "how-to/ship-a-student.md"),
        "logitcache predict FILE IMAGE",
    ),
    "prune": Command(
        shipping.prune,
        *(_SHIP, "prune runs/student runs/pruned --macs 0.5 --set epochs=3", "how-to/ship-a-student.md"),
        "logitcache evaluate OUT --latency",
    ),
    "report": Command(
        reports.report,
        *(_TWO, "report runs/ caches/fashion_mnist/train.zarr --out report.html"),
        *("how-to/report.md", "logitcache predict RUN IMAGE"),
    ),
    "log": Command(
        reports.log,
        *(_TWO, "log runs/ --to tensorboard", "how-to/track-runs.md", "logitcache report RUN"),
    ),
    "summary": Command(
        caches.summary,
        *(_CACHES, "summary caches/fashion_mnist/train.zarr", "getting-started.md", "logitcache train-student RECIPE"),
    ),
    "inspect": Command(
        caches.inspect,
        *(_CACHES, "inspect caches/fashion_mnist/train.zarr --view 0/17 --out shoe.html"),
        *("how-to/look-at-a-cache.md", "logitcache summary CACHE"),
    ),
    "suspects": Command(
        caches.suspects,
        *(_CACHES, "suspects caches/fashion_mnist/train.zarr --csv suspects.csv --sheet suspects.html"),
        *("how-to/look-at-a-cache.md", "logitcache inspect CACHE --view VIEW/IMAGE"),
    ),
    "verify": Command(
        caches.verify,
        *(_CACHES, "verify caches/photos.zarr --repair pipelines/image_folder/precompute.yaml"),
        *("how-to/resume-and-grow.md", "logitcache inspect CACHE"),
    ),
    "pair": Command(
        caches.pair,
        *(_CACHES, "pair caches/fashion_mnist/train.zarr pairs/half --dataset photos-half --by stem"),
        *("how-to/pair-images.md", "logitcache train-student RECIPE, with pairing: OUT"),
    ),
    "card": Command(
        reports.card,
        *(_CACHES, "card caches/photos.zarr --licence cc-by-4.0", "how-to/share-a-cache.md", "logitcache verify CACHE"),
    ),
    "gc": Command(
        caches.gc,
        *(_CACHES, "gc caches/photos.zarr --dry-run", "how-to/resume-and-grow.md", "logitcache verify CACHE"),
    ),
}
_RECIPES = "Commands"
_RECIPE_COMMANDS = {
    "new": Command(
        recipes.recipe_new,
        *(_RECIPES, shlex.join(NEW_RECIPES), "how-to/distil-your-photographs.md"),
        "logitcache plan pipelines/photos/precompute.yaml",
    ),
    "check": Command(
        recipes.recipe_check,
        *(_RECIPES, "recipe check pipelines/fashion_mnist/student.yaml", "reference/recipes.md"),
        "the command that it names",
    ),
    "ls": Command(recipes.recipe_ls, _RECIPES, "recipe ls", "getting-started.md", "logitcache recipe show NAME"),
    "show": Command(
        recipes.recipe_show,
        *(_RECIPES, "recipe show fashion_mnist/student", "getting-started.md", "logitcache recipe cp NAME"),
    ),
    "cp": Command(
        recipes.recipe_cp,
        *(_RECIPES, "recipe cp image_folder", "getting-started.md", "logitcache recipe check FILE"),
    ),
    "explain": Command(
        explain.recipe_explain,
        *(_RECIPES, "recipe explain losses.kl_divergence.temperature", "reference/recipes.md"),
        "logitcache recipe check FILE",
    ),
    "schema": Command(
        explain.recipe_schema,
        *(_RECIPES, "recipe schema train-student", "reference/recipes.md", "logitcache recipe check FILE"),
    ),
}
app.add_typer(recipe_app, name="recipe", rich_help_panel=_START)
for _app, _commands in ((app, _COMMANDS), (recipe_app, _RECIPE_COMMANDS)):
    for _name, _command in _commands.items():
        _help_texts = {"rich_help_panel": _command.group, "epilog": epilog(*_command[2:])}
        add_command(_app, _name, _command.function, uses_torch=_app is app, **_help_texts)
