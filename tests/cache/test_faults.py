"""The table of faults: each is told by what is still equal, and every level does with it what it says."""

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from logitcache.cache.cache import Cache, open_cache
from logitcache.errors import MismatchError, ReplayMismatchError
from logitcache.models import Preprocessing
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.teacher.teacher import TeacherSource
from logitcache.views import canaries
from logitcache.views.augmentations import HorizontalFlip, RandomResizedCrop
from logitcache.views.canaries import CanaryReport, DriftLimits
from logitcache.views.mixing.mixing import MixUp
from logitcache.views.spec import Views, ViewSpec
from tests.views.images import Images, textured

NUM_IMAGES = 60
SPEC = ViewSpec(num_views=4, seed=11, augmentations=(RandomResizedCrop(size=24), HorizontalFlip()))
PHOTOS = textured(NUM_IMAGES, 40, 44)
Apply = Callable[[RandomResizedCrop, Tensor, Any], Tensor]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    path = tmp_path_factory.mktemp("canaries") / "cache.zarr"
    source = TeacherSource(preprocessing=Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3))
    recipe = PrecomputeRecipe(cache=str(path), views=SPEC, teachers={"mean": source}, num_workers=0)
    precompute(recipe, teachers={"mean": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())}, dataset=Images(PHOTOS))
    return open_cache(path)


