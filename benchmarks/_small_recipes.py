"""Every recipe of pipelines/ in a small form: changes by `--set`, and the images that they read."""

import io
import struct
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

CPU = ("device=cpu", "num_workers=0")
PLAIN = ("channels_last=false", "fused=false")
"""How students computed before there was a choice."""
PIXELS = 32
"""The size of the images that teachers and students of photographs see."""


class Job(NamedTuple):
    """A command line on a recipe, the folder that it writes, and the jobs whose results it reads."""

    name: str
    command: str
    recipe: str
    output: str
    changes: tuple[str, ...]
    after: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    quick: bool = False
    later: tuple[tuple[str, ...], ...] = ()
    """Changes of further calls on the same recipe: a cache that grows."""
    words: tuple[str, ...] = ()
    """What a command takes that reads no recipe."""

    def command_lines(self, pipelines: Path, inputs: Path) -> list[list[str]]:
        """Return the arguments of `logitcache` for each call in turn, without keys that its checkout does not know."""
        if self.words:
            return [[self.command, "--quiet", *(word.replace("INPUTS", str(inputs)) for word in self.words)]]
        known = (pipelines / "schemas" / "train-student.json").read_text()
        missing = tuple(f"{key}=" for change in PLAIN if f'"{(key := change.partition("=")[0])}":' not in known)
        return [
            [
                self.command,
                str(pipelines / self.recipe),
                "--quiet",
                *self.options,
                *_sets(
                    [one for one in (*self.changes, *more) if not one.removeprefix("student.").startswith(missing)],
                    inputs,
                ),
            ]
            for more in ((), *self.later)
        ]


def _sets(changes: Iterable[str], inputs: Path) -> Iterable[str]:
    """Yield options that make changes; `INPUTS` in them is the folder of the images."""
    for change in changes:
        yield from ("--set", change.replace("INPUTS", str(inputs)))


def jobs() -> list[Job]:
    """List the jobs of every recipe, each after those that it reads."""
    return [
        *_of_options(),
        *_of_bundled_images(),
        *_of_synthesized_images(),
        *_of_sweeps(),
        *_of_fashion_mnist(),
        *_of_photographs(),
        *_of_pairs(),
    ]


def selected(pattern: str, quick: bool) -> list[Job]:
    """Return the jobs whose name contains `pattern`, of `quick` those alone that are, and the jobs that they read."""
    every = {job.name: job for job in jobs()}
    wanted = {name for name, job in every.items() if pattern in name and (job.quick or not quick)}
    while more := {name for job in every.values() if job.name in wanted for name in job.after} - wanted:
        wanted |= more
    return [job for name, job in every.items() if name in wanted]


def _precompute(folder: str, *changes: str, file: str = "precompute", **options: object) -> Job:
    recipe, output = f"{folder}/{file}.yaml", f"caches/{folder}-{file}.zarr"
    return Job(recipe, "precompute", recipe, output, (f"cache={output}", *CPU, *changes), **options)  # type: ignore[arg-type]


def _train(folder: str, role: str, *changes: str, **options: object) -> Job:
    recipe, output = f"{folder}/{role}.yaml", f"runs/{folder}-{role}"
    shared = (f"out={output}", *CPU, *PLAIN, "epochs=2", "schedule.warmup_epochs=1", "batch_size=16", *changes)
    command = "train-teacher" if role == "teacher" else "train-student"
    return Job(recipe, command, recipe, output, shared, **options)  # type: ignore[arg-type]


def _student(folder: str, *changes: str, cache: str | None = None, after: Sequence[str] = (), **options: object) -> Job:
    made_by = f"{folder}/precompute.yaml" if cache is None else cache
    path = "cache=caches/" + made_by.replace("/", "-").removesuffix(".yaml") + ".zarr"
    return _train(folder, "student", path, *changes, after=(made_by, *after), **options)


def _of_bundled_images() -> list[Job]:
    images = ("dataset.num_images=40", "views.num_views=2", "shard_rows=16", "batch_size=16")
    validated = "validation.dataset.num_images=20"
    generation0 = "runs/self_distillation-teacher"
    mine, both = f"teachers.mine.model.path={generation0}", ("self_distillation/teacher.yaml",)
    test = "fashion_mnist/precompute_test.yaml"
    return [
        _train("self_distillation", "teacher", "dataset.num_images=40", validated, quick=True),
        _precompute("self_distillation", *images, f"teachers.teacher.model.path={generation0}", after=both),
        _student("self_distillation", validated),
        _precompute("fashion_mnist", *images, quick=True),
        _precompute("fashion_mnist", "dataset.num_images=20", "batch_size=16", file="precompute_test", quick=True),
        _student(
            "fashion_mnist", "validation.cache=caches/fashion_mnist-precompute_test.zarr", after=(test,), quick=True
        ),
        *_of_shipping(test),
        _precompute("features", *images, quick=True),
        _student("features", validated, quick=True),
        _precompute("ensemble", *images, mine, after=both, quick=True),
        _student("ensemble", validated, quick=True),
        _precompute("derive", *images, mine, after=both, quick=True),
        Job(
            "derive/recipe.yaml",
            "derive",
            "derive/recipe.yaml",
            "caches/derived.zarr",
            ("cache=caches/derive-precompute.zarr", "out=caches/derived.zarr", "device=cpu", "shard_rows=24"),
            after=("derive/precompute.yaml",),
            quick=True,
        ),
    ]


