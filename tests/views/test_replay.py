"""Replay: the pixels of a key are the same however, whenever and wherever they are rendered."""

import hashlib
import itertools
import multiprocessing
import random
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from logitcache.errors import DataError
from logitcache.views.augmentations import (
    Augmentation,
    CenterCrop,
    ColorJitter,
    Custom,
    GaussianBlur,
    HorizontalFlip,
    RandAugment,
    RandomCrop,
    RandomErasing,
    RandomGrayscale,
    RandomResizedCrop,
    Resize,
    Torchvision,
    TrivialAugmentWide,
)
from logitcache.views.datasets import ImageFolder
from logitcache.views.epochs import EpochLoader
from logitcache.views.keys import ViewKey
from logitcache.views.loader import ViewLoader
from logitcache.views.mixing.mixing import CutMix, Mixing, MixUp
from logitcache.views.spec import Views, ViewSpec
from tests.views.images import Images, textured

# More workers than this machine may have cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

NUM_VIEWS = 3
SPEC = ViewSpec(
    num_views=NUM_VIEWS,
    seed=2**40 + 5,
    augmentations=(
        RandomResizedCrop(size=(20, 24), interpolation="bicubic"),
        RandomCrop(size=(18, 20), padding=3, padding_mode="reflect"),
        HorizontalFlip(),
    ),
)
# sha256 of the plans of `planned_digest`. A change of any of them is a change of pixels: it needs a new plan version,
# under which the old ones stay as they are.
GOLDEN = {
    1: {
        "resize": "0a7e6584ff971c26217405a05639f1493c0263d06d0cebf93700d5ee24a117be",
        "center_crop": "2d36da93b541faceb4767f88becd185bd3bf077a8fbfa068340bd5c796a92784",
        "random_crop": "e065fe157615cdc7637e41e38c5887e39c2d8059b37402c29d89b92faccd854c",
        "random_resized_crop": "9ccd01ce19094ebc4ece61c5dddb921cd862350bf7aeca5bc5a0693ab51b7b87",
        "horizontal_flip": "7450e1920de1ed6b5e0e1407489cbc46fa369781cf446ca5a46791d58a1fe51c",
        "all": "e106fcd7d8ffa2d62237f7c3664df9044f43907c7c938cf01f2af52cd1a0f506",
        "color_jitter": "db99ab40fec563f3b9cf42797334d477d0b8ef3a5dd78ce5f613b19b5ea0729e",
        "random_grayscale": "8f0668c6dfa01cacfdfe903b9cdef7af1be9ea66c2bfabc06a23d81a493ea153",
        "gaussian_blur": "2e78411f965fb1e1f68d79dc8bb7c541379b874e5c44725a4b0e4595125a3f09",
        "rand_augment": "f3252e37c4400ac023fea7c584e59a1aa0a8f260f8b1e6aee514507428b246de",
        "trivial_augment_wide": "860b554f15e3b5f88aa0acac622c2eff90e55680413a9f9f3e3da6c8bdd3eea4",
        "random_erasing": "23676f32d95f55d719470099db5920ef6d0a8815fe5d6d99acd3c02b070f0962",
        "all_kinds": "2664d01a15f137ce5b0a214d367b93a097b42a57590f95b4ec657865bc27fbb2",
        "torchvision": "9bf42a62bd37bb852222a3c88068398556eb57d686250b5ae678ad0599d49ebf",
        "custom": "8444c6b618e692acdfa4515154ca14271979928059c331c68a7cac2599ee0805",
        "mixup": "af043613665658813c5eaec6be9397c07b89fbce485c68e8583cbca19a971060",
        "cutmix": "8f7968a7f7fd6c9199cbb8587334b4dfbb4e7f204f1062e279f55bc7af198a00",
        "mixing": "d5b81af05a80f38392299c16c0ce7bcc3166e3557f84cf1de10b9d5588176a05",
    }
}
GOLDEN[2] = GOLDEN[1] | {
    "cutmix": "d3f6303c6a64e79566e097cceac571e18c311667626de8a4ea59361bf4ea157e",
    "mixing": "15199323e2f7d562693cee2ed966370e0b76e5513cd1ba2e3b4211b0c4207bc1",
}
GOLDEN_AUGMENTATIONS: dict[str, tuple[Augmentation, ...]] = {
    "resize": (Resize(size=24), Resize(size=(20, 30))),
    "center_crop": (CenterCrop(size=24),),
    "random_crop": (RandomCrop(size=(8, 9), padding=4), RandomCrop(size=3)),
    "random_resized_crop": (RandomResizedCrop(size=16), RandomResizedCrop(size=9, scale=(0.3, 0.9), ratio=(0.5, 3.0))),
    "horizontal_flip": (HorizontalFlip(), HorizontalFlip(p=0.1)),
}
GOLDEN_AUGMENTATIONS["all"] = tuple(itertools.chain.from_iterable(GOLDEN_AUGMENTATIONS.values()))
GOLDEN_AUGMENTATIONS |= {
    "color_jitter": (
        ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1),
        ColorJitter(contrast=(0.3, 5.0), hue=(-0.5, -0.1), p=0.8),
    ),
    "random_grayscale": (RandomGrayscale(), RandomGrayscale(p=0.9)),
    "gaussian_blur": (GaussianBlur(kernel_size=5), GaussianBlur(kernel_size=(9, 3), sigma=(0.5, 9.0), p=0.4)),
    "rand_augment": (RandAugment(), RandAugment(num_ops=3, magnitude=4, num_magnitude_bins=10)),
    "trivial_augment_wide": (TrivialAugmentWide(), TrivialAugmentWide(num_magnitude_bins=7)),
    "random_erasing": (RandomErasing(), RandomErasing(p=1.0, scale=(0.1, 0.9), ratio=(0.2, 2.0), value="noise")),
}
GOLDEN_AUGMENTATIONS["all_kinds"] = tuple(
    itertools.chain.from_iterable(row for name, row in GOLDEN_AUGMENTATIONS.items() if name != "all")
)

