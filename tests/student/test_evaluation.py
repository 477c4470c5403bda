"""Measuring a finished run again."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from logitcache.errors import LogitCacheError, MismatchError, RecipeError
from logitcache.student.evaluation import evaluate
from logitcache.student.training import train
from tests.student.small import LINEAR, PARTLY, TEST_IMAGES, metrics, student, teacher


@pytest.fixture(scope="module")
def run(cache: Path, untouched: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("evaluated") / "run"
    validation = {"cache": str(untouched), "batch_size": 30}
    train(student(out, cache, ema=0.8, validation=validation))
    return out


def _measures(result: object) -> dict[str, float]:
    measures = dataclasses.asdict(result)["measures"]  # type: ignore[call-overload]
    return {f"val_{name}": value for name, value in measures.items() if value is not None}


def test_a_run_evaluates_to_the_last_row_of_its_metrics(run: Path) -> None:
    result = evaluate(run)
    last = {key: value for key, value in metrics(run)[-1].items() if key.startswith("val_")}
    assert _measures(result) == last
    assert set(last) == {"val_top1", "val_top5", "val_agreement", "val_kl", "val_teacher_top1"}
    assert (result.run, result.images) == (str(run), 100)
    assert result.num_parameters == json.loads((run / "result.json").read_text())["num_parameters"]
    assert result.measures.top1 is not None
    assert result.measures.teacher_top1
    assert result.retention == result.measures.top1 / result.measures.teacher_top1


def test_a_teacher_evaluates_to_the_last_row_of_its_metrics(tmp_path: Path) -> None:
    train(teacher(tmp_path / "run", validation={"dataset": TEST_IMAGES}))
    last = {key: value for key, value in metrics(tmp_path / "run")[-1].items() if key.startswith("val_")}
    result = evaluate(tmp_path / "run")
    assert _measures(result) == last
    assert result.retention is None


def test_other_images_are_measured_by_override(run: Path) -> None:
    images = "validation={dataset: {kind: bundled, split: test, num_images: 50}}"
    result = evaluate(run, [images])
    assert result.images == 50
    assert result.measures.agreement is None
    assert result.measures.top1 is not None
    assert (result.measures.top1 * 50) % 1 == pytest.approx(0, abs=1e-9)


def test_another_cache_is_measured_by_override(run: Path, cache: Path) -> None:
    result = evaluate(run, [f"validation.cache={cache}"])
    assert result.images == 200
    assert result.measures.agreement is not None


def test_a_run_without_images_needs_some(cache: Path, tmp_path: Path) -> None:
    train(student(tmp_path / "run", cache, epochs=1))
    with pytest.raises(RecipeError, match=r"--set validation\.dataset="):
        evaluate(tmp_path / "run")
    result = evaluate(tmp_path / "run", ["validation.dataset={kind: bundled, split: test, num_images: 50}"])
    assert result.images == 50


def test_images_of_other_classes_are_refused(run: Path) -> None:
    images = "validation={dataset: {kind: custom, factory: 'tests.student.small:ThreeClasses'}}"
    with pytest.raises(MismatchError, match="3 classes"):
        evaluate(run, [images])


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(RecipeError, match=r"is no run: it has no recipe\.yaml") as refused:
            evaluate(path)
        assert refused.value.exit_code == 2


def test_a_run_that_has_not_ended_is_refused(run: Path, tmp_path: Path) -> None:
    for name in ("recipe.yaml", "model.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    with pytest.raises(LogitCacheError, match="--resume"):
        evaluate(tmp_path)


def test_an_override_that_is_wrong_is_refused(run: Path) -> None:
    with pytest.raises(RecipeError, match="batchsize"):
        evaluate(run, ["validation.batchsize=3"])


def test_a_custom_model_is_built_by_the_users_own_word(cache: Path, tmp_path: Path) -> None:
    train(student(tmp_path / "run", cache, model=LINEAR, epochs=1, validation={"dataset": TEST_IMAGES}))
    with pytest.raises(RecipeError, match=r"--set model\.factory=tests\.student\.small:linear"):
        evaluate(tmp_path / "run")
    result = evaluate(tmp_path / "run", ["model.factory=tests.student.small:linear"])
    assert _measures(result) == {k: v for k, v in metrics(tmp_path / "run")[-1].items() if k.startswith("val_")}


def test_a_factory_for_a_model_that_needs_none_is_refused(run: Path) -> None:
    with pytest.raises(RecipeError, match="needs no `factory`"):
        evaluate(run, ["model.factory=tests.student.small:linear"])


def test_a_data_set_of_code_is_opened_by_the_users_own_word(cache: Path, tmp_path: Path) -> None:
    train(student(tmp_path / "run", cache, epochs=1, validation={"dataset": PARTLY}))
    word = f"validation.dataset.factory={PARTLY['factory']}"
    with pytest.raises(RecipeError, match=f"never called.\n.*--set {word}"):
        evaluate(tmp_path / "run")
    assert evaluate(tmp_path / "run", [word]).images == 200


def test_measuring_leaves_the_callers_random_state(run: Path) -> None:
    before = torch.get_rng_state()
    evaluate(run)
    assert torch.equal(torch.get_rng_state(), before)
