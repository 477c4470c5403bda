"""The commands of peers.py: what a user of each program writes to distil a ResNet-50 into a ResNet-18 from files."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SIDE, BATCH, CLASSES = 32, 64, 10
LR, MOMENTUM, WEIGHT_DECAY = 0.02, 0.9, 5e-4
TEMPERATURE, LABELS_WEIGHT = 4.0, 0.1
SCALE = (0.5, 1.0)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
TEACHER, STUDENT = "resnet50", "resnet18"


class Run(NamedTuple):
    """A student to train: the interpreter of its program, the folders that it reads, and the folder that it writes."""

    python: str
    checkouts: Path
    images: Path
    teacher: Path
    out: Path
    epochs: int
    seed: int


class Program(NamedTuple):
    """A program that distils: its distribution, what to install, its command, and how to read the accuracy it prints.

    script: its training script within the checkouts, if its wheel has none; pip: how to install it; top1: accuracy of
    the student after the last epoch by the output and the number of epochs, None if it trains no classifier.
    """

    distribution: str
    pip: str
    command: Callable[[Run], list[str]]
    top1: Callable[[str, int], float | None]
    script: str = ""


def written(run: Run, name: str, entries: dict[str, Any]) -> str:
    """Write a configuration as JSON, which is YAML, and return its path."""
    path = run.out / name
    path.write_text(json.dumps(entries, indent=1))
    return str(path)


def last_match(pattern: str) -> Callable[[str, int], float]:
    """Return a reader of the last percentage that a pattern finds."""
    return lambda output, epochs: float(re.findall(pattern, output)[-1]) / 100


def torchdistill_top1(output: str, epochs: int) -> float:
    """Return the validation after the last epoch; teacher and best student follow it."""
    return float(re.findall(r"\* Acc@1 ([\d.]+)", output)[epochs - 1]) / 100


def json_top1(output: str, epochs: int) -> float:
    """Return `top1` of the JSON document that ends an output."""
    start = ("\n" + output).rindex("\n{")
    return float(json.loads(output[start:])["top1"])


def torchdistill(run: Run) -> list[str]:
    """Distil by image_classification.py of its repository, with a configuration in the form of its samples."""
    vision = "torchvision.transforms"
    augmentations = [
        tagged(f"{vision}.RandomResizedCrop", size=SIDE, scale=SCALE),
        tagged(f"{vision}.RandomHorizontalFlip"),
    ]
    common = [tagged(f"{vision}.ToTensor"), tagged(f"{vision}.Normalize", mean=MEAN, std=STD)]
    datasets = {
        split: tagged(
            "torchvision.datasets.ImageFolder",
            root=str(run.images / split),
            transform=tagged(f"{vision}.Compose", transforms=steps),
        )
        for split, steps in (("train", [*augmentations, *common]), ("validation", common))
    }
    entries: dict[str, Any] = {"datasets": datasets, "models": {}}
    for role, key, source in (("teacher", TEACHER, str(run.teacher / "torchdistill.pt")), ("student", STUDENT, None)):
        entries["models"][f"{role}_model"] = {
            "key": key,
            "kwargs": {"num_classes": CLASSES},
            "src_ckpt": source,
            "dst_ckpt": str(run.out / f"{role}.pt"),
        }
    loader = {"batch_size": BATCH, "num_workers": 0, "pin_memory": False, "drop_last": False}
    plain: dict[str, Any] = {
        "forward_proc": "forward_batch_only",
        "sequential": [],
        "wrapper": None,
        "frozen_modules": [],
    }
    kd = {
        "student_module_path": ".",
        "student_module_io": "output",
        "teacher_module_path": ".",
        "teacher_module_io": "output",
        "temperature": TEMPERATURE,
        "alpha": LABELS_WEIGHT,
        "reduction": "batchmean",
    }
    loaders = {split: {"dataset_id": split, "kwargs": loader} for split in datasets}
    entries["train"] = {
        "log_freq": 1000,
        "num_epochs": run.epochs,
        "train_data_loader": loaders["train"] | {"sampler": sampler("RandomSampler")},
        "val_data_loader": loaders["validation"] | {"sampler": sampler("SequentialSampler")},
        "teacher": plain | {"requires_grad": False},
        "student": plain | {"adaptations": None, "requires_grad": True},
        "optimizer": {
            "key": "SGD",
            "kwargs": {"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "nesterov": True},
        },
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": {"key": "KDLoss", "kwargs": kd}, "weight": 1.0}}},
        },
    }
    entries["test"] = {"test_data_loader": loaders["validation"] | {"sampler": sampler("SequentialSampler")}}
    config = run.out / "torchdistill.yaml"
    config.write_text(re.sub(r'\{"!": "(\w+)", ', r"!\1 {", json.dumps(entries)))
    script = run.checkouts / PROGRAMS["torchdistill"].script
    return [run.python, str(script), "--config", str(config), "--device", "cpu", "--seed", str(run.seed)]


def tagged(key: str, **kwargs: Any) -> dict[str, Any]:
    """Return an entry that torchdistill's YAML calls; "!" becomes its tag."""
    return {"!": "import_call", "key": key, "init": {"kwargs": kwargs}}


