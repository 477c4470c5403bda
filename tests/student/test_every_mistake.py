"""`recipe check` names every mistake at once: of form, of options, and of names in caches."""

import functools
import operator
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from logitcache.errors import LogitCacheError, RecipeError, RecipeErrors, caught, raise_all
from logitcache.report.recipe_check import check_recipes
from logitcache.runtime import console
from logitcache.student.training import train
from tests.fixes import applied, entries, fix_of, listed
from tests.student.small import LINEAR, fill, network, student, teacher

FORM = {"epochs": "many", "bogus": 1, "optimizer": {"kind": "adam", "lr": 0.1}}
OFF = {"kind": "kl_divergence", "teacher": "first", "weight": 0}


def _checked(tmp_path: Path, entries: dict[str, object]) -> str:
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(entries))
    (checked,) = check_recipes([file])
    assert checked.error is not None
    return checked.error


def test_names_in_a_cache_are_judged_beside_mistakes_of_form(two_teachers: Path, tmp_path: Path) -> None:
    losses = [
        {"kind": "kl_divergence", "teacher": "third"},
        {"kind": "hint", "teacher": "first", "feature": "maps", "student": "nowhere"},
        OFF,
    ]
    ensembles = {"one": {"kind": "mean", "teachers": ["first", "x"]}, "two": {"kind": "mean", "teachers": ["y", "z"]}}
    entries: dict[str, object] = {"cache": str(two_teachers), "out": str(tmp_path / "run"), "num_views": 9}
    entries |= {"model": {"kind": "small_cnn"}, "epochs": 2, "losses": losses, "ensembles": ensembles}
    of_names = [
        "losses.0 (kl_divergence) names teacher 'third', the cache has ['first', 'second']",
        "losses.1 (hint) needs feature 'maps' of 'first'",
        "losses.2 has weight 0",
        "ensembles.one is made of ['x']",
        "ensembles.two is made of ['y', 'z']",
        "num_views is 9",
        "the model has no module 'nowhere'",
    ]
    of_form = ["key 'epochs' = \"many\"", "key 'bogus' = 1: unknown key", "did you mean 'adamw'"]
    error = _checked(tmp_path, entries)
    assert all(text in error for text in of_names), error
    both = _checked(tmp_path, entries | FORM | {"epochs": "many"})
    assert all(text in both for text in (*of_form, *of_names)), both
    both = _checked(tmp_path, entries | {"bogus": 1, "optimizer": FORM["optimizer"]})
    assert all(text in both for text in (*of_form[1:], *of_names)), both
    assert both.startswith("8 mistakes:\n")


@pytest.mark.parametrize("key", ["out", "epochs", "model", "model.kind", "optimizer.kind", "validation.dataset.kind"])
def test_a_missing_key_hides_no_names(key: str, two_teachers: Path, tmp_path: Path) -> None:
    whole = student(
        tmp_path / "run",
        two_teachers,
        num_views=9,
        losses=[{"kind": "kl_divergence", "teacher": "third"}],
        optimizer={"kind": "sgd"},
        validation={"dataset": {"kind": "bundled", "split": "test"}},
    )
    entries = whole.model_dump(mode="json", exclude_unset=True)
    *parents, last = key.split(".")
    del functools.reduce(operator.getitem, parents, entries)[last]
    error = _checked(tmp_path, entries)
    missing, losses, views = "is missing", "losses.0 (kl_divergence) names teacher 'third'", "num_views is 9"
    assert all(error.count(text) == 1 for text in (missing, losses, views)), error
    assert f"key '{key}' is missing" in error
    assert error.startswith("3 mistakes:\n")


def test_live_teachers_that_the_cache_does_not_have_are_named(two_teachers: Path, tmp_path: Path) -> None:
    recipe = student(
        tmp_path / "run",
        two_teachers,
        teachers={"thrid": {"model": {"kind": "small_cnn"}}},
        losses=[{"kind": "kl_divergence", "teacher": "first"}],
    )
    text = "teachers: ['thrid'] are none of"
    assert text in _checked(tmp_path, recipe.model_dump(mode="json"))
    with pytest.raises(RecipeError, match=re.escape(text)):
        train(recipe)


