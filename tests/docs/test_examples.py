"""Every example of README and docs is run, in a small world; `NOT_RUN` lists what is not, and why."""

import os
import re
import shlex
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from logitcache.cache.cache import open_cache
from logitcache.cli.app import main
from logitcache.config.recipe import load_recipe
from logitcache.report.recipe_check import check_recipes
from logitcache.shipping.export import export
from logitcache.stage_one.derive.derive import derive
from logitcache.stage_one.derive.derive_recipe import DeriveRecipe
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.training import train
from tests.cache.made import contents, verified
from tests.docs.world import COLOURED, HALF, PHOTOS, here, make_world, shrunk
from tests.models.hub import keep_timm_weights
from tests.student.small import TEST_IMAGES, student

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FASHION = ROOT / "pipelines/fashion_mnist/precompute.yaml"
EXCERPTS: dict[str, dict[str, Any]] = {
    "dataset": {"cache": "c.zarr", "teachers": {"t": {"model": COLOURED, "preprocessing": HALF}}},
    "teachers": {
        "cache": "c.zarr",
        "dataset": PHOTOS,
        "views": {"augmentations": [{"kind": "center_crop", "size": 32}]},
    },
    "ensembles": {"cache": "caches/ensemble.zarr", "out": "run", "epochs": 1, "model": {"kind": "small_cnn"}},
    "trackers": {
        "cache": "caches/ensemble.zarr",
        "out": "run",
        "epochs": 1,
        "model": {"kind": "small_cnn"},
        "losses": [{"kind": "kl_divergence", "teacher": "a"}],
    },
}
"""What the rest of a recipe may be of which a page shows a part, by the first key of that part."""
NOT_RUN = {
    " make ": "runs this suite, and the demo, which tests/cli/test_end_to_end.py runs",
    " demo ": "takes a minute; tests/cli/test_end_to_end.py runs it",
    " app ": "serves until Ctrl-C; tests/integrations/test_app.py drives it with a browser",
    " pip install ": "takes a network",
    " --workers ": "starts processes, as tests/stage_one/test_local_cluster.py does",
    " --scheduler ": "takes a scheduler, as tests/stage_one/test_cluster.py starts one",
    " torchrun ": "starts processes, as tests/student/test_distributed.py does",
    " dask ": "starts a scheduler, and workers with a GPU each",
    " sbatch ": "takes Slurm; tests/docs/test_cluster_docs.py runs the script",
    " python pipelines/edges/": "tests/docs/world.py draws the edges, and tests/docs/test_pipelines.py runs the script",
    " python pipelines/other_frameworks/": "takes Keras; tests/integrations/test_keras_teacher.py runs the script",
    " import-targets ": "takes answers; tests/stage_one/test_import_targets.py runs it",
    " python pipelines/slurm/": "takes Slurm; tests/docs/test_cluster_docs.py runs the script",
}
"""Why commands that have such a part are not run."""


def blocks(language: str) -> list[Any]:
    """List the examples in a language as (page and number, text)."""
    found = [(page, re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)) for page in PAGES]
    return [
        pytest.param(f"{page.name} {number}", text, id=f"{page.name} {number}")
        for page, texts in found
        for number, text in enumerate(texts)
    ]


