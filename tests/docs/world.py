"""A folder with all that README and docs name, in small: recipes, photographs, shards, caches."""

import io
import runpy
import tarfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn

from logitcache.config.recipe import load_recipe, read_recipe
from logitcache.models.small_cnn import SmallCNN
from logitcache.report.recipe_check import command_of
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from tests.student.small import fill, network
from tests.teacher.nets import Net, images

ROOT = Path(__file__).parents[2]
PIPELINES = ROOT / "pipelines"
CLASSES = ("n01443537", "n01629819", "n01641577")
PHOTOS = {"kind": "image_folder", "root": "photos"}
UNTRAINED = {"kind": "torchvision", "name": "mobilenet_v3_small", "weights": None}
COLOURED = {"kind": "custom", "factory": "tests.docs.world:tiny", "arguments": {"channels": 3}}
TINY = {"kind": "small_cnn", "width": 4}
GREY = {"mean": [0.5], "std": [0.5]}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
BUNDLED = {"kind": "bundled", "num_images": 40}
HERE = {
    "s3://bucket": "bucket",
    "/data/photos": "photos",
    "photos/IMG_0001.jpg": "photos/n01629819/1.jpg",
    "pipelines/photos/teacher.yaml": "teacher.yaml",
    "/data/edges": "edges",
    "torchvision:resnet50": "timm:test_resnet.r160_in1k",
    "torchvision:mobilenet_v3_small": "timm:test_efficientnet.r160_in1k",
    "resnet50.a1_in1k": "test_resnet.r160_in1k",
    "mobilenetv3_small_100.lamb_in1k": "test_efficientnet.r160_in1k",
}
"""Folders and small models of the world that take the place of what pages name."""


def here(text: str) -> str:
    """Return an example in which URLs, absolute paths and models are those of the world."""
    for named, folder in HERE.items():
        text = text.replace(named, folder)
    return text


