"""What does a teacher cost a student's training: cached, online, and against plain training on labels?

    python benchmarks/nearly_free.py [--quick] [--json]

    plain          labels alone: PIL, torchvision v2, DataLoader and a training loop as a user writes them
    channels_last  the same, model and images in that memory format
    online         the same as plain with a teacher in the loop, as a user writes it
    cached         `train_student` from the cache
    --online       `train_student` with the cache's teacher in the loop

All loops take the same images in batches of the same size, render them in the main process, and compute with one
thread. They take turns in one process, a few steps each; a figure is the ratio of images per CPU second, the median
over the rounds, and the note has the images per second. Goals: `cached / plain` 1.1 where rendering is at least a fifth
of a step of plain, else 0.98; `cached / online` 0.95 of (t + p) / p, with t the teacher's own time for an image and p
that of plain: the figure is the measured ratio over that one. Teachers cost about as much as the student, 5 times and
20 times as much; `t / p` is stated.

Images: 32 px in memory, JPEG files of 32 px, and JPEG files of 500 x 375 px cropped to 224, with one view and with four
a decode, all from the photographs of scikit-learn. Students: ResNet-20 for CIFAR, and MobileNetV3-small. Weights are
random. `--quick` is one round of the images in memory and the photographs, with a teacher of 5 times. Exits 1 when a
goal is missed.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torchvision
from _harness import Row, parser_of, run_benchmark
from _networks import resnet
from _training import Arrivals, custom, seconds_between
from PIL import Image
from render import FLIP, NUM_PHOTOS, Photos, TileImages, Tiles, tiles, write_photos
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from logitcache.config.recipe import load_recipe
from logitcache.models import Classifier, Preprocessing
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.training import train_together
from logitcache.student.training_recipes import StudentRecipe
from logitcache.teacher.online import live_targets

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
STEPS, ROUNDS = 6, 3
"""Steps of a turn, the first of which warms up, and turns."""
SMALL, LARGE = 32, 16
"""Images of a batch, of 32 and of 224 px."""
CLASSES = 10


def network(name: str) -> nn.Module:
    """A factory: `resnet20` and the like for small images, else a network of torchvision."""
    depth = name.removeprefix("cifar_resnet")
    if depth != name:
        return resnet(int(depth), CLASSES)
    built: nn.Module = torchvision.models.get_model(name, num_classes=CLASSES)
    return built


class LabelledTiles(TileImages):
    """A factory: tiles of 32 px in memory, with labels."""

    num_classes: int | None = CLASSES

    def __init__(self, count: int) -> None:
        super().__init__(tiles()[:count])
        self.labels = np.arange(count) % CLASSES


class Labelled(Dataset[tuple[Tensor, int]]):
    """What a user writes: so many images that are augmented, with labels."""

    def __init__(self, images: Photos | Tiles, count: int) -> None:
        self.images, self.count = images, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], index % CLASSES


class Setting(NamedTuple):
    """Images, in a recipe and in a user's loop, and who learns from them."""

    name: str
    dataset: dict[str, Any]
    images: Callable[[v2.Transform], Photos | Tiles]
    augmentations: list[dict[str, Any]]
    transforms: list[v2.Transform]
    batch_size: int
    student: str
    teachers: tuple[str, ...]
    views: int = 1