def _of_synthesized_images() -> list[Job]:
    """List the jobs of a student without images."""
    made, recipe = "synthesized/data_free", "data_free/synthesize.yaml"
    changes = ("num_batches=2", "batch_size=20", "steps=2", "device=cpu")
    small = (f"dataset.root={made}/images", "views.num_views=2", "shard_rows=16", "batch_size=16")
    return [
        Job(recipe, "synthesize", recipe, made, changes, options=(made,)),
        _precompute("data_free", *small, after=(recipe,)),
        _student("data_free", "validation.dataset.num_images=20"),
    ]


def _of_shipping(test: str) -> list[Job]:
    """List the jobs of a student that is pruned and trained for int8."""
    cached = (
        "cache=caches/fashion_mnist-precompute.zarr",
        "validation.cache=caches/fashion_mnist-precompute_test.zarr",
    )
    caches, runs = ("fashion_mnist/precompute.yaml", test), "runs/shipping-"
    return [
        _train("shipping", "student", *cached, after=caches),
        _train("shipping", "pruned", *cached, f"model.path={runs}student", after=("shipping/student.yaml",)),
        _train("shipping", "int8", *cached, f"model.path={runs}pruned", after=("shipping/pruned.yaml",)),
    ]


def _of_sweeps() -> list[Job]:
    caches = ("fashion_mnist/precompute.yaml", "fashion_mnist/precompute_test.yaml")
    changes = (
        "student.cache=caches/fashion_mnist-precompute.zarr",
        "student.validation.cache=caches/fashion_mnist-precompute_test.zarr",
        *(f"student.{change}" for change in (*CPU, *PLAIN, "epochs=2", "batch_size=16")),
        "seeds=2",
        "inexact_targets=warn",
    )
    # Latency is measured, and no two checkouts measure the same.
    searching = ("search.kind=random", "search.objectives=[accuracy, parameters]", "search.trials=4", "search.batch=4")
    searching += (changes[0], *changes[2:-2], "halving.epochs=[1]", "search.finalists.seeds=2")
    return [
        Job(
            f"sweeps/{name}.yaml",
            "sweep",
            f"sweeps/{name}.yaml",
            f"sweeps/{name}",
            searching if name == "architecture" else changes,
            caches,
            (f"sweeps/{name}",),
        )
        for name in ("temperature", "temperature_weight", "losses", "architecture")
    ]


def _of_fashion_mnist() -> list[Job]:
    train = ("dataset.root=INPUTS", "dataset.download=false")
    test = ("validation.dataset.root=INPUTS", "validation.dataset.download=false")
    return [
        _train("fashion_mnist", "teacher", "model.width=8", *train, *test),
        _precompute("losses", "views.num_views=2", "batch_size=16", "shard_rows=16", *train),
        _student("losses", *test),
    ]


def _stand_in(teacher: str) -> tuple[str, ...]:
    """Return the changes that put random weights in a teacher's place."""
    return (
        f"teachers.{teacher}.model={{kind: torchvision, name: resnet18, weights: null}}",
        f"teachers.{teacher}.preprocessing={{mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}}",
    )


def _of_photographs() -> list[Job]:
    photos = ("views.num_views=2", "batch_size=4", "shard_rows=8")
    untrained = (*_stand_in("resnet50"), "teachers.resnet50.logits.k=5")
    cropped = f"views.augmentations.0.size={PIXELS}"
    folder, shards = "dataset.root=INPUTS/photos", "dataset.shards=INPUTS/photos-{0..1}.tar"
    small = ("batch_size=4",)
    images = "dataset={kind: image_folder, root: INPUTS/photos}"
    unlabelled = images.replace("}", ", labelled: false}")
    teacher = ("cifar/teacher.yaml",)
    return [
        _train("cifar", "teacher", images, "model.width=8", "batch_size=4"),
        _precompute("cifar", images, *photos, "teachers.teacher.model.path=runs/cifar-teacher", after=teacher),
        _student("cifar", "model.width=4", "batch_size=4"),
        _precompute("funmatch", folder, cropped, *photos, *untrained),
        _student("funmatch", *small),
        _precompute("image_folder", folder, cropped, *photos, *untrained),
        _student("image_folder", *small),
        _precompute("hugging_face", unlabelled, cropped, *photos, *_stand_in("vit")),
        _student("hugging_face", *small),
        _precompute("zero_shot", folder, cropped, *photos, *_stand_in("clip")),
        _student("zero_shot", *small),
        _precompute("other_frameworks", folder, cropped, *photos, *_stand_in("theirs")),
        _student("other_frameworks", *small),
        _precompute("imagenet", folder, "dataset.labelled=false", cropped, *photos, *untrained),
        _student("imagenet", *small, "validation=null"),
        _precompute("large_photographs", folder, cropped, *photos, *untrained),
        _student("large_photographs", *small),
        _precompute(
            "growing_folder",
            "dataset.root=INPUTS/photos_before",
            cropped,
            *photos,
            *untrained,
            later=((folder,),),
        ),
        _student("growing_folder", unlabelled, *small),
        _precompute("webdataset", shards, "dataset.labelled=false", cropped, *photos, *untrained),
        _student("webdataset", shards, "dataset.labelled=false", *small),
    ]