def shrunk(entries: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe of few images, of networks that need no download, and of one epoch."""
    small = dict(entries)
    if small.get("kind") == "sweep":
        small |= {"student": shrunk(small["student"]), "seeds": min(2, small.get("seeds", 1))}
        if "halving" in small:
            small["student"]["epochs"], small["halving"] = 2, small["halving"] | {"epochs": [1]}
        if "search" in small:
            small["search"] = small["search"] | {"trials": 2, "batch": 2}
            small["latency"] = {"repeats": 2, "warm_up": 1}
            small["student"]["validation"] = {"dataset": BUNDLED | {"split": "test"}}
        return small
    if small.get("dataset", {}).get("kind") == "huggingface":
        crop = {"augmentations": [{"kind": "center_crop", "size": 32}]}
        small |= {"dataset": PHOTOS | {"labelled": False}, "views": small.get("views", crop)}
    if "views" in small:
        given = small["views"].get("augmentations", [])
        shapes = [entry | ({"size": 32} if np.max(entry.get("size", 0)) > 32 else {}) for entry in given]
        small["views"] = small["views"] | {"num_views": 2, "augmentations": shapes}
    if small.get("dataset", {}).get("kind") in ("bundled", "torchvision"):
        small["dataset"] = BUNDLED | {"split": small["dataset"].get("split", "train")}
    elif small.get("dataset", {}).get("kind") == "image_folder" and "teachers" in small:
        classes = [entry for entry in small["teachers"].values() if "classes" in entry]
        if not small["dataset"]["root"].startswith("synthesized"):
            small["dataset"] = small["dataset"] | {"root": "photos", "labelled": bool(classes)}
    if "num_batches" in small:
        return small | {"num_batches": 1, "batch_size": 20, "steps": 2, "device": "cpu"}
    if "epochs" in small:
        small |= {"epochs": 1, "schedule": {}, "num_workers": 0, "batch_size": 64}
        if "split" in small.get("validation", {}):
            small["validation"] = {"split": 0.3}
        if small["model"]["kind"] in ("torchvision", "timm"):
            small["model"] = TINY
    elif "out" not in small:
        small |= {"num_workers": 0, "batch_size": 64, "views_per_image": 1}
        is_grey = small["dataset"]["kind"] == "bundled" or small["dataset"].get("mode") == "L"
        small["teachers"] = {name: _teacher(entry, is_grey) for name, entry in small["teachers"].items()}
    return small | {"device": "cpu"}


def _teacher(entry: dict[str, Any], is_grey: bool) -> dict[str, Any]:
    if entry.get("model", {}).get("kind") == "torchvision" and entry["model"].get("weights") is None:
        return {"preprocessing": HALF} | entry
    if entry.get("model", {}).get("path", "").startswith("models/"):
        return entry
    small = {"kind": "custom", "factory": "tests.docs.world:tiny"} if is_grey else UNTRAINED
    return entry | {"model": small, "preprocessing": GREY if is_grey else HALF}


def tiny(channels: int = 1) -> nn.Module:
    """A factory: a network with the modules of the bundled teacher, and a thirtieth of its work."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallCNN(width=4).build(10, channels).module


def make_world(folder: Path) -> None:
    """Fill a folder, which is the working directory."""
    for path in PIPELINES.rglob("*.yaml"):
        copy = folder / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(yaml.safe_dump(shrunk(load_plain(path))))
    for name, recipe in (("recipe", "fashion_mnist/precompute"), ("derive", "derive/recipe")):
        (folder / f"{name}.yaml").write_text((folder / f"pipelines/{recipe}.yaml").read_text())
    student = load_plain(folder / "pipelines/fashion_mnist/student.yaml")
    del student["validation"]
    (folder / "student.yaml").write_text(yaml.safe_dump(student))
    teacher = {"out": "runs/photos-teacher", "dataset": PHOTOS | {"split": "train"}, "model": TINY, "epochs": 1}
    crop = {"augmentations": [{"kind": "center_crop", "size": 32}]}
    (folder / "teacher.yaml").write_text(yaml.safe_dump(shrunk(teacher | crop)))
    _draw_photos(folder)
    draw = runpy.run_path(str(PIPELINES / "edges/draw_edges.py"))["draw_edges"]
    draw(folder / "photos", folder / "edges")
    _fill_caches(folder)
    if find_spec("transformers") is not None:
        from tests.models.hugging_face import write_classifier, write_clip

        write_classifier(folder / "models/vit-beans")
        write_clip(folder / "models/clip")


def load_plain(path: Path) -> dict[str, Any]:
    """Read a recipe as plain data."""
    assert command_of(path)
    entries: dict[str, Any] = read_recipe(path)
    return entries


def _draw_photos(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for number in range(12):
        target = folder / "photos" / CLASSES[number % 3] / f"{number}.jpg"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40 + number, 60 - number, 3), dtype=np.uint8)).save(target)
    (folder / "bucket").mkdir()
    for number in range(147):
        picture = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(picture, "PNG")
        with tarfile.open(folder / f"bucket/train-{number:03}.tar", "w") as shard:
            member = tarfile.TarInfo(f"{number}.png")
            member.size = picture.tell()
            picture.seek(0)
            shard.addfile(member, picture)


def _fill_caches(folder: Path) -> None:
    (folder / "caches").mkdir()
    precompute(load_recipe(folder / "pipelines/derive/precompute.yaml", PrecomputeRecipe))
    fill(folder / "caches/ensemble.zarr", {"a": network(1), "b": network(2)})
    pooled = {"pooled": {"kind": "pooled", "tap": "relu"}}
    entries = {"resnet50": {"preprocessing": HALF, "features": pooled}, "vit": {"preprocessing": HALF}}
    recipe = {"cache": "caches/imagenet.zarr", "teachers": entries, "num_workers": 0, "device": "cpu"}
    modules = {"resnet50": Net(), "vit": Net()}
    precompute(load_recipe(recipe, PrecomputeRecipe), teachers=modules, dataset=images(300))