def settings(folder: Path, quick: bool) -> Iterator[Setting]:
    """Yield the settings, their images written to a folder."""
    crop: list[dict[str, Any]] = [{"kind": "random_crop", "size": 32, "padding": 4}, FLIP]
    transforms: list[v2.Transform] = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    teachers = ("cifar_resnet92",) if quick else ("cifar_resnet20", "cifar_resnet92", "cifar_resnet362")
    small = partial(Setting, augmentations=crop, transforms=transforms, batch_size=SMALL, student="cifar_resnet20")
    count = STEPS * SMALL
    pixels = LabelledTiles(count).images
    in_memory = custom("nearly_free:LabelledTiles", count=count)
    yield small("32 px in memory", in_memory, lambda transform: Tiles(pixels, transform), teachers=teachers)
    photos = write_photos(made(folder / "photos" / "class"))
    while len(photos) < STEPS * LARGE:
        photos.append(photos[0].with_name(f"{len(photos):02}.jpg"))
        photos[-1].hardlink_to(photos[len(photos) % NUM_PHOTOS])
    dataset = {"kind": "image_folder", "root": str(folder / "photos"), "labelled": False}
    large = partial(
        Setting,
        dataset=dataset,
        images=lambda transform: Photos(photos, transform),
        augmentations=[{"kind": "random_resized_crop", "size": 224}, FLIP],
        transforms=[v2.RandomResizedCrop(224, antialias=True), v2.RandomHorizontalFlip()],
        batch_size=LARGE,
        student="mobilenet_v3_small",
    )
    yield large("224 px JPEG", teachers=("resnet18",) if quick else ("mobilenet_v3_small", "resnet18", "resnet50"))
    if quick:
        return
    yield large("224 px JPEG, 4 views a decode", teachers=(), views=4)
    tile_paths = write_tiles(made(folder / "tiles" / "class"), pixels)
    dataset = {"kind": "image_folder", "root": str(folder / "tiles"), "labelled": False}
    yield small("32 px JPEG", dataset, lambda transform: Photos(tile_paths, transform), teachers=teachers)


def made(folder: Path) -> Path:
    """Make a folder and return it."""
    folder.mkdir(parents=True)
    return folder


def write_tiles(folder: Path, pixels: Tensor) -> list[Path]:
    """Save tiles as JPEG files."""
    paths = [folder / f"{number:04}.jpg" for number in range(len(pixels))]
    for path, tile in zip(paths, pixels, strict=True):
        Image.fromarray(tile.permute(1, 2, 0).numpy()).save(path, quality=90)
    return paths


