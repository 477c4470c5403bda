"""Images of any number of classes each, from the teacher's answers to the figures of its student."""

import json
import signal
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from logitcache.cache.cache import open_cache
from logitcache.cli import main
from logitcache.errors import LogitCacheError, MismatchError, RecipeError, Stopped
from logitcache.models import load_model
from logitcache.student.evaluation.evaluate import evaluate
from logitcache.student.evaluation.multi_label import average_precisions
from logitcache.student.learner import Learner
from logitcache.student.training import train
from logitcache.targets import feature_values
from logitcache.teacher.online import live_targets
from logitcache.views.keys import ViewKey
from tests.student.attributes import BOTH, CLASSES, MANY, TEST_MANY, Attributes, fill_many, network
from tests.student.small import (
    IMAGES,
    TEST_IMAGES,
    dropout,
    fill,
    metrics,
    recorded_losses,
    student,
    teacher,
    weights,
)

MIXED = {"num_views": 2, "seed": 3, "mixing": [{"kind": "cutmix", "alpha": 1.0}]}
LINEAR = {"kind": "custom", "factory": "tests.student.small:linear", "arguments": {"num_classes": len(CLASSES)}}
ADAM = {"kind": "adamw", "lr": 0.01}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_many(tmp_path_factory.mktemp("many") / "cache")


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill_many(tmp_path_factory.mktemp("many") / "untouched", images=TEST_MANY, views={})


def _student(out: Path, cache: Path, **changes: Any) -> Any:
    return student(out, cache, **({"dataset": MANY, "losses": BOTH, "optimizer": ADAM} | changes))


def _scores(run: Path, images: Attributes) -> np.ndarray[Any, Any]:
    """What a run says of images as they are, by another way."""
    pixels = torch.stack([images[index][0] for index in range(len(images))])
    with torch.no_grad():
        return np.asarray(load_model(run).module.eval()((pixels / 255 - 0.5) / 0.5).numpy())


def test_the_cache_keeps_the_labels_as_they_are(cache: Path) -> None:
    labels = open_cache(cache).labels
    assert labels.dtype == np.int8
    assert np.array_equal(labels, Attributes().table)


def test_batches_have_the_labels_of_their_images(cache: Path) -> None:
    table = torch.from_numpy(Attributes().table)
    for batch in open_cache(cache).loader(32, dataset=Attributes()).epoch(0):
        assert batch.labels.dtype == torch.int8
        assert torch.equal(batch.labels, table[batch.keys[:, 1]])


def test_a_student_learns_and_is_measured(cache: Path, untouched: Path, tmp_path: Path) -> None:
    validation = {"cache": str(untouched), "dataset": TEST_MANY}
    result = train(_student(tmp_path / "run", cache, epochs=8, validation=validation))
    assert result.top1 is result.best_top1 is result.top5 is None
    assert result.mean_ap is not None
    assert result.best_mean_ap is not None
    rows = metrics(tmp_path / "run")
    assert rows[-1]["val_mean_ap"] == result.mean_ap > rows[0]["val_mean_ap"]
    assert result.best_mean_ap == max(row["val_mean_ap"] for row in rows)

    word = f"validation.dataset.factory={TEST_MANY['factory']}"
    found = evaluate(tmp_path / "run", [word])
    images = Attributes("test", 100)
    scores = _scores(tmp_path / "run", images)
    assert found.measures.quality == pytest.approx(np.nanmean(average_precisions(scores, images.table)))
    said = {key.removeprefix("val_"): value for key, value in rows[-1].items() if key.startswith("val_")}
    assert asdict(found.measures) == pytest.approx(said)
    assert 0.5 < said["agreement"] < 1
    assert found.retention == pytest.approx(said["mean_ap"] / said["teacher_mean_ap"])
    assert [item.name for item in found.per_class] == list(CLASSES)
    assert [item.images for item in found.per_class] == (images.table == 1).sum(axis=0).tolist()
    counts = (Attributes().table == 1).sum(axis=0)
    assert [item.training_images for item in found.per_class] == counts.tolist()
    assert found.groups is not None
    assert [group.classes for group in found.groups] == [0, (counts >= 20).sum(), (counts < 20).sum()]


