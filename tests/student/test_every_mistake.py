"""`recipe check` names every mistake at once: of form, of options, and of names in caches."""

from pathlib import Path

import pytest
import yaml

from logitcache.errors import RecipeError, RecipeErrors, caught, raise_all
from logitcache.report.recipe_check import check_recipes
from logitcache.student.training import train
from tests.student.small import student

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
    # Without a number of epochs there is no recipe to compare: everything else of it is still named.
    assert all(text in both for text in of_form), both
    both = _checked(tmp_path, entries | {"bogus": 1, "optimizer": FORM["optimizer"]})
    assert all(text in both for text in (*of_form[1:], *of_names)), both
    assert both.startswith("8 mistakes:\n")


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
