"""Labels of any number of classes an image: how they are read, told apart and handed on."""

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from logitcache.errors import DataError, RecipeError
from logitcache.views.datasets import ImageDataset, as_image_dataset
from logitcache.views.datasets.base import Fingerprint, fingerprint
from logitcache.views.datasets.fingerprint_diff import explain_difference
from logitcache.views.datasets.images.labels import class_counts, single_labels
from logitcache.views.datasets.scan_memory import Scan, ScanMemory
from logitcache.views.epochs import EpochLoader
from logitcache.views.mixing.mixing import MixUp
from logitcache.views.sampling import ClassBalanced
from logitcache.views.spec import Views, ViewSpec

TABLE = np.array([[1, 0, 1], [0, 0, 0], [-1, -1, -1], [-1, 1, 0]], np.int8)


class Labelled:
    """Four small images with labels of any sort."""

    def __init__(self, labels: list[Any], **attributes: Any) -> None:
        self.labels = labels
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
        return torch.full((1, 2, 2), index, dtype=torch.uint8), self.labels[index]


@pytest.mark.parametrize(
    "make",
    [
        lambda row: row,
        lambda row: row.tolist(),
        lambda row: tuple(row.tolist()),
        lambda row: torch.from_numpy(row).float(),
        lambda row: row.astype(np.float64),
        lambda row: torch.from_numpy(row).long(),
        lambda row: None if (row < 0).all() else row,
        lambda row: -1 if (row < 0).all() else row,
        lambda row: row == 1 if (row >= 0).all() else row,
    ],
    ids=["int8", "list", "tuple", "float tensor", "float64", "int64 tensor", "none", "minus one", "bool"],
)
def test_labels_of_every_type_are_the_same_table(make: Any) -> None:
    images = as_image_dataset(Labelled([make(row) for row in TABLE]))
    assert images.labels.dtype == np.int8
    assert np.array_equal(images.labels, TABLE)
    assert images.num_classes == 3
    assert images.class_names is None
    assert fingerprint(images) == fingerprint(as_image_dataset(Labelled(list(TABLE))))
    assert np.array_equal(pickle.loads(pickle.dumps(images)).labels, TABLE)


def test_a_set_that_begins_without_labels_has_those_that_come_later() -> None:
    images = as_image_dataset(Labelled([None, -1, TABLE[0], None]))
    assert images.labels.tolist() == [[-1] * 3, [-1] * 3, [1, 0, 1], [-1] * 3]


def test_the_fingerprint_is_of_the_bytes_of_the_table() -> None:
    recorded = fingerprint(as_image_dataset(Labelled(list(TABLE))))
    assert recorded.multi_label
    assert recorded.labels == hashlib.sha256(TABLE.tobytes()).hexdigest()
    other = TABLE.copy()
    other[3, 0] = 0
    lines = explain_difference(recorded, None, as_image_dataset(Labelled(list(other))))
    assert "labels: recorded" in lines
    single = fingerprint(as_image_dataset(Labelled([0, 1, -1, 2])))
    assert not single.multi_label
    assert Fingerprint.model_validate_json(recorded.model_dump_json()) == recorded
    with pytest.raises(ValidationError, match="unknown number of classes"):
        Fingerprint.model_validate(recorded.model_dump() | {"num_classes": None})


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 2], [0, 1]], r"a label is one whole number.*not \[0, 2\]"),
        ([[0.5, 1], [0, 1]], r"not \[0.5, 1. \]"),
        ([["a", "b"], [0, 1]], "a label is one whole number"),
        ([[1], [0]], r"two or more, not \[1\]. Return a class as one whole number"),
        ([[], []], "two or more"),
        ([[[1, 0]], [[0, 1]]], "a label is one whole number"),
        ([[float("nan"), 1], [0, 1]], "a label is one whole number"),
        ([torch.rand(4, generator=torch.Generator().manual_seed(0)), [0, 1]], "a label is one whole number"),
        ([[0, 1], 1, [1, 0]], "one whole number, those before it are of 2 classes"),
        ([1, [0, 1], 1], "of 2 classes, each 1 or 0, those before it are one whole number"),
        ([[0, 1], [0, 1, 1], [1, 0]], "of 3 classes.*before it are of 2 classes"),
    ],
)
def test_labels_that_are_of_no_sort_are_refused_by_image(labels: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=r"(?s)image '0000[01]'.*" + message):
        _ = as_image_dataset(Labelled(labels)).labels


