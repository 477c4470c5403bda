"""The recipes and the loop under pipelines/ are what a user copies: each must work as it stands."""

import json
import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import logitcache as lc
from logitcache.cache.cache import open_cache
from logitcache.cli.app import main
from logitcache.config.recipe import load_recipe
from logitcache.models import Bundled as BundledTeacher
from logitcache.models import load_model
from logitcache.models.operations import flops_of
from logitcache.report.recipe_check import RECIPES, check_recipes, command_of
from logitcache.stage_one.derive.derive import DeriveRecipe, derive
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe
from logitcache.views.datasets.image_folder import ImageFolder

PIPELINES = Path(__file__).parents[2] / "pipelines"
RECIPE_FILES = sorted(PIPELINES.rglob("*.yaml"))


@pytest.fixture(autouse=True)
def _each_command_has_an_empty_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Run every verb as a container does: nothing is remembered of what an earlier one read or wrote."""

    def in_an_empty_home(verb: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            home = str(tmp_path_factory.mktemp("home"))
            monkeypatch.setenv("HOME", home)
            monkeypatch.setenv("XDG_CACHE_HOME", f"{home}/.cache")
            return verb(*args, **options)

        return run

    for name in ("precompute", "derive", "train"):
        monkeypatch.setitem(globals(), name, in_an_empty_home(globals()[name]))


def test_there_are_recipes_of_every_kind() -> None:
    assert {command_of(path) for path in RECIPE_FILES} == set(RECIPES)


@pytest.mark.parametrize("path", RECIPE_FILES, ids=lambda path: str(path.relative_to(PIPELINES)))
def test_recipe_is_valid_and_names_the_command_it_is_for_and_a_check_writes_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (checked,) = check_recipes([path])
    assert checked.error is None
    assert list(tmp_path.iterdir()) == []
    relative = path.relative_to(PIPELINES.parent)
    assert f"#   logitcache {checked.command} {relative}" in path.read_text()


SMALL = ["num_workers=0", "batch_size=4", "device=cpu"]
SHORT_WARMUP = ["schedule.warmup_epochs=1"]
UNTRAINED = [
    "teachers.resnet50.model={kind: torchvision, name: mobilenet_v3_small, weights: null}",
    "teachers.resnet50.preprocessing={mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of small photographs of different sizes."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for number in range(12):
        (root / f"class{number % 3}").mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (40 + number, 60 - number, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"class{number % 3}" / f"{number}.jpg")
    return root


def train_student(name: str, cache: Path, out: Path, *overrides: str) -> None:
    changes = [f"cache={cache}", f"out={out}", "epochs=2", "validation=null", *SMALL, *SHORT_WARMUP, *overrides]
    result = train(load_recipe(PIPELINES / name / "student.yaml", StudentRecipe, changes))
    assert result.images == 2 * 12
    assert result.teacher_passes == 0


@pytest.mark.parametrize("name", ["imagenet", "funmatch", "large_photographs"])
def test_the_recipe_runs_on_a_folder_of_ones_own(name: str, photos: Path, tmp_path: Path) -> None:
    cache = tmp_path / "c.zarr"
    changes = [f"cache={cache}", f"dataset.root={photos}", "dataset.labelled=false", "views.num_views=4"]
    result = precompute(
        load_recipe(PIPELINES / name / "precompute.yaml", PrecomputeRecipe, [*changes, *SMALL, *UNTRAINED])
    )
    assert result.row_views == 4 * 12
    train_student(name, cache, tmp_path / "run")


def test_photographs_that_come_later_are_appended(photos: Path, tmp_path: Path) -> None:
    folder, cache = tmp_path / "growing", tmp_path / "c.zarr"
    shutil.copytree(photos, folder, ignore=shutil.ignore_patterns("1*.jpg"))
    changes = [f"cache={cache}", f"dataset.root={folder}", "views.num_views=2", *SMALL, *UNTRAINED]
    recipe = load_recipe(PIPELINES / "growing_folder/precompute.yaml", PrecomputeRecipe, changes)
    assert precompute(recipe).row_views == 2 * 9  # 0, 2, 3, ... 9
    shutil.copytree(photos, folder, dirs_exist_ok=True)
    assert precompute(recipe).row_views == 2 * 3
    train_student("growing_folder", cache, tmp_path / "run")


def test_the_recipes_for_small_images_run_on_a_folder_of_ones_own(photos: Path, tmp_path: Path) -> None:
    folder, cache, teacher = f"dataset={{kind: image_folder, root: {photos}}}", tmp_path / "c.zarr", tmp_path / "t"
    changes = [folder, f"out={teacher}", "epochs=2", "model.width=4", *SMALL, *SHORT_WARMUP]
    taught = train(load_recipe(PIPELINES / "cifar" / "teacher.yaml", TeacherRecipe, changes))
    assert taught.images == 2 * 12
    changes = [folder, f"cache={cache}", f"teachers.teacher.model.path={teacher}", "views.num_views=4", *SMALL]
    precompute(load_recipe(PIPELINES / "cifar" / "precompute.yaml", PrecomputeRecipe, changes))
    train_student("cifar", cache, tmp_path / "run", "model.width=4")


BUNDLED = ["dataset.num_images=200", "num_workers=0", "device=cpu", "views.num_views=2"]
SHORT = ["epochs=2", "num_workers=0", "device=cpu", "validation=null", "schedule.warmup_epochs=0"]


def filled(name: str, cache: Path, *changes: str) -> Path:
    recipe = load_recipe(PIPELINES / name / "precompute.yaml", PrecomputeRecipe, [f"cache={cache}", *BUNDLED, *changes])
    assert precompute(recipe).row_views == 400
    return cache


def test_the_recipes_of_features_run(tmp_path: Path) -> None:
    cache = filled("features", tmp_path / "c.zarr")
    student = load_recipe(
        PIPELINES / "features" / "student.yaml", StudentRecipe, [f"cache={cache}", *SHORT, f"out={tmp_path}/s"]
    )
    assert train(student).teacher_passes == 0
    assert (tmp_path / "s" / "adapters.safetensors").is_file()


def test_generations_and_an_ensemble_of_two_teachers_run(tmp_path: Path) -> None:
    taught = ["dataset.num_images=200", *SHORT, f"out={tmp_path}/0"]
    train(load_recipe(PIPELINES / "self_distillation" / "teacher.yaml", TeacherRecipe, taught))
    for generation in (0, 1):
        model = f"teachers.teacher.model.path={tmp_path}/{generation}"
        cache = filled("self_distillation", tmp_path / f"{generation}.zarr", model)
        changes = [f"cache={cache}", *SHORT, f"out={tmp_path}/{generation + 1}"]
        train(load_recipe(PIPELINES / "self_distillation" / "student.yaml", StudentRecipe, changes))
    cache = filled("ensemble", tmp_path / "both.zarr", f"teachers.mine.model.path={tmp_path}/2")
    changes = [f"cache={cache}", *SHORT, f"out={tmp_path}/student"]
    assert train(load_recipe(PIPELINES / "ensemble" / "student.yaml", StudentRecipe, changes)).images == 400


def test_a_student_is_pruned_trained_for_int8_and_exported_and_one_table_has_all_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for extra, module in (("prune", "torch_pruning"), ("quant", "torchao"), ("export", "onnxscript")):
        pytest.importorskip(module, reason=f"the pipeline needs the extra {extra}")
    cache, steps = filled("fashion_mnist", tmp_path / "c.zarr"), ("float", "pruned", "int8")
    test = load_recipe(PIPELINES / "fashion_mnist/precompute_test.yaml", PrecomputeRecipe)
    entries = test.model_dump(mode="json", by_alias=True) | {"cache": str(tmp_path / "test.zarr"), "num_workers": 0}
    entries["dataset"]["num_images"] = 100
    precompute(load_recipe(entries, PrecomputeRecipe))
    shorter = {"float": ["schedule.warmup_epochs=0"], "pruned": ["schedule.warmup_epochs=0"], "int8": []}
    for name, before, file in zip(steps, ("", *steps), ("student", "pruned", "int8"), strict=False):
        changes = [f"cache={cache}", f"out={tmp_path / name}", f"validation.cache={tmp_path / 'test.zarr'}"]
        changes += [f"model.path={tmp_path / before}"] * bool(before)
        small = ["epochs=1", "num_workers=0", "device=cpu", *shorter[name]]
        train(load_recipe(PIPELINES / "shipping" / f"{file}.yaml", StudentRecipe, [*changes, *small]))
    models = [str(tmp_path / name) for name in (*steps, "int8.onnx")]
    assert main(["export", models[2], models[3]]) == 0
    capsys.readouterr()
    timed = ["--latency", "--batch-size", "1", "--threads", "1", "--repeats", "2", "--warm-up", "1"]
    assert main(["evaluate", *models, *timed, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["models"]
    assert [row["model"] for row in rows] == [*models, "teacher teacher"]
    assert [row["parent"] for row in rows] == [None, *models[:3], None]
    assert rows[1]["macs"] <= 0.5 * rows[0]["macs"]
    assert rows[1]["macs"] == rows[3]["macs"]
    assert rows[3]["arithmetic"] == "int8"
    assert rows[3]["parent_agreement"] >= 0.9
    assert all(row[key] > 0 for row in rows for key in ("num_parameters", "macs", "bytes"))
    assert all(row["measures"][key] is not None for row in rows for key in ("top1", "ece"))
    assert all(row["retention"] > 0 and row["measures"]["agreement"] > 0 for row in rows[:4])
    (teacher,) = rows[4]["latencies"]
    for row in rows:
        assert row["latencies"][0]["speed_up"] == teacher["seconds"] / row["latencies"][0]["seconds"]


def test_two_teachers_are_made_one_without_images_and_a_student_learns_from_it(tmp_path: Path) -> None:
    cache = filled("derive", tmp_path / "c.zarr", "teachers.mine.model={kind: bundled}")
    changes = [f"cache={cache}", f"out={tmp_path}/d.zarr", "device=cpu"]
    assert derive(load_recipe(PIPELINES / "derive" / "recipe.yaml", DeriveRecipe, changes)).row_views == 400
    both = "losses=[{kind: kl_divergence, teacher: both, temperature: 2}]"
    changes = [f"cache={tmp_path}/d.zarr", *SHORT, f"out={tmp_path}/student", both]
    student = load_recipe(PIPELINES / "fashion_mnist" / "student.yaml", StudentRecipe, changes)
    assert train(student).teacher_passes == 0


def test_a_student_learns_without_images_and_again_from_those_on_which_it_disagrees(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, changes = tmp_path / "made", ["num_batches=2", "batch_size=20", "steps=2", "device=cpu"]
    command = ["synthesize", str(PIPELINES / "data_free/synthesize.yaml"), str(made), "--json", "-q"]
    command += [word for change in changes for word in ("--set", change)]
    assert main(command) == 0
    images = json.loads(capsys.readouterr().out)["images"]
    for number, count in enumerate((40, 80)):
        cache, out = tmp_path / "c.zarr", tmp_path / f"student{number}"
        changed = [f"cache={cache}", f"dataset.root={images}", "views.num_views=2", "num_workers=0", "device=cpu"]
        recipe = load_recipe(PIPELINES / "data_free/precompute.yaml", PrecomputeRecipe, changed)
        assert precompute(recipe).row_views == 2 * 40
        assert main(["verify", str(cache), "-q"]) == 0
        capsys.readouterr()
        changed = [f"cache={cache}", f"out={out}", *SHORT[:3], "batch_size=20", "schedule.warmup_epochs=1"]
        changed.append("validation.dataset.num_images=100")
        result = train(load_recipe(PIPELINES / "data_free/student.yaml", StudentRecipe, changed))
        assert (result.images, result.teacher_passes) == (2 * count, 0)
        assert result.top1 is not None
        assert main([*command, "--student", str(out)]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["round"], found["num_images"]) == (number + 1, 40)
        assert 0 <= found["student_agreement"] <= 1


def test_photographs_and_names_of_classes_make_a_small_classifier(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="CLIP needs the extra hf")
    model, cache = tmp_path / "clip", tmp_path / "c.zarr"
    monkeypatch.setattr("sys.argv", ["tiny_clip.py", str(model)])
    runpy.run_path(str(PIPELINES / "zero_shot" / "tiny_clip.py"), run_name="__main__")
    changes = [f"cache={cache}", f"dataset.root={photos}", "views.num_views=2", *SMALL]
    changes += [f"teachers.clip.model.path={model}", "views.augmentations.0.size=32"]
    result = precompute(load_recipe(PIPELINES / "zero_shot" / "precompute.yaml", PrecomputeRecipe, changes))
    assert result.row_views == 2 * 12
    clip = open_cache(cache).manifest.teachers["clip"]
    assert (clip.num_classes, [stored.shape for stored in clip.stored_features.values()]) == (3, [(16,)])
    train_student("zero_shot", cache, tmp_path / "run")
    assert load_model(tmp_path / "run").module.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_a_student_on_images_of_half_the_size_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    halve = runpy.run_path(str(PIPELINES / "half_size/halve.py"))["halve"]
    cache = filled("fashion_mnist", tmp_path / "train.zarr")
    small = [f"cache={tmp_path}/test.zarr", "dataset.num_images=100", "num_workers=0", "device=cpu"]
    precompute(load_recipe(PIPELINES / "fashion_mnist/precompute_test.yaml", PrecomputeRecipe, small))
    for split, count in (("train", 200), ("test", 100)):
        halve(split, tmp_path / f"half-{split}", num_images=count)
        entry = ImageFolder(root=str(tmp_path / f"half-{split}"), labelled=False, mode="L")
        found = lc.pair(tmp_path / f"{split}.zarr", tmp_path / f"pairs-{split}", entry, by="stem")
        assert (found.pairs, found.image_shape) == (count, (1, 14, 14))
    changes = [f"cache={cache}", f"pairing={tmp_path}/pairs-train", f"out={tmp_path}/student", *SHORT]
    validated = f"validation={{cache: {tmp_path}/test.zarr, pairing: {tmp_path}/pairs-test}}"
    recipe = load_recipe(PIPELINES / "half_size/student.yaml", StudentRecipe, [*changes, validated])
    result = train(recipe)
    assert (result.images, result.teacher_passes) == (400, 0)
    assert result.agreement is not None
    assert load_model(tmp_path / "student").module.eval()(torch.zeros(1, 1, 14, 14)).shape == (1, 10)
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "student"), "--json"]) == 0
    own, teacher = json.loads(capsys.readouterr().out)["costs"]
    # Each is weighed on its own images: these two differ in width, and in four times the pixels.
    assert teacher["flops"] == flops_of(BundledTeacher().build(10, 1).module, torch.zeros(1, 1, 28, 28))
    assert own["flops"] == flops_of(load_model(tmp_path / "student").module, torch.zeros(1, 1, 14, 14))


def test_a_student_on_edges_in_grey_runs(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "c.zarr"
    changes = [f"cache={cache}", f"dataset.root={photos}", "views.num_views=2", "views.augmentations.0.size=32"]
    recipe = PIPELINES / "image_folder/precompute.yaml"
    precompute(load_recipe(recipe, PrecomputeRecipe, [*changes, *SMALL, *UNTRAINED]))
    monkeypatch.setattr("sys.argv", ["draw_edges.py", str(photos), str(tmp_path / "edges")])
    runpy.run_path(str(PIPELINES / "edges/draw_edges.py"), run_name="__main__")
    entry = f"{{kind: image_folder, root: {tmp_path}/edges, mode: L}}"
    assert main(["pair", str(cache), str(tmp_path / "pairs"), "--by", "stem", "--dataset", entry, "-q"]) == 0
    train_student("edges", cache, tmp_path / "run", f"pairing={tmp_path}/pairs", "model.width=4")
    assert load_model(tmp_path / "run").module.eval()(torch.zeros(1, 1, 32, 32)).shape == (1, 1000)


def test_custom_loop_learns_from_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"cache={tmp_path / 'c.zarr'}", "views.num_views=2", "dataset.num_images=500", "num_workers=0"]
    precompute(load_recipe(PIPELINES / "fashion_mnist" / "precompute.yaml", PrecomputeRecipe, overrides))
    monkeypatch.setattr("sys.argv", ["custom_loop.py", str(tmp_path / "c.zarr"), "--epochs", "6"])
    runpy.run_path(str(PIPELINES / "custom_loop.py"), run_name="__main__")
    agreement = [float(found) for found in re.findall(r"on ([\d.]+)%", capsys.readouterr().out)]
    assert len(agreement) == 6
    assert agreement[-1] > agreement[0]
    assert agreement[-1] > 30