def sampler(name: str) -> dict[str, Any]:
    """Return the entry of a sampler of torch."""
    return {"class_or_func": {"!": "import_get", "key": f"torch.utils.data.{name}"}, "kwargs": {}}


def timm(run: Run) -> list[str]:
    """Distil by `train.py` of its repository; --channels-last is faster on a CPU, and its loader needs a worker."""
    options: dict[str, Any] = {
        "data-dir": run.images,
        "train-split": "train",
        "val-split": "validation",
        "model": STUDENT,
        "num-classes": CLASSES,
        "kd-model-name": f"local-dir:{run.teacher / 'timm'}",
        "kd-temperature": TEMPERATURE,
        "task-loss-weight": LABELS_WEIGHT,
        "input-size": f"3 {SIDE} {SIDE}",
        "crop-pct": 1.0,
        "scale": "{} {}".format(*SCALE),
        "color-jitter": 0.0,
        "smoothing": 0.0,
        "train-interpolation": "bilinear",
        "batch-size": BATCH,
        "epochs": run.epochs,
        "opt": "sgd",
        "momentum": MOMENTUM,
        "weight-decay": WEIGHT_DECAY,
        "lr": LR,
        "sched": "step",
        "decay-epochs": 10000,
        "warmup-epochs": 0,
        "workers": 1,
        "seed": run.seed,
        "device": "cpu",
        "output": run.out,
        "experiment": "student",
        "log-interval": 1000,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split(" "))]
    script = run.checkouts / PROGRAMS["timm"].script
    # -P: the installed timm, not that of the checkout.
    return [run.python, "-P", str(script), *words, "--channels-last", "--no-prefetcher"]


def lightly_train(run: Run) -> list[str]:
    """Distil by `lightly-train pretrain`: features without labels, and no classifier."""
    options: dict[str, Any] = {
        "out": run.out / "student",
        "data": run.images / "train",
        "model": f"torchvision/{STUDENT}",
        "method": "distillation",
        "method_args.teacher": f"torchvision/{TEACHER}",
        "method_args.teacher_weights": run.teacher / "lightly.pt",
        "epochs": run.epochs,
        "batch_size": BATCH,
        "num_workers": 0,
        "accelerator": "cpu",
        "seed": run.seed,
        "optim": "sgd",
        "optim_args.lr": LR,
        "optim_args.momentum": MOMENTUM,
        "optim_args.weight_decay": WEIGHT_DECAY,
        "transform_args.image_size": f"[{SIDE},{SIDE}]",
        "transform_args.random_resize.min_scale": SCALE[0],
        "transform_args.color_jitter": "null",
        "transform_args.random_gray_scale": "null",
        "transform_args.gaussian_blur": "null",
    }
    script = Path(run.python).with_name("lightly-train")
    return [run.python, str(script), "pretrain", *(f"{name}={value}" for name, value in options.items())]


