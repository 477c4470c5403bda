"""Our own readers of torchvision's files give what torchvision gives, and unpickle nothing else."""

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.datasets

from logitcache.errors import DataError
from logitcache.views.datasets import Torchvision
from logitcache.views.datasets.base import fingerprint
from tests.views.test_datasets import write_mnist

GENERATOR = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


class Bomb:
    """An object whose pickle makes a folder when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, ("PWNED", 0o777, True)


def write_cifar(name: str, root: Path, monkeypatch: pytest.MonkeyPatch, **extra: Any) -> type:
    """Write pickles of small batches, and let torchvision know their MD5."""
    made = getattr(torchvision.datasets, name)
    folder = root / made.base_folder
    folder.mkdir(parents=True)
    key = "labels" if name == "CIFAR10" else "fine_labels"

    def write(file: str, content: object) -> list[str]:
        data = pickle.dumps(content, protocol=3)
        (folder / file).write_bytes(data)
        return [file, hashlib.md5(data, usedforsecurity=False).hexdigest()]

    def batch(file: str) -> list[str]:
        pixels = GENERATOR.integers(0, 256, (4, 3072), dtype=np.uint8)
        return write(file, {"data": pixels, key: [3, 1, 0, 2], "filenames": ["a"] * 4, **extra})

    monkeypatch.setattr(made, "train_list", [batch(file) for file, _ in made.train_list])
    monkeypatch.setattr(made, "test_list", [batch(file) for file, _ in made.test_list])
    _, md5 = write(made.meta["filename"], {made.meta["key"]: ["w", "x", "y", "z"]})
    monkeypatch.setattr(made, "meta", {**made.meta, "md5": md5})
    found: type = made
    return found


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "FashionMNIST"])
def test_pixels_labels_and_classes_are_those_of_torchvision(
    name: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "FashionMNIST":
        write_mnist(tmp_path, GENERATOR.integers(0, 256, (12, 28, 28), dtype=np.uint8), np.arange(12) % 10)
    else:
        write_cifar(name, tmp_path, monkeypatch)
    theirs = getattr(torchvision.datasets, name)(str(tmp_path), train=split == "train")
    ours = Torchvision(name=name, root=str(tmp_path), split=split).open()
    assert len(ours.ids) == len(theirs)
    assert ours.labels.tolist() == [label for _, label in theirs]
    assert ours.class_names is None or ours.class_names == tuple(theirs.classes)
    for index, (image, _) in enumerate(theirs):
        assert np.array_equal(ours.read(index).permute(1, 2, 0).numpy(), np.asarray(image.convert("RGB")))
    assert fingerprint(ours).num_images == len(theirs)


def test_a_pickle_that_names_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = write_cifar("CIFAR10", tmp_path, monkeypatch, filenames=Bomb())
    with pytest.raises(DataError, match=r"it names os\.makedirs"):
        Torchvision(name="CIFAR10", root=str(tmp_path)).open()
    assert not Path("PWNED").exists()
    made(str(tmp_path))  # torchvision runs it
    assert Path("PWNED").exists()


def test_bytes_of_another_md5_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar("CIFAR100", tmp_path, monkeypatch)
    (tmp_path / "cifar-100-python/train").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(DataError, match="its MD5 differs"):
        Torchvision(name="CIFAR100", root=str(tmp_path)).open()
    assert not Path("PWNED").exists()


def test_old_forms_of_mnist_are_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "MNIST/processed").mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save(
            (torch.zeros(2, 28, 28, dtype=torch.uint8), torch.zeros(2).long()), tmp_path / "MNIST/processed" / name
        )
    assert len(torchvision.datasets.MNIST(str(tmp_path))) == 2
    with pytest.raises(DataError, match=r"(?s)raw/train-images.*download: true"):
        Torchvision(name="MNIST", root=str(tmp_path)).open()


@pytest.mark.parametrize("head", [b"", b"\0\0\x0d\x03", b"\0\0\x08\x09", b"\0\0\x08\x03" + b"\xff" * 12])
def test_files_of_another_form_are_refused(head: bytes, tmp_path: Path) -> None:
    write_mnist(tmp_path, np.zeros((2, 28, 28), np.uint8), np.zeros(2))
    (tmp_path / "FashionMNIST/raw/train-images-idx3-ubyte").write_bytes(head)
    with pytest.raises(DataError, match="FashionMNIST cannot be opened"):
        Torchvision(name="FashionMNIST", root=str(tmp_path)).open()