GOLDEN_AUGMENTATIONS |= {
    "torchvision": (Torchvision(name="ElasticTransform"), Torchvision(name="RandomInvert")),
    "custom": (Custom(factory="some.code:transform"), Custom(factory="other.code:transform")),
}
GOLDEN_MIXING: dict[str, dict[str, Any]] = {
    "mixup": {"mixing": (MixUp(alpha=0.2),)},
    "cutmix": {"mixing": (CutMix(alpha=0.7),), "pairing_window": 64},
    "mixing": {"mixing": (MixUp(p=0.3), CutMix(p=0.5))},
}


def digest(image: Tensor) -> str:
    return hashlib.sha256(str(tuple(image.shape)).encode() + image.numpy().tobytes()).hexdigest()


def planned_digest(augmentations: tuple[Augmentation, ...]) -> str:
    keys = [ViewKey(view, index) for view in (0, 1, 2**32 - 1) for index in (*range(40), 2**32, 2**63 + 1)]
    sizes = np.array([(8 + 7 * (row % 90), 8 + 5 * (row % 70)) for row in range(len(keys))], dtype=np.int64)
    state = hashlib.sha256()
    for seed in (0, 1, 2**32 + 1, 2**64 - 1):
        for params in ViewSpec(seed=seed, augmentations=augmentations).plan(keys, sizes)[0]:
            state.update(str(params.shape).encode() + params.astype("<i8").tobytes())
    return state.hexdigest()