class Bench:
    """The loops of a setting; each returns the CPU seconds of an image."""

    def __init__(self, setting: Setting, folder: Path) -> None:
        self.setting, self.folder = setting, folder
        transform = v2.Compose(
            [v2.ToImage(), *setting.transforms, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        )
        self.images = Labelled(setting.images(transform), STEPS * setting.batch_size)
        self.teachers = {name: network(name).eval() for name in setting.teachers or (setting.student,)}
        self.caches = {name: self.cache(name) for name in self.teachers}

    def cache(self, teacher: str) -> str:
        """Fill the cache of a teacher."""
        path = str(self.folder / f"{self.setting.name} {teacher}.zarr".replace(" ", "_").replace(",", ""))
        entries = {
            "cache": path,
            "dataset": self.setting.dataset,
            "views": {"augmentations": self.setting.augmentations, "num_views": self.setting.views},
            "teachers": {"teacher": {"logits": {"kind": "dense", "dtype": "float32"}}},
            "num_workers": 0,
            "device": "cpu",
        }
        given = Classifier(self.teachers[teacher], Preprocessing(mean=tuple(MEAN), std=tuple(STD)))
        precompute(load_recipe(entries, PrecomputeRecipe), teachers={"teacher": given})
        return path

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Render the batches of a turn, as a user does."""
        loader = DataLoader(self.images, self.setting.batch_size, shuffle=True)
        return iter(loader)

    def theirs(self, teacher: nn.Module | None = None, channels_last: bool = False) -> float:
        """Train as a user does."""
        form = torch.channels_last if channels_last else torch.contiguous_format
        student = network(self.setting.student).to(memory_format=form).train()
        optimizer = torch.optim.AdamW(student.parameters(), 1e-3)
        moments = []
        for images, labels in self.batches():
            moments.append(time.process_time())
            images = images.to(memory_format=form)
            logits = student(images)
            if teacher is None:
                loss = functional.cross_entropy(logits, labels)
            else:
                with torch.no_grad():
                    answers = functional.softmax(teacher(images), 1)
                loss = functional.kl_div(
                    functional.log_softmax(logits, 1), answers, reduction="batchmean", log_target=True
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        return self.per_image(moments)

    def ours(self, teacher: str | None = None) -> float:
        """Train from the cache, or with its teacher in the loop."""
        cache = self.caches[teacher or next(iter(self.caches))]
        views = self.setting.views
        entries = {
            "out": tempfile.mkdtemp(dir=self.folder) + "/run",
            "cache": cache,
            "dataset": self.setting.dataset,
            "model": custom("nearly_free:network", name=self.setting.student),
            "preprocessing": {"mean": MEAN, "std": STD},
            "epochs": views,
            "views_per_image": views,
            "batch_size": self.setting.batch_size,
            "num_workers": 0,
            "device": "cpu",
        }
        arrivals = Arrivals()
        live = live_targets(cache, "cpu", modules={"teacher": self.teachers[teacher]}) if teacher else None
        train_together([load_recipe(entries, StudentRecipe)], arrivals, live=live)
        return arrivals.seconds / self.setting.batch_size

    def per_image(self, moments: list[float]) -> float:
        """Return the seconds of an image, from the second batch to the last."""
        return seconds_between(moments) / self.setting.batch_size

    def rendering(self) -> float:
        """Return the seconds in which a user's images are rendered."""
        return self.per_image([time.process_time() for _ in self.batches()])

    def answering(self, teacher: nn.Module) -> float:
        """Return the seconds of a teacher's forward pass for an image."""
        ((images, _), *_) = self.batches()
        moments = []
        for _ in range(3):
            with torch.no_grad():
                teacher(images)
            moments.append(time.process_time())
        return self.per_image(moments)


def turns(loops: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return what loops that take turns found in each round; who begins changes."""
    found: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds):
        for name, loop in [*loops.items()][:: 1 if number % 2 else -1]:
            found[name].append(loop())
    return found


def rows_of(bench: Bench, rounds: int) -> Iterator[Row]:
    """Compare the loops of a setting."""
    loops: dict[str, Callable[[], float]] = {
        "plain": bench.theirs,
        "channels_last": partial(bench.theirs, channels_last=True),
        "cached": bench.ours,
        "rendering": bench.rendering,
    }
    for name in bench.setting.teachers:
        network = bench.teachers[name]
        loops[f"{name}, online"] = partial(bench.theirs, network)
        loops[f"{name}, --online"] = partial(bench.ours, name)
        loops[f"{name}, teacher"] = partial(bench.answering, network)
    found = turns(loops, rounds)
    times = {name: statistics.median(seconds) for name, seconds in found.items()}
    share = times["rendering"] / times["plain"]
    note = f"rendering {share:.0%} of a step of plain"
    yield compared(bench, found, "cached", "plain", 1.1 if share >= 0.2 else 0.98, note)
    yield compared(bench, found, "cached", "channels_last")
    for name in bench.setting.teachers:
        answering = times[f"{name}, teacher"] / times["plain"]
        row = compared(bench, found, "cached", f"{name}, online", 0.95, f"t / p {answering:.1f}")
        formula = 1 + answering
        yield row._replace(figure=row.figure / formula, note=f"ratio {row.figure:.2f} of {formula:.2f}, {row.note}")
        yield compared(bench, found, f"{name}, --online", f"{name}, online")


def compared(
    bench: Bench, found: dict[str, list[float]], one: str, other: str, goal: float = 0.0, note: str = ""
) -> Row:
    """Return how often as fast one loop is as another."""
    figure = statistics.median(theirs / ours for ours, theirs in zip(found[one], found[other], strict=True))
    rates = " and ".join(f"{1 / statistics.median(found[name]):.0f}" for name in (one, other))
    case = f"{bench.setting.name}: {one} / {other}"
    return Row(case, figure, goal, note=", ".join(filter(None, [f"{rates} images/s", note])))


def rows(folder: Path, quick: bool) -> Iterator[Row]:
    """Measure everything."""
    for setting in settings(folder, quick):
        yield from rows_of(Bench(setting, folder), 1 if quick else ROUNDS)


if __name__ == "__main__":
    sys.exit(run_benchmark(parser_of(__doc__, "two settings, one teacher each", "where to write"), rows, width=66))