def _of_pairs() -> list[Job]:
    """List jobs of students that see photographs at half their size, or their edges, beside those of a teacher."""
    jobs = []
    for folder, mode in (("half_size", "RGB"), ("edges", "L")):
        out, entry = f"pairs/{folder}", f"{{kind: image_folder, root: INPUTS/{folder}, mode: {mode}}}"
        words = ("caches/image_folder-precompute.zarr", out, "--by", "stem", "--dataset", entry)
        jobs += [
            Job(f"{folder}: pair", "pair", "", out, (), after=("image_folder/precompute.yaml",), words=words),
            _student(
                folder,
                f"pairing={out}",
                "model.width=4",
                "batch_size=4",
                "validation={split: 0.3}",
                cache="image_folder/precompute.yaml",
                after=(f"{folder}: pair",),
            ),
        ]
    return jobs


def _of_options() -> list[Job]:
    """List jobs of what no shipped recipe asks for: growth, processes, models of timm, records of every row."""
    grown = _precompute("fashion_mnist", "dataset.num_images=40", "shard_rows=16", "batch_size=16")
    cache = "caches/grown.zarr"
    timm = "{kind: timm, name: test_vit, pretrained: false}"
    photos = _precompute(
        "image_folder",
        "dataset.root=INPUTS/photos",
        f"views.augmentations.0.size={PIXELS}",
        "views.num_views=2",
        "batch_size=4",
        "shard_rows=8",
        f"teachers.resnet50.model={timm}",
        "teachers.resnet50.preprocessing={mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}",
        "teachers.resnet50.logits.k=5",
        "row_checksums=true",
        "record_parameters=true",
        "cache=caches/timm.zarr",
    )
    parts = (*grown.changes, "views.num_views=2", "cache=caches/workers.zarr")
    return [
        grown._replace(
            name="a cache that grows",
            output=cache,
            changes=(*grown.changes, f"cache={cache}", "views.num_views=1"),
            later=(("views.num_views=2",), ("views.num_views=2", "teachers.second.model={kind: bundled}")),
            quick=True,
        ),
        grown._replace(name="two workers", output="caches/workers.zarr", changes=parts, options=("--workers", "2")),
        photos._replace(name="timm: teacher", output="caches/timm.zarr"),
        _student(
            "image_folder",
            "model={kind: timm, name: test_resnet, pretrained: false}",
            "batch_size=4",
            "num_workers=2",
            "cache=caches/timm.zarr",
            "out=runs/timm",
        )._replace(name="timm: student", output="runs/timm", after=("timm: teacher",)),
    ]


def make_inputs(folder: Path) -> None:
    """Write class folders of photographs, the same as tar archives of samples, and files of FashionMNIST."""
    generator = np.random.default_rng(0)
    for number in range(12):
        pixels = generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        path = folder / "photos" / f"class{number % 3}" / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo = Image.fromarray(pixels).resize((60 - number, 40 + number))
        photo.save(path)
        if number < 9:
            before = folder / "photos_before" / f"class{number % 3}" / path.name
            before.parent.mkdir(parents=True, exist_ok=True)
            photo.save(before)
        for other, paired in (("half_size", photo.reduce(2)), ("edges", photo.convert("L"))):
            file = folder / other / f"class{number % 3}" / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            paired.save(file)
        with tarfile.open(folder / f"photos-{number % 2}.tar", "a") as archive:
            _add(archive, f"{number:02}.jpg", path.read_bytes())
            _add(archive, f"{number:02}.cls", str(number % 3).encode())
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 40), ("t10k", 20)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = generator.integers(0, 10, count, dtype=np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(_idx(images))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(_idx(labels))


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def _idx(numbers: np.ndarray) -> bytes:  # type: ignore[type-arg]
    return struct.pack(f">BBBB{numbers.ndim}I", 0, 0, 8, numbers.ndim, *numbers.shape) + numbers.tobytes()