def jpeg(image: Tensor) -> Tensor:
    """Send an image through JPEG."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).contiguous()


def noise(image: Tensor) -> Tensor:
    """Change every fourth number by one level, as other kernels do."""
    generator = torch.Generator().manual_seed(1)
    step = torch.randint(-4, 5, image.shape, generator=generator).div(4, rounding_mode="trunc").int()
    return (image.int() + step).clamp(0, 255).to(torch.uint8)


def drifting(crop: RandomResizedCrop, images: Tensor, params: Any, real: Apply = RandomResizedCrop.apply) -> Tensor:
    return noise(real(crop, images, params))


def resized_by(interpolation: str, antialias: bool) -> Apply:
    def apply(crop: RandomResizedCrop, images: Tensor, params: Any) -> Tensor:
        mode = InterpolationMode(interpolation)
        rows = zip(images, params.tolist(), strict=True)
        return torch.stack([F.resized_crop(image, *box, [24, 24], mode, antialias) for image, box in rows])

    return apply


class Renamed(Images):
    @property
    def ids(self) -> list[str]:
        return [f"picture {index}" for index in range(len(self.pixels))]


def with_spec(**changes: Any) -> ViewSpec:
    return SPEC.model_copy(update=changes)


def with_augmentations(*augmentations: Any) -> ViewSpec:
    return with_spec(augmentations=augmentations)


ALL, SOME, NONE = (32, 32), (0, 31), (0, 0)
REFUSED = {"strict": "refused", "numeric": "refused", "off": "accepted"}
WARNED = {"strict": "refused", "numeric": "warned", "off": "accepted"}
ACCEPTED = {"strict": "accepted", "numeric": "accepted", "off": "accepted"}
OTHER_IMAGES = "the decoded images differ: other files, another order or another decoder"
OTHER_PLANS = "the plans differ: another seed, other augmentations or another release"
OTHER_KERNEL = r"more than numeric drift \(limits 0.5 / 16\): same images and crops, but another resize kernel"


@dataclass(frozen=True)
class Fault:
    """A row of the table: what is changed, and what the check finds.

    Each count and difference is (least, most). `dataset` is the message of the comparison of data sets, which comes
    before the canaries and at every level; None where it finds nothing.
    """

    raw: tuple[int, int] = ALL
    plans: tuple[int, int] = ALL
    augmented: tuple[int, int] = NONE
    mean: tuple[float, float] = (0.0, 0.0)
    max: tuple[int, int] = (0, 0)
    verdict: str = ""
    levels: dict[str, str] = field(default_factory=lambda: REFUSED)
    dataset: str | None = None
    images: Any = field(default_factory=lambda: Images(PHOTOS))
    spec: ViewSpec = SPEC
    apply: Apply | None = None


LARGE = {"mean": (5.0, 255.0), "max": (100, 255)}
FAULTS = {
    "none": Fault(augmented=ALL, levels=ACCEPTED),
    "more views": Fault(augmented=ALL, levels=ACCEPTED, spec=with_spec(num_views=9)),
    "wrong seed": Fault(plans=NONE, verdict=OTHER_PLANS, **LARGE, spec=with_spec(seed=12)),
    "seed of the same low 32 bits": Fault(
        plans=NONE, verdict=OTHER_PLANS, **LARGE, spec=with_spec(seed=SPEC.seed + 2**32)
    ),
    "data set shifted by one": Fault(
        raw=NONE,
        verdict=OTHER_IMAGES,
        **LARGE,
        dataset="content of the images",
        images=Images(PHOTOS[1:] + PHOTOS[:1]),
    ),
    "encoded again as JPEG": Fault(
        raw=NONE,
        verdict=OTHER_IMAGES,
        mean=(1.0, 20.0),
        max=(10, 255),
        dataset="60 of 60 images changed",
        images=Images([jpeg(image) for image in PHOTOS]),
    ),
    "BGR": Fault(
        raw=NONE,
        verdict=OTHER_IMAGES,
        **LARGE,
        dataset="60 of 60 images changed",
        images=Images([image.flip(0) for image in PHOTOS]),
    ),
    "decoder one level off": Fault(
        raw=NONE,
        augmented=SOME,
        verdict=OTHER_IMAGES,
        mean=(0.01, 1.0),
        max=(1, 2),
        dataset="60 of 60 images changed",
        images=Images([noise(image) for image in PHOTOS]),
    ),
    "numeric drift": Fault(
        mean=(0.1, 0.5),
        max=(1, 1),
        verdict=r"numeric drift \(limits 0.5 / 16\): same crops, different kernels",
        levels=WARNED,
        apply=drifting,
    ),
    "bicubic kernel": Fault(
        augmented=SOME,
        mean=(1.1, 50.0),
        max=(17, 255),
        verdict=OTHER_KERNEL,
        spec=with_augmentations(RandomResizedCrop(size=24, interpolation="bicubic"), HorizontalFlip()),
    ),
    "no antialias": Fault(
        augmented=SOME,
        mean=(1.1, 50.0),
        max=(17, 255),
        verdict=OTHER_KERNEL,
        apply=resized_by("bilinear", antialias=False),
    ),
    "changed option": Fault(
        plans=(1, 31),
        augmented=(1, 31),
        verdict=OTHER_PLANS,
        mean=(1.0, 255.0),
        max=(17, 255),
        spec=with_augmentations(RandomResizedCrop(size=24, scale=(0.1, 1.0)), HorizontalFlip()),
    ),
    "changed probability": Fault(
        plans=SOME,
        augmented=(1, 31),
        verdict=OTHER_PLANS,
        mean=(1.0, 255.0),
        max=(100, 255),
        spec=with_augmentations(RandomResizedCrop(size=24), HorizontalFlip(p=0.0)),
    ),
    "an augmentation less": Fault(
        plans=NONE,
        augmented=(1, 31),
        verdict=OTHER_PLANS,
        mean=(1.0, 255.0),
        max=(100, 255),
        spec=with_augmentations(RandomResizedCrop(size=24)),
    ),
    "mixing added": Fault(
        plans=NONE, verdict=OTHER_PLANS, mean=(1.0, 255.0), max=(100, 255), spec=with_spec(mixing=(MixUp(alpha=8.0),))
    ),
    "another size": Fault(
        mean=(255.0, 255.0),
        max=(255, 255),
        verdict=OTHER_KERNEL,
        spec=with_augmentations(RandomResizedCrop(size=20), HorizontalFlip()),
    ),
    "an image less": Fault(dataset="number of images: recorded 60, here 59", images=Images(PHOTOS[:-1])),
    "other ids": Fault(augmented=ALL, levels=ACCEPTED, dataset="ids and their order: recorded", images=Renamed(PHOTOS)),
}


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_told_by_what_is_still_equal(name: str, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    if fault.apply is not None:
        monkeypatch.setattr(RandomResizedCrop, "apply", fault.apply)
    for level in ("strict", "numeric", "off"):
        assert dataset_refusal(cache, fault, level) == (fault.dataset is not None)
    if len(fault.images.pixels) == NUM_IMAGES:  # without its last image a canary cannot even be rendered
        check_canaries(fault, cache)


def dataset_refusal(cache: Cache, fault: Fault, level: Any) -> bool:
    """Return whether the data set is refused before any canary is rendered."""
    if fault.dataset is None:
        cache.require_dataset(fault.images)
        return False
    with pytest.raises(MismatchError, match=fault.dataset) as refused:
        cache.views(fault.images, verify=level)
    return not isinstance(refused.value, ReplayMismatchError)


def check_canaries(fault: Fault, cache: Cache) -> None:
    views = Views(fault.images, fault.spec)
    found = report(cache, views)
    for value, (least, most) in (
        (found.raw_equal, fault.raw),
        (found.plans_equal, fault.plans),
        (found.augmented_equal, fault.augmented),
        (found.mean_difference, fault.mean),
        (found.max_difference, fault.max),
    ):
        assert least <= value <= most, found
    for level, expected in fault.levels.items():
        happened, message = outcome(cache, views, level)
        assert happened == expected
        assert (message == "") == (happened == "accepted")
        if message:
            assert re.search(f"\n  -> {fault.verdict}", message)
            counts = (found.raw_equal, found.plans_equal, found.augmented_equal)
            for what, equal in zip(("raw images", "plans", "augmented"), counts, strict=True):
                assert f"{what} {equal}/32 equal" in message
            assert f"mean |d| {found.mean_difference:.2f}, max {found.max_difference}" in message


def report(cache: Cache, views: Views) -> CanaryReport:
    recorded = torch.from_numpy(canary_pixels(cache))
    return canaries.compare(views, cache.manifest.canaries, recorded)


def canary_pixels(cache: Cache) -> np.ndarray[Any, Any]:
    shape = (32, *cache.manifest.image_shape)
    return np.fromfile(Path(cache.path, "canary/c/0/0/0/0"), np.uint8).reshape(shape)


def outcome(cache: Cache, views: Views, level: Any, limits: DriftLimits = canaries.DEFAULT_LIMITS) -> tuple[str, str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            cache.require_canaries(views, level, limits)
        except ReplayMismatchError as error:
            return "refused", str(error)
    return ("warned", str(caught[0].message)) if caught else ("accepted", "")


def test_one_changed_image_is_seen(cache: Cache) -> None:
    index = cache.manifest.canaries[7].index
    found = report(cache, Views(Images([*PHOTOS[:index], PHOTOS[index] ^ 1, *PHOTOS[index + 1 :]]), SPEC))
    equal = 32 - sum(canary.index == index for canary in cache.manifest.canaries)
    assert (found.raw_equal, found.plans_equal) == (equal, 32)


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (DriftLimits(mean=0.5, max=1), "warned"),
        (DriftLimits(mean=255.0, max=0), "refused"),
        (DriftLimits(mean=0.0, max=255), "refused"),
        (DriftLimits(mean=0, max=0), "refused"),
    ],
)
def test_limits_decide_what_drift_is_and_are_told(
    limits: DriftLimits, expected: str, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RandomResizedCrop, "apply", drifting)
    happened, message = outcome(cache, Views(Images(PHOTOS), SPEC), "numeric", limits)
    assert happened == expected
    assert f"(limits {limits.mean:g} / {limits.max})" in message
    with pytest.raises(ReplayMismatchError):
        cache.views(Images(PHOTOS), "strict", limits)
    if expected == "warned":
        with pytest.warns(UserWarning, match="Accepted, as verify is numeric"):
            cache.loader(dataset=Images(PHOTOS), verify="numeric", limits=limits)


def test_the_widest_limits_accept_another_kernel_but_never_other_plans_or_images(cache: Cache) -> None:
    widest = DriftLimits(mean=255.0, max=255)
    for name, expected in {"bicubic kernel": "warned", "wrong seed": "refused", "BGR": "refused"}.items():
        fault = FAULTS[name]
        assert outcome(cache, Views(fault.images, fault.spec), "numeric", widest)[0] == expected
        assert outcome(cache, Views(fault.images, fault.spec), "strict", widest)[0] == "refused"
