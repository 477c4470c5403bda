"""Small sets on the device: the bytes of views that are rendered in batches, and which sets stay there."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logitcache.errors import DataError
from logitcache.targets import Targets
from logitcache.views import resident
from logitcache.views.augmentations import (
    Augmentation,
    ColorJitter,
    HorizontalFlip,
    RandomCrop,
    RandomErasing,
    RandomResizedCrop,
    Resize,
)
from logitcache.views.epochs import EpochLoader
from logitcache.views.keys import Keys, ViewKey, columns_of
from logitcache.views.loader import ViewLoader
from logitcache.views.mixing.mixing import CutMix, Mixture, MixUp
from logitcache.views.resident import ResidentViews, may_stay, open_loader
from logitcache.views.spec import Views, ViewSpec
from tests.views.examples import EXAMPLES
from tests.views.images import Images, textured
from tests.views.planning import plan_one

CPU = torch.device("cpu")
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
PADDED: list[Augmentation] = [
    RandomCrop(size=(20, 31), padding=padding, padding_mode=mode, fill=fill)
    for padding, mode, fill in [
        (0, "constant", 0),
        (5, "constant", 77),
        (5, "edge", 0),
        (5, "reflect", 0),
        (5, "symmetric", 0),
    ]
]
MORE: list[Augmentation] = [
    *PADDED,
    RandomErasing(p=1.0, value=(1, 2, 3)),
    RandomErasing(p=0.0),
    RandomResizedCrop(size=(40, 12), kernel="exact", interpolation="bicubic"),
]
SPEC = (RandomCrop(size=16, padding=2, padding_mode="reflect"), HorizontalFlip(), RandomErasing(value="noise"))
BATCHED = [one for one in [*EXAMPLES, *MORE] if one.in_batches((32, 32))]


def test_what_is_exact_in_batches() -> None:
    kinds = {"random_crop", "horizontal_flip", "random_erasing", "center_crop", "random_resized_crop", "resize"}
    assert {one.kind for one in BATCHED} == kinds
    for one in (Resize(size=8, kernel="exact"), RandomResizedCrop(size=32, kernel="exact")):
        assert one.in_batches((64, 64))
        assert not one.in_batches((65, 64))
    assert not Resize(size=32, kernel="exact").in_batches((10, 30))  # the longer side becomes 96
    assert not Resize(size=8).in_batches((32, 32))


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("augmentation", BATCHED, ids=[f"{n}_{one.kind}" for n, one in enumerate(BATCHED)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_by_tensor_operations_has_the_bytes_of_its_images(
    augmentation: Augmentation, device: str, channels: int
) -> None:
    images = torch.stack(textured(40, channels=channels))
    if channels == 1 and isinstance(augmentation, RandomErasing) and isinstance(augmentation.value, tuple):
        pytest.skip("a level of each of three channels")
    params, _ = plan_one(augmentation, [(32, 32)] * 40, seed=7)
    found = augmentation.apply_in_batches(images.to(device), params)
    assert found.device.type == device
    assert torch.equal(found.cpu(), augmentation.apply(images.clone(), params))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_mixtures_by_tensor_operations_have_the_bytes_of_mixtures_in_place(device: str) -> None:
    images, generator = torch.stack(textured(64)), np.random.default_rng(0)
    partners, rows = generator.permutation(64), np.arange(64)
    own, total = generator.integers(0, 257, 64), np.full(64, 256)
    boxes = np.where((rows % 3 == 0)[:, None], generator.integers(1, 16, (64, 4)), 0)
    own[rows % 5 == 0] = total[rows % 5 == 0] = 1  # not mixed
    mixture = Mixture(partners, own, total, boxes)
    found = mixture.apply_in_batches(images.to(device), images.to(device), partners)
    assert torch.equal(found.cpu(), mixture.apply_(images.clone(), images, partners))


def views_of(
    augmentations: Sequence[Augmentation] = SPEC, mixing: tuple[Any, ...] = (), side: int = 16, num_views: int = 3
) -> Views:
    spec = ViewSpec(num_views=num_views, seed=5, augmentations=tuple(augmentations), mixing=mixing)
    return Views(Images(textured(24, side, side)), spec)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("mixing", [(), (MixUp(p=0.5), CutMix(p=0.5))], ids=["plain", "mixed"])
@settings(max_examples=15)
@given(data=st.data())
def test_resident_views_are_those_of_their_keys_in_any_batches(device: str, mixing: tuple[Any, ...], data: Any) -> None:
    views = views_of(mixing=mixing)
    key = st.builds(ViewKey, st.integers(0, 2), st.integers(0, 23))
    batches = data.draw(st.lists(st.lists(key, min_size=1, max_size=9), max_size=5))
    there = ResidentViews(views, torch.device(device))
    for keys, found in zip(batches, there.render(batches), strict=True):
        assert found.device.type == device
        assert torch.equal(found.cpu(), torch.stack([views[key] for key in keys]))


def test_batches_are_made_together_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    views, counts = views_of(), list[int]()
    one_row = 3 * 16 * 16 + 4 * 10
    monkeypatch.setattr(ResidentViews, "together", 5 * 4 * one_row + one_row)  # five batches of four

    def targets_of(keys: Sequence[ViewKey]) -> dict[str, Targets]:
        counts.append(len(keys))
        return {"teacher": Targets(torch.tensor([[float(10 * key.view + key.index)] * 10 for key in keys]))}

    batches = [[ViewKey(n % 3, n), ViewKey(0, n)] * 2 for n in range(14)]
    options: dict[str, Any] = {"targets_of": targets_of, "batch_size": 4}
    found = list(EpochLoader(views, num_workers="auto", **options).batches(batches))
    assert counts == [4, 20, 20, 12]  # the first shows what a row takes
    for one, other in zip(found, EpochLoader(views, num_workers=0, **options).batches(batches), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.keys, other.keys)
        assert torch.equal(one.targets.logits, other.targets.logits)
    assert counts[4:] == [4] * 14


@pytest.mark.parametrize("start", [0, 1, 4, 6])
def test_an_epoch_that_is_resumed_within_a_block_has_the_same_batches(start: int) -> None:
    loader = EpochLoader(views_of(), batch_size=4, num_workers="auto", seed=3)
    whole = list(loader.epoch(1))[start:]
    resumed = list(EpochLoader(views_of(), batch_size=4, num_workers="auto", seed=3).epoch(1, start))
    assert len(whole) == 6 - start
    for one, other in zip(whole, resumed, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.keys, other.keys)


def test_recorded_parameters_are_replayed() -> None:
    drawn = views_of(mixing=(MixUp(),))
    sizes = np.full((1, 2), 16)

    def recorded(keys: Sequence[ViewKey]) -> Any:
        other = [ViewKey(2 - key.view, key.index) for key in keys]
        return drawn.spec.rows(other, np.repeat(sizes, len(keys), axis=0), drawn.pairs)

    replayed = Views(drawn.dataset, drawn.spec, recorded)
    keys = [ViewKey(0, index) for index in range(24)]
    [found] = ResidentViews(replayed, CPU).render([keys])
    assert torch.equal(found, replayed.__getitems__(keys))
    assert not torch.equal(found, drawn.__getitems__(keys))


class Counting(Images):
    """Images that count how often each is read."""

    def read(self, index: int) -> Tensor:
        self.reads = getattr(self, "reads", [])
        self.reads.append(index)
        return super().read(index)


def test_an_image_is_decoded_once_and_only_if_it_is_used() -> None:
    images = Counting(textured(24, 16, 16))
    loader = EpochLoader(
        Views(images, ViewSpec(num_views=2, augmentations=SPEC)),
        batch_size=5,
        num_workers="auto",
        images=np.arange(4, 20),
    )
    for epoch in (0, 1, 2):
        assert sum(len(batch.images) for batch in loader.epoch(epoch)) == 16
    assert sorted(index for index in images.reads if index) == list(range(4, 20))


def test_images_of_other_channels_are_named() -> None:
    pixels = textured(6, 16, 16)
    pixels[4] = pixels[4][:1]
    there = ResidentViews(Views(Images(pixels), ViewSpec()), CPU)
    with pytest.raises(DataError, match=r"'image 0' gives \(3, 16, 16\), 'image 4' gives \(1, 16, 16\)"):
        list(there.render([[ViewKey(0, 3), ViewKey(0, 4)]]))


def test_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    assert may_stay(views_of(), CPU)
    assert may_stay(views_of([], (MixUp(),)), CPU)
    assert may_stay(views_of([RandomResizedCrop(size=64, kernel="exact"), HorizontalFlip()]), CPU)
    assert not may_stay(views_of([RandomResizedCrop(size=32)]), CPU)
    assert not may_stay(views_of([HorizontalFlip(), ColorJitter(hue=0.1)]), CPU)
    # The second resize gets 60 × 60 pixels, the third would make 100 of them.
    resizes = [Resize(size=60, kernel="exact"), Resize(size=50, kernel="exact"), Resize(size=100, kernel="exact")]
    assert may_stay(views_of(resizes[:2]), CPU)
    assert not may_stay(views_of(resizes), CPU)
    assert not may_stay(Views(Images([*textured(2, 16, 16), *textured(1, 16, 17)]), ViewSpec()), CPU)
    assert not may_stay(Views(Images(textured(3), broken=0), ViewSpec()), CPU)
    assert not may_stay(Views(Images([]), ViewSpec()), CPU)
    needed = 16 * 24 * 3 * 16 * 16
    monkeypatch.setattr(resident, "_memory", lambda device: needed)
    assert may_stay(views_of(), CPU)
    monkeypatch.setattr(resident, "_memory", lambda device: needed - 1)
    assert not may_stay(views_of(), CPU)


def test_auto_takes_processes_unless_images_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "_memory", lambda device: 1 << 40)
    made = []
    monkeypatch.setattr(resident, "ViewLoader", lambda *arguments: made.append(arguments))
    monkeypatch.setattr(resident, "ResidentViews", lambda views, device: device.type)
    views, jittered = views_of(), views_of([ColorJitter(hue=0.1)])
    cuda, mps = torch.device("cuda"), torch.device("mps")
    assert open_loader(views, "auto", "fork", CPU, compares=False) == "cpu"
    assert open_loader(views, "auto", "fork", cuda, compares=False) == "cuda"
    assert open_loader(views, "auto", "fork", cuda, compares=True) == "cpu"  # checksums are computed there
    assert open_loader(views, "auto", "fork", mps, compares=False) == "cpu"
    assert not made
    open_loader(jittered, "auto", "fork", CPU, compares=False)
    open_loader(views, 0, "fork", CPU, compares=False)
    assert made == [(jittered, 2, "fork"), (views, 0, "fork")]


def test_keys_are_the_keys_of_their_arrays() -> None:
    keys = Keys(np.array([[3, 7], [0, 5], [2, 5]]))
    listed = [ViewKey(3, 7), ViewKey(0, 5), ViewKey(2, 5)]
    assert list(keys) == listed
    assert [keys[1], keys[-1]] == [listed[1], listed[2]]
    assert list(keys[1:]) == listed[1:]
    assert len(keys) == 3
    assert all(np.array_equal(*pair) for pair in zip(columns_of(keys), columns_of(listed), strict=True))
    with pytest.raises(IndexError):
        keys[3]


def test_a_closed_loader_renders_nothing() -> None:
    there = ResidentViews(views_of(), CPU)
    there.close()
    with pytest.raises(IndexError):
        list(there.render([[ViewKey(0, 0)]]))
    assert ViewLoader(views_of()).render([]) is not None
