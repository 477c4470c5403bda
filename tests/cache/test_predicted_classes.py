"""Names of classes by the recorded entries of teachers, which may be another's."""

from typing import Any

import pytest

from logitcache.cache.cache import open_cache
from logitcache.cache.format.manifest import TeacherEntry
from logitcache.cache.predicted_classes import predicted_classes
from logitcache.models import Torchvision
from logitcache.stage_one.precompute import precompute
from tests.cache.made import DENSE16, Linear, Pixels, recipe, teacher

ZERO_SHOT = {"kind": "transformers", "path": "missing", "task": "zero_shot", "labels": ["cat", "dog", "fish"]}
RESNET = {"kind": "torchvision", "name": "resnet50", "weights": "DEFAULT"}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> TeacherEntry:
    cache = tmp_path_factory.mktemp("predicted") / "c"
    precompute(recipe(cache, teachers={"t": teacher(DENSE16)}), teachers={"t": Linear()}, dataset=Pixels(60))
    return open_cache(cache).manifest.teachers["t"]


def entry(filled: TeacherEntry, model: Any, num_classes: int = 3, classes: Any = None) -> TeacherEntry:
    return filled.model_copy(update={"model": model, "num_classes": num_classes, "classes": classes})


def test_labels_of_zero_shot_are_its_classes_without_opening_its_folder(filled: TeacherEntry) -> None:
    assert predicted_classes([entry(filled, ZERO_SHOT)], 3) == ("cat", "dog", "fish")


def test_the_kept_outputs_of_a_network_are_named(filled: TeacherEntry) -> None:
    names = Torchvision(name="resnet50", weights="DEFAULT").class_names()
    assert names is not None
    assert predicted_classes([entry(filled, RESNET, 1000)], 1000) == names
    assert predicted_classes([entry(filled, RESNET, 2, (713, 440))], 2) == (names[713], names[440])
    assert predicted_classes([entry(filled, RESNET, 2, (713, 1000))], 2) is None


def test_teachers_that_disagree_give_no_names(filled: TeacherEntry) -> None:
    first, other = entry(filled, ZERO_SHOT), entry(filled, ZERO_SHOT | {"labels": ["cat", "fish", "dog"]})
    assert predicted_classes([first, first], 3) == ("cat", "dog", "fish")
    assert predicted_classes([first, other], 3) is None
    assert predicted_classes([first, entry(filled, None)], 3) is None
    assert predicted_classes([first, entry(filled, RESNET, 1000)], 3) == ("cat", "dog", "fish")  # not of these classes


def test_a_derived_teacher_has_the_names_of_its_only_member(filled: TeacherEntry) -> None:
    member = {"weight": 0.5, **filled.model_dump(mode="json", include={"weights", "preprocessing", "logits"})}
    members = {"a": member | {"model": ZERO_SHOT}, "b": member | {"model": ZERO_SHOT}}
    derived = {"kind": "derived", "source": filled.weights}
    assert predicted_classes([entry(filled, derived | {"members": {"a": members["a"]}})], 3) == ("cat", "dog", "fish")
    assert predicted_classes([entry(filled, derived | {"members": members, "average": "logits"})], 3) is None


@pytest.mark.parametrize(
    "model",
    [
        None,
        "torchvision",
        {"kind": ["torchvision"]},
        {"kind": "torchvision"},
        RESNET | {"name": "resnet-of-tomorrow"},
        RESNET | {"weights": "V9"},
        RESNET | {"added": 1},
        {"kind": "custom", "factory": "os:getcwd"},
        {"kind": "run", "path": "/dev/zero"},
        ZERO_SHOT | {"labels": ["cat", "dog"]},
    ],
)
def test_entries_that_do_not_tell_give_no_names(filled: TeacherEntry, model: Any) -> None:
    assert predicted_classes([entry(filled, model)], 3) is None