def test_as_many_classes_as_stated_are_needed() -> None:
    named = as_image_dataset(Labelled(list(TABLE), classes=("a", "b", "c")))
    assert named.class_names == ("a", "b", "c")
    for attributes in ({"classes": ("a", "b")}, {"num_classes": 4}):
        with pytest.raises(DataError, match=r"labels of the data set are of 3 classes, but there are [24]"):
            _ = as_image_dataset(Labelled(list(TABLE), **attributes)).num_classes


def test_a_data_set_that_brings_its_own_table_is_held_to_its_classes() -> None:
    images = as_image_dataset(Labelled(list(TABLE)))
    expected = fingerprint(images)
    assert fingerprint(Table(images, 3)) == expected
    for num_classes in (None, 4):
        with pytest.raises(DataError, match=r"labels \[4, 3\] are of 3 classes, the data set's num_classes is"):
            fingerprint(Table(images, num_classes))


class Table:
    """All that is asked of a data set, with a table of int64."""

    class_names = None

    def __init__(self, images: ImageDataset, num_classes: int | None) -> None:
        self.ids, self.read, self.sizes, self.digests = images.ids, images.read, images.sizes, images.digests
        self.labels, self.num_classes = TABLE.astype(np.int64), num_classes


def test_labels_that_come_out_different_are_refused() -> None:
    class Moody(Labelled):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, Any]:
            self.labels[index] = 1 - np.asarray(self.labels[index])
            return super().__getitem__(index)

    with pytest.raises(DataError, match="comes out different"):
        as_image_dataset(Moody([[0, 1], [1, 0]]))


@pytest.mark.parametrize(
    "labels", [TABLE, np.zeros((4, 8), np.int8), np.array([2, -1, 0, 5])], ids=["3", "8", "single"]
)
def test_a_scan_is_remembered_with_labels_of_any_sort(
    labels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitcache.store.digest_index.settled", lambda stamp, opened_ns: True)
    (tmp_path / "file").touch()
    memory = ScanMemory(tmp_path, labels.tobytes().hex(), 0)
    assert memory.recall(4) is None
    scan = Scan(labels, np.arange(8).reshape(4, 2), np.arange(4, dtype=np.uint64))
    memory.remember(scan)
    found = memory.recall(4)
    assert found is not None
    for ours, theirs in zip(scan, found, strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)
    assert memory.recall(3) is memory.recall(5) is None


def test_batches_bring_the_rows_of_the_table_and_those_of_partners() -> None:
    images = as_image_dataset(Labelled(list(TABLE)))
    [batch] = EpochLoader(Views(images, ViewSpec(mixing=(MixUp(),))), batch_size=4).epoch(0)
    assert np.array_equal(batch.labels.numpy(), TABLE[batch.keys[:, 1]])
    assert batch.mixed is not None
    assert batch.mixed.partners.shape == (4, 3)
    assert batch[1:3].labels.shape == batch[1:3].mixed.partners.shape == (2, 3)  # type: ignore[union-attr]


def test_sampling_by_class_is_refused() -> None:
    images = as_image_dataset(Labelled(list(TABLE)))
    with pytest.raises(RecipeError, match=r"these are of any number\. Fix: leave out sampling"):
        EpochLoader(Views(images, ViewSpec()), batch_size=4, sampling=ClassBalanced())


def test_images_of_a_class_are_counted() -> None:
    assert class_counts(TABLE, 3).tolist() == [1, 1, 1]
    assert class_counts(np.array([2, 2, -1, 0]), 4).tolist() == [1, 0, 2, 0]


def test_no_class_of_many_is_the_one() -> None:
    assert single_labels(torch.from_numpy(TABLE)).tolist() == [-1] * 4
    assert single_labels(torch.tensor([1, -1])).tolist() == [1, -1]
    assert single_labels(torch.from_numpy(TABLE)).dtype == torch.int64
