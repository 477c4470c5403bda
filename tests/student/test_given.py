"""Objects in place of the entries of a recipe: a module and a data set are passed to `train` themselves."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from logitcache.cli import main
from logitcache.errors import MismatchError, RecipeError
from logitcache.models import Classifier
from logitcache.report.recipe_check import check_recipes
from logitcache.student.evaluation.evaluate import evaluate
from logitcache.student.runs.trained import load_student
from logitcache.student.training import train
from logitcache.student.training_recipes import TeacherRecipe
from tests.student.small import GREY, LINEAR, TEST_IMAGES, PartlyLabelled, linear, recipe, student, teacher, weights

GIVEN: dict[str, Any] = {"model": None}
VALIDATED = GIVEN | {"validation": {"dataset": TEST_IMAGES}}


def module(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return linear()


@pytest.fixture
def run(cache: Path, tmp_path: Path) -> Path:
    train(student(tmp_path / "run", cache, **VALIDATED), model=module())
    return tmp_path / "run"


def test_a_module_is_trained_as_its_entry_is(cache: Path, tmp_path: Path) -> None:
    given = module(0)
    before = [parameter.clone() for parameter in given.parameters()]
    ours = train(student(tmp_path / "given", cache, **GIVEN), model=given)
    named = train(student(tmp_path / "named", cache, model=LINEAR))  # which draws its weights by seed 0
    assert weights(ours) == weights(named)
    assert not any(map(torch.equal, before, given.parameters()))


def test_the_run_records_no_model_and_gives_its_weights_to_a_module(run: Path) -> None:
    assert json.loads((run / "model.json").read_text())["model"] is None
    with pytest.raises(
        RecipeError, match=r"names no model.\n  Fix: load_student\(run, model=module\); or, .*factory: "
    ):
        load_student(run)
    pixels = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    given: Tensor = load_student(run, model=module(5))(pixels)
    built: Tensor = load_student(run, factory="tests.student.small:linear")(pixels)
    assert torch.equal(given, built)
    with pytest.raises(RecipeError):
        load_student(run, model=nn.Linear(3, 3))


def test_evaluate_is_given_a_factory(run: Path) -> None:
    with pytest.raises(RecipeError, match=r"Fix: --set model\.factory=pkg\.mod:function"):
        evaluate(run)
    assert evaluate(run, ["model.factory=tests.student.small:linear"]).images == 100


def test_a_run_goes_on_with_the_same_module(run: Path, cache: Path, tmp_path: Path) -> None:
    constant = {"schedule": {"final_lr": 1.0}}
    train(student(tmp_path / "a", cache, epochs=1, **GIVEN | constant), model=module())
    train(student(tmp_path / "a", cache, epochs=2, **GIVEN | constant), model=module(9), resume=True)
    whole = train(student(tmp_path / "b", cache, epochs=2, **GIVEN | constant), model=module())
    assert weights(tmp_path / "a") == weights(whole)
    with pytest.raises(MismatchError):
        train(student(tmp_path / "a", cache, epochs=3, **GIVEN | constant), model=nn.Sequential(linear()), resume=True)


def test_a_normalisation_comes_with_a_classifier(cache: Path, tmp_path: Path) -> None:
    train(student(tmp_path / "run", cache, epochs=1, **GIVEN), model=Classifier(module(), GREY))
    assert json.loads((tmp_path / "run" / "model.json").read_text())["preprocessing"]["mean"] == [0.3]


def test_a_data_set_is_given_to_either(partly: Path, tmp_path: Path) -> None:
    images = PartlyLabelled()
    assert train(student(tmp_path / "s", partly, epochs=1), dataset=images).images == 200
    entry = teacher(tmp_path / "t", dataset=None)
    result = train(entry, dataset=images)
    assert train(entry, dataset=images, resume=True) == result
    assert "dataset: null" in (tmp_path / "t" / "recipe.yaml").read_text()


def test_without_an_entry_and_without_an_object_nothing_is_opened(tmp_path: Path, capsys: Any) -> None:
    nothing = recipe(TeacherRecipe, out=str(tmp_path / "t"), epochs=1)
    with pytest.raises(RecipeError, match="2 mistakes") as refused:
        train(nothing)
    fixes = re.findall(r"key '(\w+)' is missing. Fix: .*lc.train\(recipe, (\w+)=", str(refused.value))
    assert fixes == [("model", "model"), ("dataset", "dataset")]
    file = tmp_path / "student.yaml"
    file.write_text(f"cache: none\nout: {tmp_path}/s\nepochs: 1\n")
    assert main(["train-student", str(file)]) == 2
    assert "key 'model' is missing" in capsys.readouterr().err
    (checked,) = check_recipes([file])
    assert "key 'model' is missing" in (checked.error or "")
