"""How long does replaying a view take, against the torchvision v2 pipeline that it replaces?

    python benchmarks/render.py [--quick] [--json]

One thread. Ours is `Views(dataset, spec).__getitems__(keys of a batch)`; theirs is a map-style data set that applies
torchvision v2 to decoded tensors with its own random numbers, and torch.stack. Both take turns on the same images, and
a figure is the median over the rounds of the ratio of CPU times. Two photographs that come with scikit-learn, cut and
resized, are saved as JPEG files of about 500 x 375 and, with grain, of 4000 x 3000, and cut into 32 x 32 tiles in
memory. Exits 1 when a goal is
missed.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from _harness import Work, alternate, exit_code, parser_of, print_json
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import v2

from logitcache.runtime.console import configure
from logitcache.views.datasets import ImageDataset, ImageFolder
from logitcache.views.decoded_once import decoded_once
from logitcache.views.epochs import EpochLoader
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views, ViewSpec

NUM_PHOTOS, NUM_TILES, NUM_LARGE = 24, 256, 4
NUM_VIEWS = 1024
FLIP = {"kind": "horizontal_flip"}
CROP = {"kind": "random_resized_crop", "size": 224}


class Case(NamedTuple):
    """Two ways to make some images, and how many times as long the first may take per image."""

    name: str
    goal: float
    ours: Work
    theirs: Work


def write_photos(folder: Path) -> list[Path]:
    """Save parts of the two photographs as JPEG files."""
    generator = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    paths = []
    for number in range(NUM_PHOTOS):
        photo = load_sample_images().images[number % 2]
        height, width = 300 + generator.integers(0, 100), 420 + generator.integers(0, 200)
        top, left = generator.integers(0, 427 - height + 1), generator.integers(0, 640 - width + 1)
        size = (500 - 4 * (number % 3), 375 + 3 * (number % 4))
        part = Image.fromarray(photo[top : top + height, left : left + width]).resize(size, Image.Resampling.LANCZOS)
        paths.append(folder / f"{number:02}.jpg")
        part.save(paths[-1], quality=90)
    return paths


def write_large(folder: Path) -> list[Path]:
    """Save the photographs with twelve megapixels and the grain of a sensor, about 5 MB each."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    paths = [folder / f"{number}.jpg" for number in range(NUM_LARGE)]
    for number, path in enumerate(paths):
        photo = Image.fromarray(load_sample_images().images[number % 2]).resize((4000, 3000), Image.Resampling.BICUBIC)
        grain = generator.integers(-9, 10, (3000, 4000, 1), dtype=np.int16)
        Image.fromarray((np.asarray(photo) + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths


def tiles() -> Tensor:
    """Cut the photographs into uint8 [n, 3, 32, 32]."""
    photo = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    cut = photo.unfold(2, 32, 32).unfold(3, 32, 32).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 32, 32)
    return cut[:NUM_TILES].contiguous()


class Photos:
    """What a user writes around torchvision."""

    def __init__(self, paths: list[Path], transform: v2.Transform) -> None:
        self.paths, self.transform = paths, transform

    def __getitem__(self, index: int) -> Tensor:
        """Decode and augment an image."""
        with Image.open(self.paths[index]) as image:
            augmented: Tensor = self.transform(image.convert("RGB"))
        return augmented


class TileImages:
    """Images in memory, as our data sets offer them."""

    num_classes: int | None = None
    class_names = None

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self.ids = [str(number) for number in range(len(images))]
        self.labels = np.full(len(images), -1, np.int64)

    def read(self, index: int) -> Tensor:
        """Return uint8 [3, 32, 32]."""
        return self.images[index]

    def sizes(self) -> NDArray[np.int64]:
        """Return heights and widths."""
        return np.full((len(self.images), 2), 32)

    def digests(self) -> NDArray[np.uint64]:
        """Return one number per image."""
        return np.arange(len(self.images), dtype=np.uint64)


class Tiles:
    """What a user writes for images in memory."""

    def __init__(self, images: Tensor, transform: v2.Transform) -> None:
        self.images, self.transform = images, transform

    def __getitem__(self, index: int) -> Tensor:
        """Augment an image."""
        augmented: Tensor = self.transform(self.images[index])
        return augmented


def stacked(dataset: Photos | Tiles, count: int, batch_size: int) -> Work:
    """Make batches as a DataLoader does."""

    def work(_: int) -> None:
        for start in range(0, count, batch_size):
            torch.stack([dataset[index] for index in range(start, start + batch_size)])

    return work


def rendered(dataset: ImageDataset, batch_size: int, augmentations: list[dict[str, Any]], decode: str = "full") -> Work:
    """Render the batches of a data set."""
    fields = {"augmentations": augmentations, "decode": decode}
    return in_order(Views(dataset, ViewSpec.model_validate_json(json.dumps(fields))), batch_size)


def in_order(views: Views, batch_size: int = 64) -> Work:
    """Render the batches of views in order, another view in each round."""
    count = len(views.dataset.ids)

    def work(view: int) -> None:
        for start in range(0, count, batch_size):
            views.__getitems__([ViewKey(view, index) for index in range(start, start + batch_size)])

    return work


def epochs(dataset: ImageDataset, mixing: list[dict[str, Any]], views_per_image: int) -> Work:
    """Render the batches of an epoch, in its order."""
    fields = {"num_views": NUM_VIEWS, "augmentations": [CROP, FLIP], "mixing": mixing}
    views = Views(dataset, ViewSpec.model_validate_json(json.dumps(fields)))
    loader = EpochLoader(views, batch_size=NUM_PHOTOS // 2, views_per_image=views_per_image)

    def work(epoch: int) -> None:
        for keys in loader.keys(epoch):
            views.__getitems__(keys)

    return work


def small_cases() -> list[Case]:
    """Return the cases of 32 pixels."""
    images = tiles()
    dataset = TileImages(images)

    def case(name: str, goal: float, entry: dict[str, Any], transform: v2.Transform) -> Case:
        theirs = Tiles(images, v2.Compose([transform, v2.RandomHorizontalFlip()]))
        return Case(name, goal, rendered(dataset, 64, [entry, FLIP]), stacked(theirs, NUM_TILES, 64))

    resized = {"kind": "random_resized_crop", "size": 32}
    return [
        case("32: crop, flip", 0.20, {"kind": "random_crop", "size": 32, "padding": 4}, v2.RandomCrop(32, padding=4)),
        case("32: resized crop, flip", 0.45, resized, v2.RandomResizedCrop(32)),
        case("32: exact resized crop, flip", 0.45, resized | {"kernel": "exact"}, v2.RandomResizedCrop(32)),
    ]


def kept_case(folder: Path) -> Case:
    """Return the case of small JPEG files that were decoded once, against the same pixels in memory."""
    folder.mkdir()
    for number, tile in enumerate(tiles()):
        Image.fromarray(tile.permute(1, 2, 0).numpy()).save(folder / f"{number:03}.jpg")
    fields = {"augmentations": [{"kind": "random_crop", "size": 32, "padding": 4}, FLIP]}
    files = Views(ImageFolder(root=str(folder)).open(), ViewSpec.model_validate_json(json.dumps(fields)))
    kept = decoded_once(files)
    assert kept is not files, "no shared memory"
    pixels = torch.stack([files.images.read(index).permute(1, 2, 0) for index in range(NUM_TILES)])
    memory = Views(TileImages(pixels.permute(0, 3, 1, 2)), files.spec)
    return Case("32 JPEG decoded once: crop, flip, against memory", 1.10, in_order(kept), in_order(memory))


def photo_cases(folder: Path) -> list[Case]:
    """Return the cases of JPEG files and 224 pixels."""
    paths = write_photos(folder)
    dataset = ImageFolder(root=str(folder)).open()
    crop_and_flip = [v2.PILToTensor(), v2.RandomResizedCrop(224), v2.RandomHorizontalFlip()]

    def case(name: str, goal: float, entries: list[dict[str, Any]], more: list[v2.Transform]) -> Case:
        theirs = Photos(paths, v2.Compose([*crop_and_flip, *more]))
        ours = rendered(dataset, NUM_PHOTOS, [CROP, FLIP, *entries])
        return Case(name, goal, ours, stacked(theirs, NUM_PHOTOS, NUM_PHOTOS))

    plain = epochs(dataset, [], 1)
    return [
        case("224 JPEG: resized crop, flip", 0.95, [], []),
        case("224 JPEG: resized crop, flip, RandAugment", 1.00, [{"kind": "rand_augment"}], [v2.RandAugment()]),
        Case("224 JPEG: mixup, against the same unmixed", 1.40, epochs(dataset, [{"kind": "mixup"}], 1), plain),
        Case("224 JPEG: four views of an image, against one", 0.67, epochs(dataset, [], 4), plain),
    ]


def large_case(folder: Path) -> Case:
    """Return the case of photographs of twelve megapixels, which ours decodes as far as the crops need."""
    crop = [CROP | {"scale": [0.25, 1.0]}, FLIP]
    transform = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(224, scale=(0.25, 1.0)), v2.RandomHorizontalFlip()])
    theirs = stacked(Photos(write_large(folder), transform), NUM_LARGE, NUM_LARGE)
    ours = rendered(ImageFolder(root=str(folder)).open(), NUM_LARGE, crop, "scaled")
    return Case("224 JPEG of 12 megapixels: scaled crop, flip", 0.35, ours, theirs)