def test_the_commands_take_such_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From the command line, as a user has it: a teacher is trained, asked, and a student is trained and measured."""
    small = {
        "num_workers": 0,
        "device": "cpu",
        "epochs": 2,
        "batch_size": 50,
        "model": {"kind": "small_cnn", "width": 4},
    }
    recipes: dict[str, dict[str, Any]] = {
        "train-teacher": small
        | {
            "out": "t",
            "dataset": MANY,
            "losses": [{"kind": "binary_cross_entropy", "positive_weight": [1, 2, 1, 3, 5]}],
        },
        "precompute": {
            "cache": "c",
            "dataset": MANY,
            "teachers": {"net": {"model": {"kind": "run", "path": "t"}}},
            "num_workers": 0,
            "device": "cpu",
        },
        "train-student": small
        | {"out": "s", "cache": "c", "dataset": MANY, "losses": BOTH, "validation": {"dataset": TEST_MANY}},
    }
    for command, recipe in recipes.items():
        for key in recipe.keys() & {"out", "cache"}:
            recipe[key] = str(tmp_path / recipe[key])
        if command == "precompute":
            recipe["teachers"]["net"]["model"]["path"] = str(tmp_path / "t")
        (tmp_path / f"{command}.yaml").write_text(json.dumps(recipe))
        assert main([command, str(tmp_path / f"{command}.yaml")]) == 0
    capsys.readouterr()
    word = f"validation.dataset.factory={TEST_MANY['factory']}"
    assert main(["evaluate", str(tmp_path / "s"), "--set", word, "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["measures"]["mean_ap"] < 1
    assert main(["inspect", str(tmp_path / "c"), "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["teachers"]["net"]["mean_ap"] < 1
    for command in ("summary", "verify"):
        set_images = ["--set", f"dataset={json.dumps(MANY)}"] if command == "verify" else []
        assert main([command, str(tmp_path / "c"), *set_images]) == 0


@pytest.mark.parametrize("views", [{}, {"views": MIXED}], ids=["plain", "mixed"])
def test_fifty_steps_from_the_cache_are_fifty_steps_online(tmp_path: Path, views: Any) -> None:
    path = fill_many(tmp_path / "cache", **views)
    losses = [*BOTH, {"kind": "binary_cross_entropy", "positive_weight": [1, 2, 3, 4, 5]}]
    optimizer = {"kind": "sgd", "lr": 0.05}
    entries = {"batch_size": 20, "epochs": 5, "losses": losses, "optimizer": optimizer, "model": LINEAR}
    with recorded_losses() as cached:
        train(_student(tmp_path / "cached", path, **entries))
    with recorded_losses() as online:
        live = live_targets(str(path), "cpu", modules={"net": network()})
        train(_student(tmp_path / "online", path, **entries), live=live)
    assert len(cached) == len(online) == 50
    assert np.abs(np.array(cached) - np.array(online)).max() <= 1e-6
    first, second = (load_file(tmp_path / name / "weights.safetensors") for name in ("cached", "online"))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) <= 1e-6


def test_grad_cam_is_of_the_answer_where_no_one_class_is_the_label(tmp_path: Path) -> None:
    features = {"evidence": {"kind": "grad_cam", "tap": "0", "dtype": "float32"}}
    many = fill_many(tmp_path / "many", features=features)
    none = fill_many(tmp_path / "none", features=features, images=Unlabelled())
    keys = [ViewKey(0, index) for index in range(50)]
    found, expected = (open_cache(path).answers(keys)["net"].features["evidence"] for path in (many, none))
    assert torch.equal(feature_values(found), feature_values(expected))
    assert feature_values(found).abs().max() > 0
    loss = {"kind": "grad_cam", "student": "0", "feature": "evidence"}
    assert train(_student(tmp_path / "run", many, losses=[*BOTH, loss], epochs=1)).steps == 7


class Unlabelled(Attributes):
    def __getitem__(self, index: int) -> tuple[torch.Tensor, None]:
        return super().__getitem__(index)[0], None


@pytest.mark.parametrize("step", [2, 9])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(cache: Path, tmp_path: Path, step: int) -> None:
    changes = {"validation": {"dataset": TEST_MANY}, "micro_batches": 2}
    train(_student(tmp_path / "whole", cache, **changes))
    recipe = _student(tmp_path / "run", cache, **changes)
    with pytest.MonkeyPatch.context() as patch:
        add, calls = Learner.add, [0]

        def stopping(self: Learner, *given: Any) -> None:
            calls[0] += 1
            if calls[0] == step:
                signal.raise_signal(signal.SIGTERM)
            add(self, *given)

        patch.setattr(Learner, "add", stopping)
        with pytest.raises(Stopped):
            train(recipe)
    train(recipe, resume=True)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_batch_in_parts_is_the_batch(cache: Path, tmp_path: Path) -> None:
    """Labels that are not known are not spread evenly over the parts."""
    entries = {"model": LINEAR, "losses": BOTH, "optimizer": {"kind": "sgd"}, "epochs": 1}
    whole = load_file(Path(train(_student(tmp_path / "whole", cache, **entries)).out) / "weights.safetensors")
    parts = train(_student(tmp_path / "parts", cache, micro_batches=3, **entries))
    for name, values in load_file(Path(parts.out) / "weights.safetensors").items():
        torch.testing.assert_close(values, whole[name], atol=1e-6, rtol=1e-5)


def _refused(recipe: Any, match: str, error: type[LogitCacheError] = RecipeError) -> None:
    with recorded_losses() as losses, pytest.raises(error, match=match):
        train(recipe)
    assert losses == []
    assert not Path(recipe.out).exists()


@pytest.mark.parametrize(
    "loss",
    [
        {"kind": "cross_entropy"},
        {"kind": "dkd"},
        {"kind": "nkd"},
        {"kind": "wsld"},
        {
            "kind": "multi_label_kl",
            "temperature": {"kind": "dynamic", "start": 2, "step": 0.1, "min": 1, "max": 4},
        },
    ],
    ids=lambda loss: loss["kind"],
)
def test_losses_of_one_class_an_image_are_refused(loss: Any, cache: Path, tmp_path: Path) -> None:
    text = rf"losses.1 \({loss['kind']}\) needs labels of one class an image.*binary_cross_entropy"
    _refused(_student(tmp_path / "run", cache, losses=[*BOTH[:1], loss]), text)


def test_labels_of_many_classes_are_needed_for_their_loss(tmp_path: Path) -> None:
    path = fill(tmp_path / "single")
    _refused(
        student(tmp_path / "run", path, losses=BOTH), r"losses.1 \(binary_cross_entropy\) needs labels of any number"
    )
    _refused(teacher(tmp_path / "run", dataset=MANY), r"losses.0 \(cross_entropy\) needs labels of one class")
    losses = [{"kind": "binary_cross_entropy"}]
    _refused(teacher(tmp_path / "run", dataset=IMAGES, losses=losses), "needs labels of any number of classes an image")


@pytest.mark.parametrize("loss", ["kl_divergence", "dist"])
def test_losses_of_a_softmax_are_refused(loss: str, cache: Path, tmp_path: Path) -> None:
    text = rf"losses.0 \({loss}\) takes images to be of one class, these are of any number\. Fix: multi_label_kl"
    _refused(_student(tmp_path / "run", cache, losses=[{"kind": loss}]), text)


def test_what_goes_by_the_one_class_of_an_image_is_refused(cache: Path, tmp_path: Path) -> None:
    ensembles = {"both": {"kind": "by_confidence", "teachers": ["a", "b"]}}
    two = fill_many(tmp_path / "two", teachers_by_name={"a": network(1), "b": network(2)})
    losses = [{"kind": "kl_divergence", "teacher": "both"}]
    _refused(
        _student(tmp_path / "run", two, ensembles=ensembles, losses=losses), r"\(by_confidence\) needs labels of one"
    )
    _refused(
        _student(tmp_path / "run", cache, sampling={"kind": "class_balanced"}), "sampling by class draws images of one"
    )
    mapped = {"dataset": TEST_MANY, "class_map": {"top": 0}}
    _refused(_student(tmp_path / "run", cache, validation=mapped), "any number of classes each")
    many = [{"kind": "binary_cross_entropy", "positive_weight": [1, 2]}]
    _refused(_student(tmp_path / "run", cache, losses=many), "positive_weight has 2 numbers for 5 classes")


def test_images_to_measure_on_have_labels_of_the_same_sort(cache: Path, tmp_path: Path) -> None:
    _refused(
        _student(tmp_path / "run", cache, validation={"dataset": TEST_IMAGES}), r"validation: losses.1 .*any number"
    )


def test_other_labels_than_those_of_the_cache_are_refused(cache: Path, tmp_path: Path) -> None:
    images = Attributes()
    images.table[1] = 1 - images.table[1].clip(min=0)
    with pytest.raises(MismatchError, match="labels: recorded"):
        open_cache(cache).views(images)


def test_a_teacher_of_other_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="predicts 10 classes, the data set has 5"):
        fill(tmp_path / "c", {"net": dropout()}, images=MANY)


def test_a_student_needs_no_label_at_all(tmp_path: Path) -> None:
    path = fill_many(tmp_path / "c", images=Unlabelled())
    unlabelled = {"kind": "custom", "factory": "tests.student.test_multi_label:Unlabelled"}
    entries = {"dataset": unlabelled, "losses": BOTH[:1], "validation": {"dataset": TEST_MANY}}
    result = train(_student(tmp_path / "run", path, **entries))
    assert result.mean_ap is not None
    assert result.mean_ap > 0.3
    _refused(
        _student(tmp_path / "other", path, dataset=unlabelled),
        r"losses.1 \(binary_cross_entropy\) needs labels, .*none",
    )