CLASSES: dict[str, object] = {"named": {"shoes": 1, "Bag": 2}, "listed": [1, 2]}
SHARED: dict[str, object] = {"dataset": {"kind": "bundled"}, "num_workers": 0, "device": "cpu"}


def test_the_classes_of_teachers_are_compared_with_the_images(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    classes = {name: {"model": {"kind": "bundled"}, "classes": given} for name, given in CLASSES.items()}
    entries = SHARED | {"teachers": classes}
    error = _checked(tmp_path, entries)
    assert "key 'cache' is missing" in error
    assert "teachers.named.classes does not give an output for each class of the data set" in error
    assert "'shoes'" in error
    assert "teachers.listed.classes lists 2 outputs, the data set has 10 classes" in error
    assert error.startswith("3 mistakes:\n")
    console.configure()
    missing = entries | {"cache": "c.zarr", "dataset": {"kind": "image_folder", "root": str(tmp_path / "none")}}
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(missing))
    (checked,) = check_recipes([file])
    assert checked.error is None
    assert (
        "`classes` are not compared, as the data set cannot be opened here: the image folder" in capfd.readouterr().err
    )


def test_class_maps_are_compared_with_the_images(two_teachers: Path, tmp_path: Path) -> None:
    recipe = student(
        tmp_path / "run",
        two_teachers,
        losses=[{"kind": "kl_divergence", "teacher": "first"}],
        validation={"dataset": {"kind": "bundled", "split": "test"}, "class_map": {"shoes": 1, "hats": 2, "Bag": 3}},
    )
    error = _checked(tmp_path, recipe.model_dump(mode="json"))
    assert error.startswith("2 mistakes:\n")
    assert all(f"validation.class_map: the images have no class '{name}'" in error for name in ("shoes", "hats")), error


NORMALISED = {"kind": "custom", "factory": "tests.student.test_every_mistake:normalised"}
WRONG_TEACHERS: dict[str, tuple[dict[str, object], str]] = {
    "a last batch of one": (
        {"model": NORMALISED, "dataset": {"kind": "bundled", "num_images": 30}, "batch_size": 29},
        "30 images in batches of 29 leave a batch of 1",
    ),
    "images of another size": ({"augmentations": [{"kind": "resize", "size": 20}]}, "the model cannot take the images"),
    "other classes": ({"model": LINEAR | {"arguments": {"num_classes": 7}}}, "the model predicts 7 classes"),
}


def normalised() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 4), nn.BatchNorm1d(4), nn.Linear(4, 10))


@pytest.mark.parametrize("case", WRONG_TEACHERS)
def test_a_teacher_is_tried_with_its_images(case: str, tmp_path: Path) -> None:
    changes, text = WRONG_TEACHERS[case]
    wrong = teacher(tmp_path / "run", **({"model": LINEAR} | changes))
    error = _checked(tmp_path, wrong.model_dump(mode="json"))
    assert text in error
    with pytest.raises(LogitCacheError) as refused:
        train(wrong)
    assert str(refused.value) == error
    assert not (tmp_path / "run").exists()


def test_training_lists_them_too(two_teachers: Path, tmp_path: Path) -> None:
    losses = [{"kind": "kl_divergence", "teacher": "third"}]
    with pytest.raises(RecipeErrors) as several:
        train(student(tmp_path / "run", two_teachers, losses=losses, num_views=9))
    assert len(several.value.errors) == 2


def test_a_derivation_is_compared_with_its_source(two_teachers: Path, tmp_path: Path) -> None:
    packed = {"kind": "dense", "storage": "packed"}
    teachers = {
        "third": {"logits": packed},
        "first": {"keep": ["pooled"], "bogus": 1},
        "both": {"members": {"first": 1, "x": 2}, "average": "logits", "logits": packed},
    }
    error = _checked(
        tmp_path, {"cache": str(two_teachers), "out": str(tmp_path / "d"), "num_views": 9, "teachers": teachers}
    )
    assert error.startswith("5 mistakes:\n")
    for text in ("unknown key", "no teacher 'third'", "has no ['pooled']", "no teacher 'x'", "num_views is 9"):
        assert text in error