def ratio(case: Case, least_seconds: float) -> dict[str, Any]:
    """Measure a case for a time, in at least six rounds; each round renders another view."""
    works = [lambda number, work=work: work(number % NUM_VIEWS) for work in (case.ours, case.theirs)]
    ours, theirs = alternate(*works, 6, least_seconds)
    figure = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    return {
        "case": case.name,
        "ratio": round(figure, 3),
        "goal": case.goal,
        "rounds": len(ours),
        "seconds": [round(statistics.median(times), 5) for times in (ours, theirs)],
        "met": figure <= case.goal,
    }


def main() -> int:
    """Print the ratio of each case beside its goal."""
    arguments = parser_of(__doc__, "fewer rounds").parse_args()
    configure(quiet=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = [*small_cases(), kept_case(folder / "tiles")]
        cases = [*small, *photo_cases(folder / "photos"), large_case(folder / "large")]
        rows = [ratio(case, 3.0 if arguments.quick else 20.0) for case in cases]
    if arguments.json:
        print_json(rows)
    else:
        print("time of a view, divided by that of torchvision v2 where nothing else is said; one thread")
        for row in rows:
            print(
                f"{row['case']:<48} {row['ratio']:>5.2f}   goal <= {row['goal']:.2f}{'' if row['met'] else '   MISSED'}"
            )
    return exit_code(row["met"] for row in rows)


if __name__ == "__main__":
    sys.exit(main())
