"""A run measured beside the teachers that its cache tells how to build."""

import json
from pathlib import Path

import pytest
import yaml
from torch import nn

from logitcache.cli import main
from logitcache.config.recipe import load_recipe
from logitcache.errors import CacheError, RecipeError
from logitcache.models import Bundled
from logitcache.report.beside_teachers import evaluate_beside_teachers
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.evaluation.cost import LatencyPlan
from logitcache.student.training import train
from tests.student.small import TEST_IMAGES, TINY, fill, linear, student, teacher

CUSTOM = {"kind": "custom", "factory": "tests.student.small:linear"}
IDENTITY = {"mean": [0.0], "std": [1.0]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a cache of the shipped teacher, of one of the user's own code and of a module."""
    root = tmp_path_factory.mktemp("beside")
    teachers = {
        "shipped": {"model": {"kind": "bundled"}},
        "own": {"model": CUSTOM, "preprocessing": IDENTITY},
    }
    cache = fill(root / "cache", teachers={"module": linear()}, images={"kind": "bundled", "num_images": 50})
    train(student(root / "one", cache, epochs=1, validation={"dataset": TEST_IMAGES}))
    cache = fill_recipe(root / "several", teachers)
    losses = [{"kind": "kl_divergence", "teacher": "shipped"}]
    train(student(root / "run", cache, epochs=1, losses=losses, validation={"dataset": TEST_IMAGES}))
    return root


def fill_recipe(path: Path, teachers: dict[str, object]) -> Path:
    entries = {"cache": str(path), "dataset": {"kind": "bundled", "num_images": 50}, "teachers": teachers}
    precompute(load_recipe({**entries, "num_workers": 0, "device": "cpu"}, PrecomputeRecipe))
    return path


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_teachers_are_weighed_by_what_the_cache_tells_and_code_by_the_users_word(run: Path) -> None:
    student, shipped, own = evaluate_beside_teachers(run / "run").costs
    assert shipped.num_parameters == parameters(Bundled().build(None, 1).module)
    assert shipped.compression == shipped.num_parameters / (student.num_parameters or 0)
    assert (own.model, own.num_parameters) == ("own", None)
    word = f"teachers.own={json.dumps({'model': CUSTOM})}"
    result = evaluate_beside_teachers(run / "run", [word], LatencyPlan(batch_sizes=(2,), warm_up=1, repeats=1))
    assert result.costs[2].num_parameters == parameters(linear())
    assert [row.model for row in result.latencies] == ["student", "shipped", "own"]


def test_teachers_of_own_code_are_taken_from_the_precompute_recipe(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = {"teachers": {"own": {"model": CUSTOM, "preprocessing": IDENTITY}, "later": {"model": CUSTOM}}}
    recipe = tmp_path / "precompute.yaml"
    recipe.write_text(yaml.safe_dump({"cache": str(run / "several"), **entries}))
    timed = ["--latency", "--batch-size", "2", "--repeats", "1", "--warm-up", "1", "--json"]
    assert main(["evaluate", str(run / "run"), *timed]) == 0
    without = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in without["latencies"]] == ["student", "shipped"]
    assert "never names code to run. Fix: --teachers-from" in without["teachers_left_out"]["own"]
    assert main(["evaluate", str(run / "run"), *timed, "--teachers-from", str(recipe)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["model"] for row in document["latencies"]] == ["student", "shipped", "own"]
    assert document["teachers_left_out"] == {}
    losses = json.dumps([{"kind": "kl_divergence", "teacher": "own"}])
    online = {"cache": str(run / "several"), "model": TINY, "epochs": 1, "num_workers": 0, "device": "cpu"}
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(online | {"out": str(tmp_path / "run")}))
    command = ["train-student", str(tmp_path / "student.yaml"), "--set", f"losses={losses}", "-q", "--json"]
    assert main([*command, "--online"]) == 2
    assert "Fix: --teachers-from" in capsys.readouterr().err
    assert main([*command, "--teachers-from", str(recipe)]) == 2
    assert "--online" in capsys.readouterr().err
    assert main([*command, "--online", "--teachers-from", str(recipe)]) == 0
    assert json.loads(capsys.readouterr().out)["teacher_passes"] > 0


def test_a_recipe_without_teachers_of_the_cache_is_refused(run: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "precompute.yaml"
    recipe.write_text(yaml.safe_dump({"cache": "c.zarr", "teachers": {"other": {"model": CUSTOM}}}))
    with pytest.raises(RecipeError, match=r"names no model of a teacher of .*\['own', 'shipped'\]. Fix: "):
        evaluate_beside_teachers(run / "run", teachers_from=recipe)


MISSING, OF_OTHER_IMAGES = CUSTOM | {"factory": "tests.nowhere:net"}, CUSTOM | {"arguments": {"size": 64}}


@pytest.mark.parametrize("by_recipe", [True, False])
@pytest.mark.parametrize(
    ("model", "reason"),
    [(MISSING, "tests.nowhere"), (OF_OTHER_IMAGES, "fails on an image, uint8 [1, 28, 28]")],
)
def test_a_named_teacher_that_fails_is_an_error_beside_the_students_figures(
    by_recipe: bool,
    model: dict[str, object],
    reason: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = tmp_path / "precompute.yaml"
    recipe.write_text(yaml.safe_dump({"cache": "c", "teachers": {"own": {"model": model}}}))
    named = ["--teachers-from", str(recipe)] if by_recipe else ["--set", f"teachers.own={json.dumps({'model': model})}"]
    timed = ["--latency", "--batch-size", "2", "--repeats", "1", "--warm-up", "1"]
    assert main(["evaluate", str(run / "run"), *named, *timed, "--json", "-q"]) == 2
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["measures"]["top1"] == evaluate_beside_teachers(run / "run").measures.top1
    assert [row["num_parameters"] is None for row in document["costs"]] == [False, False, True]
    assert [row["model"] for row in document["latencies"]] == ["student", "shipped"]
    assert (document["teachers_failed"], document["error"]["exit_code"]) == (["own"], 2)
    for text in (document["teachers_left_out"]["own"], document["error"]["message"], err):
        assert reason in text
    assert err.startswith("Error: teacher 'own' is neither counted nor timed: ")


def test_names_that_the_runs_cache_does_not_have_are_refused(run: Path, tmp_path: Path) -> None:
    word = f"teachers.onw={json.dumps({'model': CUSTOM})}"
    with pytest.raises(RecipeError, match=r"\['onw'\] are none of .*\['own', 'shipped'\]. Fix: name these"):
        evaluate_beside_teachers(run / "run", [word])
    with pytest.raises(CacheError, match="nowhere"):
        evaluate_beside_teachers(run / "run", ["cache=/nowhere", word])
    with pytest.raises(CacheError, match="nowhere"):
        evaluate_beside_teachers(run / "run", ["cache=/nowhere"], teachers_from=tmp_path / "precompute.yaml")


def test_a_teacher_that_was_given_as_an_object_is_not_known(run: Path) -> None:
    assert [(cost.model, cost.flops) for cost in evaluate_beside_teachers(run / "one").costs[1:]] == [("module", None)]


def test_a_run_on_labels_has_no_teacher(tmp_path: Path) -> None:
    train(teacher(tmp_path / "run", model=TINY, validation={"dataset": TEST_IMAGES}))
    assert [cost.model for cost in evaluate_beside_teachers(tmp_path / "run").costs] == ["student"]
    with pytest.raises(RecipeError, match=r"learnt from labels, and has no teachers\. Fix: leave out --teachers-from"):
        evaluate_beside_teachers(tmp_path / "run", teachers_from=tmp_path / "precompute.yaml")


def test_a_run_whose_cache_is_gone_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(run / "run"), "--set", "cache=/nowhere", "--json"]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["groups"] is None
    assert len(document["per_class"]) == 10
    assert "training images are not counted" in err
    assert main(["evaluate", str(run / "run"), "-q"]) == 0
    assert "compression" in capsys.readouterr().out
