"""Images of which few have a label, or none: trained on, measured and told of, from one end to the other."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from logitcache.report.inspect import inspect_cache
from logitcache.report.summary import CacheSummary, summarize
from logitcache.student.evaluation.evaluate import evaluate
from logitcache.student.training import train
from logitcache.teacher.online import live_targets
from logitcache.views.datasets import Bundled, open_dataset
from tests.student.small import (
    LINEAR,
    PARTLY,
    TEST_IMAGES,
    UNLABELLED,
    PartlyLabelled,
    fill,
    metrics,
    network,
    recorded_losses,
    student,
)

MIXED = {"views": {"num_views": 2, "seed": 3, "mixing": [{"kind": "mixup"}]}}
SOFT = [{"kind": "kl_divergence"}, {"kind": "cross_entropy"}]
HARD = [{"kind": "dkd"}, {"kind": "nkd"}, {"kind": "wsld"}, {"kind": "kl_divergence", "teacher": None}]


@pytest.mark.parametrize(("views", "losses"), [({}, [*SOFT, *HARD]), (MIXED, SOFT)], ids=["plain", "mixed"])
def test_fifty_steps_from_the_cache_are_fifty_steps_online(tmp_path: Path, views: Any, losses: Any) -> None:
    path = fill(tmp_path / "cache", images=PARTLY, **views)
    optimizer = {"kind": "sgd", "lr": 0.02}
    entries = {
        "batch_size": 20,
        "epochs": 5,
        "losses": losses,
        "optimizer": optimizer,
        "dataset": PARTLY,
        "model": LINEAR,
    }
    with recorded_losses() as cached:
        train(student(tmp_path / "cached", path, **entries))
    with recorded_losses() as online:
        train(
            student(tmp_path / "online", path, **entries),
            live=live_targets(str(path), "cpu", modules={"net": network()}),
        )
    assert len(cached) == len(online) == 50
    assert np.abs(np.array(cached) - np.array(online)).max() <= 1e-6
    first, second = (load_file(tmp_path / name / "weights.safetensors") for name in ("cached", "online"))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) <= 1e-6


def test_a_student_of_partly_labelled_images_is_measured(partly: Path, tmp_path: Path) -> None:
    validation = {"dataset": TEST_IMAGES}
    train(student(tmp_path / "run", partly, dataset=PARTLY, losses=SOFT, epochs=1, validation=validation))
    found = evaluate(tmp_path / "run")
    assert found.measures.quality == metrics(tmp_path / "run")[-1]["val_top1"]
    labels = np.array([PartlyLabelled()[index][1] for index in range(200)])
    counts = [int((labels == label).sum()) for label in range(10)]
    assert [item.training_images for item in found.per_class] == counts
    assert sum(counts) == 67


def test_images_without_a_label_to_measure_on_tell_how_like_the_teacher_a_student_is(tmp_path: Path) -> None:
    path = fill(tmp_path / "cache", images=UNLABELLED)
    validation = {"cache": str(path), "dataset": UNLABELLED}
    entries = {"dataset": UNLABELLED, "epochs": 1, "validation": validation}
    result = train(student(tmp_path / "run", path, **entries))
    assert result.top1 is result.best_top1 is None
    assert result.agreement is not None
    found = evaluate(tmp_path / "run", [f"validation.dataset.factory={UNLABELLED['factory']}"])
    known = {name for name, value in asdict(found.measures).items() if value is not None}
    assert known == {"agreement", "kl"}
    assert found.retention is None
    assert {item.top1 for item in found.per_class} == {None}
    assert inspect_cache(path)["teachers"]["net"]["top1"] is None
    told = summarize(path)
    assert isinstance(told, CacheSummary)
    assert (told.labelled_row_views, told.teachers[0].top1, told.per_class) == (0, None, ())


def test_a_folder_without_classes_is_enough_for_a_student(tmp_path: Path) -> None:
    images = open_dataset(Bundled(num_images=40))
    (tmp_path / "images").mkdir()
    for index in range(40):
        Image.fromarray(images.read(index)[0].numpy()).save(tmp_path / "images" / f"{index:02d}.png")
    folder = {"kind": "image_folder", "root": str(tmp_path / "images"), "mode": "L", "labelled": False}
    path = fill(tmp_path / "cache", images=folder)
    result = train(student(tmp_path / "run", path, validation={"dataset": TEST_IMAGES}))
    assert result.top1 is not None