def test_errors_are_gathered_flat() -> None:
    one, two, three = RecipeError("1"), RecipeError("2"), RecipeError("3")

    def fails(*errors: RecipeError) -> None:
        raise_all(errors)

    assert caught(lambda: fails(one), lambda: fails(two, three), lambda: fails()) == [one, two, three]
    with pytest.raises(RecipeError) as alone:
        raise_all([one])
    assert alone.value is one


KL = {"kind": "kl_divergence", "teacher": "first"}
HINT = {"kind": "hint", "teacher": "first", "feature": "maps", "student": "0"}
OF_HEAD = {"kind": "srrl", "teacher": "first", "feature": "maps", "student": "0"}
Fix = Callable[[str, dict[str, Any]], dict[str, Any]]


def _in_loss(entry: Callable[[str], dict[str, Any]]) -> Fix:
    return lambda error, recipe: recipe | {"losses": [recipe["losses"][0] | entry(error)]}


NAMES: dict[str, tuple[dict[str, Any], str, Fix]] = {
    "another teacher": (
        {"losses": [KL | {"teacher": "third"}]},
        "one of these",
        _in_loss(lambda error: {"teacher": listed(error)[0]}),
    ),
    "no teacher": (
        {"losses": [KL | {"teacher": None}]},
        "set `teacher`",
        _in_loss(lambda error: {re.search(r"Fix: set `(\w+)`", error)[1]: listed(error)[0]}),  # type: ignore[index]
    ),
    "members of an ensemble": (
        {"losses": [KL | {"teacher": "e"}], "ensembles": {"e": {"kind": "mean", "teachers": ["first", "x"]}}},
        "name these",
        lambda error, recipe: applied(recipe, ("ensembles.e.teachers", listed(error))),
    ),
    "live teachers": (
        {"losses": [KL], "teachers": {"frist": {"model": {"kind": "small_cnn"}}}},
        "name these",
        lambda error, recipe: recipe | {"teachers": {listed(error)[0]: recipe["teachers"]["frist"]}},
    ),
    "too many views": (
        {"losses": [KL], "num_views": 9},
        "at most these",
        lambda error, recipe: recipe | {"num_views": int(re.search(r"has (\d+) views", error)[1])},  # type: ignore[index]
    ),
    "a loss of weight 0": (
        {"losses": [KL, OFF]},
        "leave the loss out",
        lambda error, recipe: recipe | {"losses": [recipe["losses"][0]]},
    ),
}


@pytest.mark.parametrize("case", NAMES)
def test_the_fix_of_a_name_makes_the_recipe_sound(case: str, two_teachers: Path, tmp_path: Path) -> None:
    changes, text, fix = NAMES[case]
    recipe = {"cache": str(two_teachers), "out": str(tmp_path / "run"), "model": {"kind": "small_cnn"}, "epochs": 2}
    error = _checked(tmp_path, recipe | changes)
    assert text in fix_of(error)
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(fix(error, recipe | changes)))
    (checked,) = check_recipes([file])
    assert checked.error is None


@pytest.mark.parametrize("loss", [HINT, OF_HEAD])
def test_the_lines_for_a_precompute_recipe_give_a_loss_what_it_needs(loss: dict[str, Any], tmp_path: Path) -> None:
    """As often as `recipe check` asks for more."""
    teachers: dict[str, Any] = {"first": {}}
    cache, run = tmp_path / "c", {"out": str(tmp_path / "run"), "model": {"kind": "small_cnn"}, "epochs": 2}
    for number in range(4):
        entry = {"logits": {"kind": "dense"}, "features": {}} | teachers["first"]
        fill(cache / str(number), {"first": network()}, entry["logits"], features=entry["features"])
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(run | {"cache": str(cache / str(number)), "losses": [loss]}))
        (checked,) = check_recipes([file])
        if checked.error is None:
            break
        for line in checked.error.splitlines()[1:]:
            found = entries(fix_of(line).replace("…", '"0"'))
            loss = loss | {key: value for key, value in found if "." not in key}
            teachers = applied({"teachers": teachers}, *(entry for entry in found if "." in entry[0]))["teachers"]
    assert checked.error is None
    assert number > 0