def mixed_digest(entries: dict[str, Any], version: int) -> str:
    state = hashlib.sha256()
    for seed in (0, 1, 2**32 + 1, 2**64 - 1):
        for view, num_images, size in ((0, 301, (32, 32)), (1, 1_281_167, (224, 200)), (2**32 - 1, 7, (17, 400))):
            keys = [ViewKey(view, index * max(1, num_images // 300)) for index in range(min(300, num_images))]
            spec = ViewSpec(seed=seed, plan_version=version, **entries)
            mixture = spec.mixture(keys, spec.partners(num_images, num_images), size)
            assert mixture is not None
            state.update(mixture.rows().astype("<i8").tobytes())
    return state.hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of different sizes in two classes, some of them grey, some JPEG."""
    root = tmp_path_factory.mktemp("images")
    for number in range(20):
        [image] = textured(1, 18 + 5 * (number % 7), 60 - 3 * (number % 11), 3, seed=number)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        place = root / ("cat", "dog")[number % 2]
        place.mkdir(exist_ok=True)
        picture.convert("L" if number % 5 == 0 else "RGB").save(
            place / f"{number:02}.{('png', 'jpg')[number % 3 == 0]}"
        )
    return root


@pytest.fixture(scope="module")
def sets(folder: Path) -> dict[str, Views]:
    memory = Images([*textured(40, 28, 28), *textured(27, 33, 19, seed=1)])
    return {"memory": Views(memory, SPEC), "folder": Views(ImageFolder(root=str(folder)).open(), SPEC)}


@pytest.fixture(scope="module")
def truth(sets: dict[str, Views]) -> dict[str, dict[ViewKey, str]]:
    """The digest of every key, rendered one by one."""
    return {
        name: {
            ViewKey(view, index): digest(views[ViewKey(view, index)])
            for view in range(NUM_VIEWS)
            for index in range(len(views.dataset.ids))
        }
        for name, views in sets.items()
    }


def batched(keys: list[ViewKey], size: int, order: int) -> list[list[ViewKey]]:
    shuffled = random.Random(order).sample(keys, len(keys))
    return [shuffled[start : start + size] for start in range(0, len(shuffled), size)]


def require_true(loader: ViewLoader, batches: list[list[ViewKey]], truth: dict[ViewKey, str]) -> None:
    for keys, images in zip(batches, loader.render(batches), strict=True):
        assert [digest(image) for image in images] == [truth[key] for key in keys]


@pytest.mark.parametrize("name", ["memory", "folder"])
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_pixels_do_not_depend_on_batch_or_order(sets, truth, name, batch_size):
    loader = ViewLoader(sets[name])
    for order in (0, 1):
        require_true(loader, batched(list(truth[name]), batch_size, order), truth[name])


@pytest.mark.parametrize(
    ("name", "start_method", "num_workers"),
    [
        ("memory", "fork", 3),
        ("memory", "spawn", 2),  # each imports torch
        ("memory", "forkserver", 3),
        ("folder", "fork", 1),
        ("folder", "forkserver", 3),
    ],
)
def test_pixels_do_not_depend_on_workers_or_how_they_start(sets, truth, name, start_method, num_workers):
    loader = ViewLoader(sets[name], num_workers, start_method)
    for order, batch_size in enumerate((1, 7, 64)):
        require_true(loader, batched(list(truth[name]), batch_size, order), truth[name])


def test_an_image_named_twice_in_a_batch_gives_each_of_its_views(sets, truth):
    keys = [ViewKey(0, 3), ViewKey(1, 3), ViewKey(0, 3), ViewKey(2, 5)]
    found = sets["memory"].__getitems__(keys)
    assert [digest(image) for image in found] == [truth["memory"][key] for key in keys]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_resumed_in_its_middle_continues_with_the_same_pixels(sets, truth, num_workers):
    loader = EpochLoader(sets["folder"], batch_size=3, num_workers=num_workers, seed=4, start_method="fork")
    whole = [(batch.keys.tolist(), digest(batch.images)) for batch in loader.epoch(1)]
    interrupted = loader.epoch(1)
    assert [digest(next(interrupted).images) for _ in range(2)] == [pixels for _, pixels in whole[:2]]
    resumed = [(batch.keys.tolist(), digest(batch.images)) for batch in loader.epoch(1, start=2)]
    assert resumed == whole[2:]
    for keys, _ in whole:
        assert all(ViewKey(*key) in truth["folder"] for key in keys)


def test_persistent_workers_advance_the_view(sets, truth):
    workers, before = set(), set(multiprocessing.active_children())
    loader = EpochLoader(sets["memory"], batch_size=16, num_workers=2, start_method="fork")
    for epoch in range(NUM_VIEWS + 1):
        for batch in loader.epoch(epoch):
            assert {key[0] for key in batch.keys.tolist()} == {epoch % NUM_VIEWS}
            expected = [truth["memory"][ViewKey(*key)] for key in batch.keys.tolist()]
            assert [digest(image) for image in batch.images] == expected
        workers.add(frozenset(multiprocessing.active_children()) - before)
    assert [len(kept) for kept in workers] == [2]


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_do_not_depend_on_the_number_of_threads(channels):
    views = Views(
        Images(textured(4, 300, 400, channels)),
        ViewSpec(augmentations=(Resize(size=260), RandomResizedCrop(size=224), HorizontalFlip())),
    )
    keys = [ViewKey(0, index) for index in range(4)]
    before = torch.get_num_threads()
    found = set()
    for num_threads in (1, 2, 5):
        torch.set_num_threads(num_threads)
        found.add(digest(views.__getitems__(keys)))
    torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_planning_rendering_and_loading_leave_the_global_generators_alone(sets, num_workers):
    def states() -> tuple[object, ...]:
        name, words, *rest = np.random.get_state()
        return torch.get_rng_state().tolist(), (name, words.tolist(), *rest), random.getstate()

    before = states()
    SPEC.plan([ViewKey(0, 0)], np.array([(30, 30)]))
    sets["folder"][ViewKey(0, 0)]
    loader = EpochLoader(sets["folder"], batch_size=7, num_workers=num_workers, start_method="fork")
    for epoch in range(2):
        assert len(list(loader.epoch(epoch))) == 3
    assert states() == before


def test_pixels_do_not_depend_on_the_global_generators(sets, truth):
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        found = sets["memory"].__getitems__([ViewKey(1, 2)])
        assert digest(found[0]) == truth["memory"][ViewKey(1, 2)]


def test_neighbouring_keys_and_seeds_have_other_crops():
    spec = SPEC.model_copy(update={"seed": 7})
    sizes = np.array([(300, 400)])
    plans = [
        tuple(np.concatenate([params[0] for params in at.plan([key], sizes)[0]]))
        for at in (spec, spec.model_copy(update={"seed": 8}), spec.model_copy(update={"seed": 7 + 2**32}))
        for key in (ViewKey(0, 1), ViewKey(1, 0), ViewKey(1, 1), ViewKey(0, 1 + 2**32))
    ]
    assert len(set(plans)) == len(plans)


def test_a_changed_plan_needs_a_new_version():
    kinds = {kind.model_fields["kind"].default for kind in get_args(get_args(Augmentation)[0])}
    assert kinds <= GOLDEN_AUGMENTATIONS.keys(), "every kind has a golden digest"
    mixings = {kind.model_fields["kind"].default for kind in get_args(get_args(Mixing)[0])}
    assert mixings <= GOLDEN_MIXING.keys()
    versions = get_args(ViewSpec.model_fields["plan_version"].annotation)
    assert set(GOLDEN) == set(versions)
    planned = {name: planned_digest(row) for name, row in GOLDEN_AUGMENTATIONS.items()}
    for version in versions:
        mixed = {name: mixed_digest(entries, version) for name, entries in GOLDEN_MIXING.items()}
        assert planned | mixed == GOLDEN[version]


def test_views_of_different_sizes_name_two_images_and_the_fix():
    views = Views(Images([*textured(2, 20, 20), *textured(1, 20, 24)]), ViewSpec(augmentations=(HorizontalFlip(),)))
    with pytest.raises(DataError, match=r"'image 0' gives \(3, 20, 20\), 'image 2' gives \(3, 20, 24\).* crop to a"):
        list(ViewLoader(views).render([[ViewKey(0, index) for index in range(3)]]))


def test_views_of_different_channels_are_not_sent_to_crop():
    views = Views(Images([*textured(1, 8, 8), *textured(1, 8, 8, channels=1)]), ViewSpec())
    with pytest.raises(DataError, match="same channels"):
        views.__getitems__([ViewKey(0, 0), ViewKey(0, 1)])