def keras(run: Run) -> list[str]:
    """Distil by a script around `keras.distillation.Distiller`, as its documentation writes it, on torch."""
    setting = {
        **{"images": str(run.images), "teacher": str(run.teacher / "weights.pt")},
        **{"networks": [TEACHER, STUDENT], "side": SIDE, "classes": CLASSES, "batch": BATCH, "epochs": run.epochs},
        **{"lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "seed": run.seed, "scale": SCALE},
        **{"mean": MEAN, "std": STD, "temperature": TEMPERATURE, "labels_weight": LABELS_WEIGHT},
    }
    script = Path(__file__).with_name("_peer_keras.py")
    return [run.python, str(script), written(run, "keras.json", setting)]


def network(name: str) -> dict[str, Any]:
    """Return the recipe entry of a network of torchvision without weights."""
    return {"kind": "torchvision", "name": name, "weights": None}


def images(run: Run, split: str) -> dict[str, Any]:
    """Return the recipe entry of class folders."""
    return {"kind": "image_folder", "root": str(run.images / split)}


AUGMENTATIONS = [{"kind": "random_resized_crop", "size": SIDE, "scale": SCALE}, {"kind": "horizontal_flip"}]
NORMALISED = {"mean": MEAN, "std": STD}


def logitcache(run: Run) -> list[str]:
    """Distil by `train-student` from the cache that `precompute` filled with a view for each epoch."""
    entries = {
        "out": str(run.out / "student"),
        "cache": str(run.out.parent / f"cache-{run.seed}-{run.epochs}" / "cache.zarr"),
        "model": network(STUDENT),
        "preprocessing": NORMALISED,
        "losses": [
            {"kind": "cross_entropy", "weight": LABELS_WEIGHT},
            {"kind": "kl_divergence", "weight": 1 - LABELS_WEIGHT, "temperature": TEMPERATURE},
        ],
        "epochs": run.epochs,
        "batch_size": BATCH,
        "seed": run.seed,
        "optimizer": {"kind": "sgd", "lr": LR, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY},
        "schedule": {"final_lr": 1.0},
        "validation": {"dataset": images(run, "validation")},
        "num_workers": 0,
        "device": "cpu",
    }
    return [run.python, "-m", "logitcache", "train-student", written(run, "student.yaml", entries), "--json"]


def precompute(run: Run) -> list[str]:
    """Fill a cache with a view for each epoch."""
    entries = {
        "cache": str(run.out / "cache.zarr"),
        "dataset": images(run, "train"),
        "views": {"num_views": run.epochs, "seed": run.seed, "augmentations": AUGMENTATIONS},
        "teachers": {"teacher": {"model": {"kind": "run", "path": str(run.teacher)}, "logits": {"kind": "dense"}}},
        "batch_size": BATCH,
        "num_workers": 0,
        "device": "cpu",
    }
    return [run.python, "-m", "logitcache", "precompute", written(run, "precompute.yaml", entries), "--json"]


def train_teacher(run: Run) -> list[str]:
    """Train the teacher that all programs are given."""
    entries = {
        "out": str(run.teacher),
        "model": network(TEACHER),
        "preprocessing": NORMALISED,
        "dataset": images(run, "train"),
        "augmentations": AUGMENTATIONS,
        "epochs": run.epochs,
        "batch_size": BATCH,
        "optimizer": {"kind": "sgd", "lr": LR, "weight_decay": WEIGHT_DECAY},
        "schedule": {"warmup_epochs": run.epochs / 10},
        "validation": {"dataset": images(run, "validation"), "every": run.epochs},
        "num_workers": 0,
        "device": "cpu",
    }
    return [
        run.python,
        "-m",
        "logitcache",
        "train-teacher",
        written(run, "teacher.yaml", entries),
        "--resume",
        "--json",
    ]


PROGRAMS = {
    "logitcache": Program("logitcache", "pip install logitcache", logitcache, json_top1),
    "torchdistill": Program(
        "torchdistill",
        "pip install torchdistill==1.1.5, and github.com/yoshitomo-matsubara/torchdistill in --checkouts",
        torchdistill,
        torchdistill_top1,
        "torchdistill/examples/torchvision/image_classification.py",
    ),
    "timm": Program(
        "timm",
        "pip install timm==1.0.31, and github.com/huggingface/pytorch-image-models in --checkouts",
        timm,
        last_match(r"Acc@1: +[\d.]+ \( *([\d.]+)\)"),
        "pytorch-image-models/train.py",
    ),
    "keras": Program("keras", "pip install keras==3.15.1 torch torchvision", keras, json_top1),
    "lightly-train": Program("lightly-train", "pip install lightly-train==0.18.0", lightly_train, lambda *_: None),
}
