"""Measuring a finished run again."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from logitcache.errors import LogitCacheError, MismatchError, RecipeError
from logitcache.models import load_model
from logitcache.student.evaluation.cost import Contender, LatencyPlan
from logitcache.student.evaluation.evaluate import evaluate
from logitcache.student.training import train
from logitcache.views.datasets import Bundled, open_dataset
from tests.student.small import LINEAR, PARTLY, TEST_IMAGES, THREE, metrics, network, student, teacher


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
    assert set(last) == {"val_top1", "val_top5", "val_agreement", "val_kl", "val_teacher_top1", "val_ece"}
    assert (result.run, result.images) == (str(run), 100)
    assert result.costs[0].num_parameters == json.loads((run / "result.json").read_text())["num_parameters"]
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
    for path, why in ((tmp_path, r"it has no recipe\.yaml"), (tmp_path / "nothing", "no such folder exists")):
        with pytest.raises(RecipeError, match=f"is no run: {why}") as refused:
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


def _guesses(run: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The classes that a run gives to the test images, and their own, by another way."""
    images = open_dataset(Bundled.model_validate(TEST_IMAGES))
    pixels = torch.stack([images.read(index) for index in range(len(images.ids))])
    with torch.no_grad():
        best = load_model(run).module.eval()((pixels / 255 - 0.5) / 0.5).argmax(dim=1)
    return best, torch.from_numpy(images.labels)


def test_every_class_is_measured_and_grouped_by_its_training_images(run: Path) -> None:
    result = evaluate(run, ["validation.groups={head: 20, tail: 20}"])
    best, labels = _guesses(run)
    top1 = [float((best == label)[labels == label].float().mean()) for label in range(10)]
    assert [item.top1 for item in result.per_class] == pytest.approx(top1)
    assert [item.images for item in result.per_class] == [10] * 10
    assert [item.training_images for item in result.per_class] == [20] * 10
    assert result.per_class[1].name == "Trouser"
    assert result.groups is not None
    assert [(group.group, group.classes) for group in result.groups] == [("head", 0), ("medium", 10), ("tail", 0)]
    assert result.groups[1].top1 == pytest.approx(sum(top1) / 10)


def test_a_teachers_training_images_are_counted_too(tmp_path: Path) -> None:
    train(teacher(tmp_path / "run", validation={"dataset": TEST_IMAGES}))
    result = evaluate(tmp_path / "run")
    assert {item.training_images for item in result.per_class} == {20}
    assert [cost.model for cost in result.costs] == ["student"]


def test_training_images_of_code_are_not_opened_unasked(tmp_path: Path) -> None:
    train(teacher(tmp_path / "run", dataset=THREE, validation={"dataset": THREE}))
    word = f"validation.dataset.factory={THREE['factory']}"
    assert evaluate(tmp_path / "run", [word]).groups is None
    result = evaluate(tmp_path / "run", [word, f"dataset.factory={THREE['factory']}"])
    assert result.groups is not None
    assert sum(item.training_images or 0 for item in result.per_class) == 200


def test_a_run_whose_cache_is_gone_is_measured_without_what_only_that_knew(run: Path) -> None:
    result = evaluate(run, ["cache=/nowhere/cache.zarr"])
    assert result.measures == evaluate(run).measures
    assert result.groups is None
    assert [cost.model for cost in result.costs] == ["student"]


def test_teachers_are_weighed_where_they_are_given(run: Path) -> None:
    assert [(cost.model, cost.num_parameters) for cost in evaluate(run).costs[1:]] == [("net", None)]
    net = Contender(torch.nn.Sequential(Floats(), network()), "float32")
    result = evaluate(run, teachers={"net": net}, latency=LatencyPlan(batch_sizes=(2,), warm_up=1, repeats=2))
    assert result.costs[1].compression == pytest.approx(1.0)  # the same architecture
    assert result.costs[1].flops_ratio == pytest.approx(1.0)
    assert [(row.model, row.batch_size) for row in result.latencies] == [("student", 2), ("net", 2)]
    assert result.latencies[1].speed_up == result.latencies[1].seconds / result.latencies[0].seconds


class Floats(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels / 255


def test_images_of_other_classes_are_measured_by_a_map_of_them(run: Path) -> None:
    best, labels = _guesses(run)
    shared = {"Trouser": 1, "Bag": 3, "9": 9}
    theirs = torch.tensor([-1, 1, -1, -1, -1, -1, -1, -1, 3, 9])[labels]
    result = evaluate(run, [f"validation.class_map={json.dumps(shared)}"])
    assert (result.images, result.images_left_out) == (30, 70)
    assert result.measures.top1 == pytest.approx(float((best == theirs)[theirs >= 0].float().mean()))
    assert [item.label for item in result.per_class if item.images] == [1, 3, 9]
    assert {item.name for item in result.per_class} == {None}


def test_a_map_lets_images_of_another_number_of_classes_be_measured(run: Path) -> None:
    images = f"dataset: {{kind: custom, factory: '{THREE['factory']}'}}"
    result = evaluate(run, [f"validation={{{images}, class_map: {{a: 7, 2: 7}}}}"])
    assert result.images + result.images_left_out == 200
    assert [item.label for item in result.per_class if item.images] == [7]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("{Trousers: 1}", "Did you mean 'Trouser'"),
        ("{10: 1}", "no class '10'"),
        ("{Bag: 10}", "no classes of the model"),
        ("{}", "class_map"),
    ],
)
def test_a_map_of_classes_that_are_not_there_is_refused(run: Path, classes: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        evaluate(run, [f"validation.class_map={classes}"])


def test_taps_need_features_to_compare_them_with(run: Path) -> None:
    with pytest.raises(RecipeError, match=r"validation\.cache, precomputed with teachers\.NAME\.features"):
        evaluate(run, ["validation.taps=[head]"])
    assert evaluate(run).cka == ()