def test_every_example_is_in_a_language_that_is_tried() -> None:
    languages = {
        name
        for page in PAGES
        for name in re.findall(r"^```(\S*)\n.*?^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    }
    assert languages == {"bash", "python", "text", "yaml"}


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "README.zh.md"], ids=lambda page: page.name
)
def test_every_link_leads_to_a_file(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for file in re.findall(r"`((?:tests|benchmarks|logitcache)/[\w/]+\.py|pipelines/\S+?yaml)", text):
        assert (ROOT / file).exists() or "my_" in file, file


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cache, the run and the image that the pages name."""
    folder = tmp_path_factory.mktemp("examples")
    cache = folder / "caches/fashion_mnist/train.zarr"
    changes = [f"cache={cache}", "dataset.num_images=50", "num_workers=0", "views.num_views=2"]
    precompute(load_recipe(FASHION, PrecomputeRecipe, changes))
    train(student(folder / "runs/student", cache, epochs=1, validation={"dataset": TEST_IMAGES}))
    if find_spec("onnxscript") is not None:
        export(folder / "runs/student", folder / "student.onnx")
    (folder / "runs/photos").symlink_to("student")
    Image.new("L", (40, 30)).save(folder / "shoe.png")
    Image.new("RGB", (40, 30)).save(folder / "photo.jpg")
    return folder


def require_extra(name: str) -> None:
    """Skip the examples of a page without the libraries that it takes."""
    if name.startswith("ship-a-student"):
        pytest.importorskip("onnxscript", reason="exports need the extra export")


def by_this_environment() -> list[Any]:
    """List the Python examples but those of libraries that tests/integrations/test_pages.py runs."""
    others = ("lightning.md 0", "accelerate.md 0", "keras.md 0")
    return [block for block in blocks("python") if block.values[0] not in others]


@pytest.mark.parametrize(("name", "code"), by_this_environment())
def test_python_runs(name: str, code: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require_extra(name)
    monkeypatch.chdir(place)
    code = code.replace("s3://bucket/caches/train.zarr", "caches/fashion_mnist/train.zarr")
    torch.manual_seed(0)
    exec(compile(code, name, "exec"), {"__name__": "__main__"})


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the recipes, images and caches that the pages name."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_world(folder)
        for name in ("test_resnet.r160_in1k", "test_efficientnet.r160_in1k"):
            keep_timm_weights(folder / "hub", name, patch)
    before = contents(folder)
    yield folder
    assert contents(folder) == before, "a command wrote to a file, and did not replace it"


@pytest.fixture
def world(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: the template, by links to its files, which commands replace and do not write to."""
    folder = tmp_path / "world"
    shutil.copytree(template, folder, copy_function=os.link)
    monkeypatch.chdir(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, value in {"NUM_VIEWS": 2, "STEPS": 1, "MOST_WORKERS": 0}.items():
        monkeypatch.setattr(f"logitcache.report.new_recipes.texts.{name}", value)
    return folder


@pytest.mark.parametrize(("name", "text"), blocks("yaml"))
def test_recipes_run(name: str, text: str, world: Path) -> None:
    entries = yaml.safe_load(here(text))
    if "kind: transformers" in text:
        pytest.importorskip("transformers", reason="models of Hugging Face need the extra hf")
    if entries.get("search", {}).get("kind") == "optuna":
        pytest.importorskip("optuna")
    if "cache" not in entries:
        entries = EXCERPTS.get(next(iter(entries)), {}) | entries
    file = world / "example.yaml"
    file.write_text(yaml.safe_dump(shrunk(entries)))
    (checked,) = check_recipes([file])
    assert checked.error is None
    folder = [str(made_by(entries))] if checked.command == "sweep" else []
    if folder:
        precompute(load_recipe(Path("pipelines/fashion_mnist/precompute.yaml"), PrecomputeRecipe))
    assert main([str(checked.command), str(file), *folder]) == 0
    assert made_by(entries).exists()


def made_by(entries: dict[str, Any]) -> Path:
    if entries.get("kind") == "sweep":
        return Path("sweeps/example")
    return Path(entries["out"] if "out" in entries else entries["cache"])


def lines_of(text: str) -> list[str]:
    """List the commands of an example, without what is said of them."""
    lines = [line.split(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


def reason(line: str) -> str | None:
    """Return why a command is not run here; None if it is."""
    return next((why for part, why in NOT_RUN.items() if part in f" {line} "), None)


@pytest.mark.parametrize(("name", "text"), blocks("bash"))
def test_commands_run_as_they_are_written(name: str, text: str, world: Path) -> None:
    require_extra(name)
    for line in lines_of(here(text)):
        if "architecture.yaml" in line:
            pytest.importorskip("optuna")
        if reason(line) is None:
            program, *words = shlex.split(line)
            assert program == "logitcache", line
            assert main(words) == 0, line


def test_what_is_not_run_is_on_the_pages() -> None:
    lines = [line for block in blocks("bash") for line in lines_of(block.values[1])]
    assert [part for part in NOT_RUN if not any(part in f" {line} " for line in lines)] == []
    assert sum(reason(line) is None for line in lines) >= 15


@pytest.mark.parametrize(("name", "text"), blocks("bash"))
def test_commands_exist_with_their_options(name: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split(" #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    for words in (shlex.split(line) for line in lines if line.startswith("logitcache ")):
        names = words[1:3] if words[1] == "recipe" else words[1:2]
        assert main([*names, "--help"]) == 0, words
        shown = capsys.readouterr().out
        assert all(word in shown for word in words if word.startswith("--")), words
        for word in words:
            # What `recipe new` writes is there when the block runs, in the test above.
            assert not word.startswith("pipelines/") or (ROOT / word).exists() or "recipe new" in text, word


def test_the_first_example_of_derive_runs_as_written(world: Path) -> None:
    (text,) = [block.values[1] for block in blocks("yaml") if block.values[0] == "derive-a-cache.md 0"]
    derive(load_recipe(yaml.safe_load(text), DeriveRecipe))
    assert verified(Path("caches/imagenet-small.zarr")) == ()
    made = open_cache("caches/imagenet-small.zarr").manifest.teachers
    assert {name: set(entry.targets) for name, entry in made.items()} == {
        "resnet50": {"logits", "pooled"},
        "vit": {"logits"},
        "both": {"logits"},
    }
