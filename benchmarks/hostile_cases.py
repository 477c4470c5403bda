"""The table of `hostile.py`: what is sound, how each case spoils it, and with which exit codes commands may end."""

import contextlib
import gzip
import hashlib
import importlib
import io
import json
import os
import pickle
import shutil
import signal
import socket
import struct
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import google_crc32c

# All that the commands import, before anything forks.
import numpy as np
import torch
from numcodecs import zstd
from PIL import Image
from safetensors.numpy import save_file

import logitcache.cli

for _needed in (
    *("report.demo", "report.beside_teachers", "report.inspect", "planning.report", "report.recipe_check"),
    *("report.summary", "report.verification", "student.training", "stage_one.derive.derive", "teacher.online"),
    "stage_one.precompute",
):
    importlib.import_module(f"logitcache.{_needed}")
for _optional in ("timm", "aiohttp", "s3fs", "torch._dynamo", "torch.utils.flop_counter"):
    with contextlib.suppress(ImportError):
        importlib.import_module(_optional)

OK, USAGE, DAMAGED, OTHER = 0, 2, 3, 4
REQUEST_SECONDS = 0.5
"""Of cases with a server: a request is not retried after three times as long, so that its last attempt ends by four."""

BOMB = gzip.compress(bytes(64 << 20), 1) * 16
ENVIRONMENT = {
    "LOGITCACHE_SHARED_MEMORY": "0",
    "OMP_NUM_THREADS": "1",
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "AWS_SESSION_TOKEN": "secret-session-token",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "HF_HUB_OFFLINE": "0",
    "NO_COLOR": "1",
}
COUNT = 24

PRECOMPUTE = """
cache: c.zarr
dataset: {kind: image_folder, root: images}
views: {num_views: 2, augmentations: [{kind: random_crop, size: 8, padding: 1}, {kind: horizontal_flip}]}
teachers:
  t: {model: {kind: run, path: teacher}, logits: {kind: dense}, features: {last: {kind: pooled, tap: "0.8"}}}
  u: {model: {kind: run, path: teacher}, logits: {kind: top_k, k: 2, storage: packed}}
batch_size: 12
num_workers: 0
"""
STUDENT = """
out: run
cache: c.zarr
model: {kind: small_cnn, width: 2, depth: 1}
losses: [{kind: kl_divergence, teacher: t}, {kind: kl_divergence, teacher: u}]
epochs: 1
batch_size: 12
num_workers: 0
validation: {dataset: {kind: image_folder, root: images}}
"""
TEACHER = """
out: teacher
dataset: {kind: image_folder, root: images}
augmentations: []
model: {kind: small_cnn, width: 2, depth: 1}
epochs: 1
batch_size: 12
num_workers: 0
"""
DERIVE = "{cache: c.zarr, out: d.zarr, teachers: {t: {logits: {kind: uint8}}}}\n"
AGAIN = PRECOMPUTE.replace("c.zarr", "again.zarr").replace("path: teacher", "path: run")


def make_sound(folder: Path) -> None:
    """Make the images, a teacher, a cache and a finished run, in a child: this process keeps no threads."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _make(folder)
        finally:
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit("the sound cache could not be made")


def _make(folder: Path) -> int:
    generator = np.random.default_rng(0)
    for number in range(COUNT):
        file = folder / "images" / "abc"[number % 3] / f"{number:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file)
    texts = {"precompute": PRECOMPUTE, "student": STUDENT, "teacher": TEACHER, "derive": DERIVE, "again": AGAIN}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    os.chdir(folder)
    os.environ.update({**ENVIRONMENT, "HOME": str(folder / "maker")})
    for arguments in (
        ["train-teacher", "teacher.yaml"],
        ["precompute", "precompute.yaml"],
        ["train-student", "student.yaml"],
    ):
        if logitcache.cli.main([*arguments, "-q"]):
            return 1
    shutil.rmtree(folder / "maker", ignore_errors=True)  # a stranger's cache: no memory of having made it
    return 0


def _cache(folder: Path, case: "Case | None") -> str:
    port = folder / "port"
    location = "c.zarr" if case is None else case.location
    return location.replace("PORT", port.read_text()) if port.exists() else location


COMMANDS: Mapping[str, Callable[[Path, "Case | None"], list[str]]] = {
    "inspect": lambda folder, case: ["inspect", _cache(folder, case)],
    "verify": lambda folder, case: ["verify", _cache(folder, case)],
    "summary": lambda folder, case: ["summary", _cache(folder, case)],
    "gc": lambda folder, case: ["gc", _cache(folder, case), "--dry-run"],
    "train": lambda folder, case: [
        "train-student",
        "student.yaml",
        "--set",
        "out=new",
        "--set",
        f"cache={_cache(folder, case)}",
    ],
    "online": lambda folder, case: [
        *("train-student", "student.yaml", "--online", "--set", "out=live", "--set", f"cache={_cache(folder, case)}")
    ],
    "check": lambda folder, case: ["recipe", "check", "student.yaml", "--set", f"cache={_cache(folder, case)}"],
    "derive": lambda folder, case: ["derive", "derive.yaml", "--set", f"cache={_cache(folder, case)}"],
    "precompute": lambda folder, case: ["precompute", "precompute.yaml", "--set", f"cache={_cache(folder, case)}"],
    "plan": lambda folder, case: [
        "plan",
        "precompute.yaml",
        "--batches",
        "1",
        "--set",
        f"cache={_cache(folder, case)}",
    ],
    "evaluate": lambda folder, case: ["evaluate", "run"],
    "resume": lambda folder, case: ["train-student", "student.yaml", "--resume", "--set", "epochs=1"],
    "teach": lambda folder, case: ["precompute", "again.yaml"],
    "start": lambda folder, case: [
        "train-student",
        "student.yaml",
        "--set",
        "out=new",
        "--set",
        "model={kind: run, path: run}",
    ],
}
READERS = ("inspect", "verify", "summary", "gc", "train", "online", "check", "derive", "precompute", "plan")
RUNS = ("evaluate", "resume", "teach", "start")

Prepare = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """One spoilt thing; `ends` has the exit codes by command, and those of "else".

    `commands` are what it is about; `location` is where the cache is, for those on a server, which may take `seconds`
    more. `prepare` may return an environment, or start what `prepared` stops: it yields (environment, ports).
    """

    group: str
    name: str
    prepare: Prepare
    ends: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    commands: tuple[str, ...] = ("verify", "train")
    every: tuple[str, ...] = READERS
    location: str = "c.zarr"
    seconds: float = 0.0

    def codes(self, command: str) -> frozenset[int]:
        """Return the exit codes with which a command may end."""
        return frozenset(self.ends.get(command, self.ends.get("else", (USAGE, DAMAGED, OTHER))))

    @contextlib.contextmanager
    def prepared(self, folder: Path) -> Iterator[tuple[Mapping[str, str], frozenset[int]]]:
        """Spoil a copy of what is sound; yields the environment and the ports that a command may connect to."""
        found = self.prepare(folder)
        if hasattr(found, "__enter__"):
            with found as (environment, ports):
                yield environment, frozenset(ports)
        else:
            yield (found if isinstance(found, dict) else {}), frozenset()


def forge(folder: Path, change: Callable[[dict[str, Any]], object], cache: str = "c.zarr") -> None:
    """Change the manifest and sign it again, as an attacker would."""
    file = folder / cache / "zarr.json"
    found = json.loads(file.read_bytes())
    entry = found["attributes"]["logitcache"]
    change(entry["manifest"])
    entry["sha256"] = hashlib.sha256(json.dumps(entry["manifest"], sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(found))


class Bomb:
    """What leaves a trace in the working directory where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("PWNED-by-pickle", "w"))


# --- What a manifest names as its data set --------------------------------------------------------------------------

# The commands that train on images must refuse or fail. `verify` reports images that it cannot compare; the others do
# not look at them.
IMAGES = {
    **dict.fromkeys(("train", "online"), (USAGE, DAMAGED, OTHER)),
    **dict.fromkeys(("verify", "check"), (OK, USAGE, DAMAGED, OTHER)),
    **dict.fromkeys(("inspect", "summary", "gc", "derive"), (OK, USAGE, DAMAGED)),
    **dict.fromkeys(("precompute", "plan"), (OK, USAGE, DAMAGED, OTHER)),
}


def dataset(name: str, entry: Any, plant: Prepare = lambda folder: None) -> Case:
    """Let the manifest name another data set; `plant` puts files into the working directory."""

    def prepare(folder: Path) -> None:
        plant(folder)
        value = entry(folder) if callable(entry) else entry
        forge(folder, lambda manifest: manifest.update(dataset=value))

    return Case("dataset", name, prepare, IMAGES, ("verify", "train"))


def tv(name: str, root: str = "planted", split: str | None = None, **options: Any) -> dict[str, Any]:
    """Write the entry of a torchvision data set."""
    return {
        **{"kind": "torchvision", "name": name, "root": root, "split": split, "download": False, "mode": "RGB"},
        "options": options,
    }


def folder_of(root: str, labelled: bool = True) -> dict[str, Any]:
    """Write the entry of an image folder."""
    return {"kind": "image_folder", "root": root, "mode": "RGB", "labelled": labelled, "decoder": "pillow"}


def shards(*patterns: str) -> dict[str, Any]:
    """Write the entry of WebDataset shards."""
    return {
        **{"kind": "webdataset", "shards": list(patterns), "mode": "RGB", "labelled": True, "decoder": "pillow"},
        "num_classes": 3,
    }


def plant_pickles(folder: Path) -> None:
    """Put a pickle, and a torch file of one, wherever a class of torchvision may look for data."""
    for below in (
        "",
        "processed",
        "raw",
        "MNIST/processed",
        "EMNIST/processed",
        "FashionMNIST/processed",
        "KMNIST/processed",
    ):
        (folder / "planted" / below).mkdir(parents=True, exist_ok=True)
        for name in ("meta.bin", "training.pt", "test.pt", "training_letters.pt", "test_letters.pt", "data.pkl"):
            torch.save(Bomb(), folder / "planted" / below / name)
    batches = folder / "planted" / "cifar-10-batches-py"
    batches.mkdir()
    for name in (
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
        "batches.meta",
    ):
        (batches / name).write_bytes(pickle.dumps(Bomb()))
    hundred = folder / "planted" / "cifar-100-python"
    hundred.mkdir()
    for name in ("train", "test", "meta"):
        (hundred / name).write_bytes(pickle.dumps(Bomb()))


def fifo(*names: str) -> Prepare:
    """Put pipes into the working directory."""

    def plant(folder: Path) -> None:
        for name in names:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            os.mkfifo(path)

    return plant


def sparse(name: str, size: int) -> Prepare:
    """Make a file enormous without using the disk."""

    def plant(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "ab") as file:
            file.truncate(size)

    return plant


def tar_of(name: str, *members: tuple[str, bytes]) -> Prepare:
    """Write a tar archive."""

    def plant(folder: Path) -> None:
        with tarfile.open(folder / name, "w") as archive:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))

    return plant


def tar_header(name: str, member: bytes, size_field: bytes) -> Prepare:
    """Write one header of a tar archive by hand, with a size that may say anything."""

    def plant(folder: Path) -> None:
        header = bytearray(512)
        header[: len(member)] = member
        header[100:108], header[124:136] = b"0000644\0", size_field.ljust(12, b"\0")[:12]
        header[156:157], header[257:265] = b"0", b"ustar\x0000"
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (folder / name).write_bytes(bytes(header) + bytes(1024))

    return plant


def huge_png(folder: Path) -> None:
    """Put an image that declares 60,000 x 60,000 pixels among the images."""
    ihdr = struct.pack(">II", 60_000, 60_000) + b"\x08\x02\0\0\0"

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(10_000_000), 9)
    (folder / "images" / "a" / "00.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", ihdr) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


DATASETS = [
    *(
        dataset(f"torchvision {name}", tv(name, **options), plant_pickles)
        for name, options in (
            ("LSUN", {"classes": ["tower_val"]}),
            ("Places365", {"split": "val"}),
            ("ImageNet", {"split": "val"}),
            ("CIFAR10", {"split": "test"}),
            ("CIFAR100", {"split": "train"}),
            ("EMNIST", {"split": "letters"}),
            ("MNIST", {"split": "train"}),
            ("KMNIST", {"split": "test"}),
            ("FashionMNIST", {"split": "test"}),
            ("SVHN", {"split": "test"}),
            ("STL10", {"split": "test"}),
            ("Omniglot", {}),
            ("SBU", {}),
            ("Kinetics", {"split": "val"}),
            ("PhotoTour", {}),
            ("SEMEION", {}),
            ("USPS", {"split": "test"}),
            ("DatasetFolder", {}),
        )
    ),
    dataset("torchvision FakeData of 10^8", tv("FakeData", size=10**8)),
    dataset("torchvision FakeData of large images", tv("FakeData", size=24, image_size=[3, 60000, 60000])),
    dataset("torchvision downloads", {**tv("KMNIST", split="train"), "download": True}),
    dataset("a factory", {"kind": "custom", "factory": "os:system", "arguments": {"command": "touch PWNED"}}),
    dataset("folder of the root of the disk", folder_of("/", labelled=False)),
    dataset("folder of /proc", folder_of("/proc/self", labelled=False)),
    dataset("folder of /dev", folder_of("/dev", labelled=False)),
    dataset("folder that is a pipe", folder_of("pipe"), fifo("pipe")),
    dataset("a pipe among images", folder_of("images"), fifo("images/a/00.png")),
    dataset("an image of 1 TB", folder_of("images"), sparse("images/a/00.png", 1 << 40)),
    dataset("an image of 3.6 gigapixels", folder_of("images"), huge_png),
    dataset("folder at http", folder_of("http://192.0.2.1/x")),
    dataset("folder at s3", folder_of("s3://somebody/x")),
    dataset("folder at ftp", folder_of("ftp://192.0.2.1/x")),
    dataset("folder at ssh", folder_of("ssh://192.0.2.1/x")),
    dataset("folder at file", folder_of("file:///etc")),
    dataset("folder at github", folder_of("github://org:repo@main/x")),
    dataset("folder at a chain of protocols", folder_of("zip://x::http://192.0.2.1/y.zip")),
    dataset("folder at a UNC path", folder_of("//192.0.2.1/share")),
    dataset("folder with NUL", folder_of("images\0x")),
    dataset("folder of a long name", folder_of("x" * 100_000)),
    dataset("folder of another user's home", folder_of("~root/x")),
    dataset("shards of /dev/urandom", shards("/dev/urandom")),
    dataset("shards of /dev/tty", shards("/dev/tty")),
    dataset("shards of a pipe", shards("p.tar"), fifo("p.tar")),
    dataset("shards of a command", shards("pipe:touch PWNED")),
    dataset("shards by a billion", shards("s-{000000000..999999999}.tar")),
    dataset("shards by nested lists", shards("{0..9}" * 12)),
    dataset("shards by lists in lists", shards("{a,b,c,d,e,f,g,h}" * 10 + ".tar")),
    dataset("a million patterns", shards(*(f"{n}.tar" for n in range(10**6)))),
    dataset("shards at https", shards("https://192.0.2.1/{0..9}.tar")),
    dataset("shards at http on loopback", shards("http://127.0.0.1:9/{0..9}.tar")),
    dataset("a shard of 1 TB", shards("big.tar"), sparse("big.tar", 1 << 40)),
    dataset(
        "a member of 8 EB", shards("m.tar"), tar_header("m.tar", b"a.png", b"\x80" + b"\0" * 3 + b"\x7f" + b"\xff" * 7)
    ),
    dataset("a member of negative size", shards("m.tar"), tar_header("m.tar", b"a.png", b"\xff" * 12)),
    dataset(
        "a member with an evil name",
        shards("m.tar"),
        tar_of("m.tar", ("../../PWNED.png", b"x"), ("../../PWNED.cls", b"0")),
    ),
    dataset("a label of 10^5 digits", shards("m.tar"), tar_of("m.tar", ("a.png", b"x"), ("a.cls", b"9" * 10**5))),
    dataset("a label of nested lists", shards("m.tar"), tar_of("m.tar", ("a.png", b"x"), ("a.cls", b"[" * 10**6))),
    dataset("unknown kind", {"kind": "pickle", "path": "x"}),
    dataset("huggingface", {"kind": "huggingface", "path": "evil/repo"}),
]

# --- What a manifest names as views ---------------------------------------------------------------------------------


def view(name: str, entry: Any, **views: Any) -> Case:
    """Let the manifest name other augmentations."""

    def change(manifest: dict[str, Any]) -> None:
        if entry is not None:
            manifest["views"]["augmentations"] = [entry, {"kind": "center_crop", "size": [8, 8]}]
        manifest["views"].update(views)

    return Case("views", name, lambda folder: forge(folder, change), IMAGES, ("verify", "train"))


def torchvision_view(name: str, **options: Any) -> dict[str, Any]:
    """Write the entry of a transform of torchvision."""
    import torchvision

    return {
        **{"kind": "torchvision", "name": name, "options": options, "size": None},
        "torchvision_version": torchvision.__version__,
    }


VIEWS = [
    view(
        "a factory",
        {"kind": "custom", "factory": "os:system", "arguments": {}, "size": None, "torchvision_version": None},
    ),
    view(
        "resize to 10^6",
        {"kind": "resize", "size": [10**6, 10**6], "interpolation": "bilinear", "kernel": "torchvision"},
    ),
    view(
        "exact resize to 10^6",
        {"kind": "resize", "size": [10**6, 10**6], "interpolation": "bilinear", "kernel": "exact"},
    ),
    view(
        "padding of 10^6",
        {"kind": "random_crop", "size": [8, 8], "padding": 10**6, "padding_mode": "constant", "fill": 0},
    ),
    view(
        "crop of 10^9",
        {"kind": "random_crop", "size": [10**9, 10**9], "padding": 0, "padding_mode": "constant", "fill": 0},
    ),
    view(
        "blur of 10^7 + 1",
        {"kind": "gaussian_blur", "kernel_size": [10**7 + 1, 10**7 + 1], "sigma": [0.1, 2.0], "p": 1.0},
    ),
    view("10^9 operations", {"kind": "rand_augment", "num_ops": 10**9, "magnitude": 9, "num_magnitude_bins": 31}),
    view("10^9 bins", {"kind": "trivial_augment_wide", "num_magnitude_bins": 10**9}),
    view("a Lambda", torchvision_view("Lambda", lambd="os.system")),
    view("a Resize of 10^6", torchvision_view("Resize", size=[10**6, 10**6])),
    view("a Pad of 10^6", torchvision_view("Pad", padding=10**6)),
    view("a thousand flips", None, augmentations=[{"kind": "horizontal_flip", "p": 0.5}] * 100_000),
    view("a window of 2^62", None, pairing_window=2**62),
    view("plan version 10^9", None, plan_version=10**9),
]

# --- What a manifest names as teachers ------------------------------------------------------------------------------


def model(name: str, entry: Any, plant: Prepare = lambda folder: None) -> Case:
    """Let the manifest name another network for its teacher."""

    def prepare(folder: Path) -> None:
        plant(folder)
        forge(folder, lambda manifest: manifest["teachers"]["t"].update(model=entry))

    ends = {
        "online": (USAGE, DAMAGED, OTHER),
        **dict.fromkeys(READERS[:5], (OK, USAGE, DAMAGED)),
        **dict.fromkeys(("check", "derive"), (OK, USAGE, DAMAGED)),
        **dict.fromkeys(("precompute", "plan"), (USAGE, OTHER, DAMAGED)),
    }
    return Case("model", name, prepare, ends, ("online",))


def plant_weights(folder: Path) -> None:
    """Put a malicious torch file where a model may look."""
    torch.save(Bomb(), folder / "evil.pt")
    (folder / "evil").mkdir()
    torch.save(Bomb(), folder / "evil" / "pytorch_model.bin")
    (folder / "evil" / "config.json").write_text('{"architecture": "resnet18", "num_classes": 3}')


def timm_model(name: str, pretrained: bool = False, **options: Any) -> dict[str, Any]:
    """Write the entry of a model of timm."""
    return {"kind": "timm", "name": name, "pretrained": pretrained, "new_head": False, "options": options}


MODELS = [
    model("a factory", {"kind": "custom", "factory": "os:system", "arguments": {"command": "touch PWNED"}}),
    model(
        "timm overlay of a file",
        timm_model("resnet18", True, pretrained_cfg_overlay={"file": "evil.pt"}),
        plant_weights,
    ),
    model("timm weights at a URL", timm_model("resnet18", True, pretrained_cfg={"url": "http://192.0.2.1/w.pt"})),
    model("timm weights of a hub", timm_model("hf-hub:somebody/evil", True)),
    model("timm local folder", timm_model("local-dir:evil", True), plant_weights),
    model("timm cache folder", timm_model("resnet18", True, cache_dir="evil"), plant_weights),
    model("timm scriptable", timm_model("resnet18", block_args=[1] * 10**5)),
    model("a checkpoint", {"kind": "checkpoint", "model": {"kind": "small_cnn"}, "path": "evil.pt"}, plant_weights),
    model(
        "a checkpoint that is a pipe", {"kind": "checkpoint", "model": {"kind": "small_cnn"}, "path": "p"}, fifo("p")
    ),
    model("a run elsewhere", {"kind": "run", "path": "/root", "factory": None}),
    model("a run with a factory", {"kind": "run", "path": "teacher", "factory": "os:system"}),
    model("a huge small_cnn", {"kind": "small_cnn", "width": 10**6, "depth": 10}),
    model("a deep small_cnn", {"kind": "small_cnn", "width": 1, "depth": 10**9}),
    model(
        "torchvision weights of a name",
        {"kind": "torchvision", "name": "resnet18", "weights": "../../evil", "new_head": False, "options": {}},
    ),
    model(
        "nested forever", {"kind": "checkpoint", "path": "x", "model": {"kind": "checkpoint", "path": "x", "model": {}}}
    ),
    model("no model", None),
    model("a number", 1e308),
]

# --- The files of a store -------------------------------------------------------------------------------------------

STORE = {"gc": (OK, DAMAGED, USAGE), "precompute": (OK, USAGE, DAMAGED, OTHER), "plan": (OK, USAGE, DAMAGED, OTHER)}


def store(name: str, prepare: Prepare, commands: tuple[str, ...] = ("inspect", "verify", "train"), **ends: Any) -> Case:
    """Spoil files of the cache."""
    return Case("store", name, prepare, {**STORE, **ends}, commands)


def linked(target: str, name: str) -> Prepare:
    """Put a link in a file's place."""

    def plant(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    return plant


def written(name: str, data: bytes | Callable[[], bytes]) -> Prepare:
    """Put other bytes in a file's place."""
    return lambda folder: (folder / name).write_bytes(data if isinstance(data, bytes) else data())


def as_folder(name: str) -> Prepare:
    """Put a folder in a file's place."""

    def plant(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return plant


def first(folder: Path, array: str) -> Path:
    """Return the first shard or record of an array."""
    return sorted((folder / "c.zarr" / array).glob("c.*"))[0]


def sealed(folder: Path, array: str, data: bytes, position: int, commits: str) -> None:
    """Put bytes in a shard's place with a commit record that fits."""
    shard = first(folder, array)
    shard.write_bytes(data)
    record = folder / "c.zarr" / commits / (".".join(shard.name.split(".")[:3]) + ".0.0")
    key = f"{array}/{shard.name}"
    seal = hashlib.sha256(hashlib.sha256(data).digest() + key.encode()).digest()
    stored = bytearray(record.read_bytes())
    stored[40 * position : 40 * position + 40] = len(data).to_bytes(8, "little") + seal
    record.write_bytes(bytes(stored))


def chunked_shard(folder: Path, chunk: bytes, offset: int | None = None, size: int | None = None) -> None:
    """Let every inner chunk of a packed shard be the same bytes, or lie elsewhere, under a sound record."""
    metadata = json.loads((folder / "c.zarr/u.logits/zarr.json").read_bytes())
    outer = metadata["chunk_grid"]["configuration"]["chunk_shape"][1]
    inner = metadata["codecs"][0]["configuration"]["chunk_shape"][1]
    entries = struct.pack("<QQ", offset or 0, len(chunk) if size is None else size) * (outer // inner)
    data = chunk + entries + struct.pack("<I", google_crc32c.value(entries))
    sealed(folder, "u.logits", data, 0, "u.logits.commits")


def wrong_classes(folder: Path) -> None:
    """Let rows of top-k name classes that do not exist."""
    metadata = json.loads((folder / "c.zarr/u.logits/zarr.json").read_bytes())
    rows = np.zeros(metadata["codecs"][0]["configuration"]["chunk_shape"][1:], "<u2")
    rows[:, 6:8] = 65_535
    chunked_shard(folder, zstd.compress(rows.tobytes(), 1))


def nan_rows(folder: Path) -> None:
    """Let dense logits be NaN, under a sound record."""
    data = bytearray(first(folder, "t.logits").read_bytes())
    data[: 2 * 3 * COUNT] = np.full(3 * COUNT, np.nan, "<f2").tobytes()
    sealed(folder, "t.logits", bytes(data), 0, "t.logits.commits")


def big_labels(folder: Path) -> None:
    """Let labels be 2^62, with the digests of the manifest made to fit."""
    data = np.full(COUNT, 2**62, "<i8").tobytes()
    (folder / "c.zarr/label/c/0").write_bytes(data)
    forge(folder, lambda manifest: manifest["fingerprint"].update(labels=hashlib.sha256(data).hexdigest()))


def evil_codec(name: str, configuration: Any = None) -> Prepare:
    """Let the metadata of an array name another codec, in both places."""

    def change(metadata: dict[str, Any]) -> None:
        metadata["codecs"] = [{"name": name, "configuration": configuration or {}}]

    def plant(folder: Path) -> None:
        own = folder / "c.zarr/t.logits/zarr.json"
        metadata = json.loads(own.read_bytes())
        change(metadata)
        own.write_text(json.dumps(metadata))
        root = folder / "c.zarr/zarr.json"
        found = json.loads(root.read_bytes())
        change(found["consolidated_metadata"]["metadata"]["t.logits"])
        root.write_text(json.dumps(found))

    return plant


def many_files(folder: Path) -> None:
    """Put 50,000 records of shards that no manifest implies beside the real ones."""
    commits = folder / "c.zarr" / "t.logits.commits"
    data = first(folder, "t.logits.commits").read_bytes()
    for number in range(50_000):
        (commits / f"c.{number + 5}.0.0.0").write_bytes(data[:1])


OPENED = (DAMAGED, USAGE)
REFUSED = dict.fromkeys(("inspect", "verify", "summary", "train", "online", "derive"), OPENED)
UNREAD = {**dict.fromkeys((*REFUSED, "check"), (OK, *OPENED)), "online": (OK, USAGE, DAMAGED, OTHER)}
SHOWN = {**REFUSED, "inspect": (OK, *OPENED)}
"""Codes of a cache that is not whole: `inspect` reports how much of it is committed."""
DEEP = b'{"a":' * 2_000_000
STORES = [
    store("metadata is a link", linked("/etc/passwd", "c.zarr/zarr.json"), **REFUSED),
    store("metadata is a link to zero", linked("/dev/zero", "c.zarr/zarr.json"), **REFUSED),
    store("metadata is a pipe", fifo("c.zarr/zarr.json"), **REFUSED),
    store("metadata is a folder", as_folder("c.zarr/zarr.json"), **REFUSED),
    store("metadata of 1 TB", sparse("c.zarr/zarr.json", 1 << 40), **REFUSED),
    store("metadata nested 2,000,000 deep", written("c.zarr/zarr.json", DEEP), **REFUSED),
    store("metadata of 60 MB of lists", written("c.zarr/zarr.json", b"[" + b"[]," * 20_000_000 + b"[]]"), **REFUSED),
    store(
        "metadata of 60 MB of keys",
        written("c.zarr/zarr.json", lambda: json.dumps(dict.fromkeys(map(str, range(4_000_000)))).encode()),
        **REFUSED,
    ),
    store(
        "metadata of a huge number",
        written("c.zarr/zarr.json", b'{"node_type": "group", "attributes": ' + b"9" * 10_000_000 + b"}"),
        **REFUSED,
    ),
    store("metadata in UTF-16", written("c.zarr/zarr.json", "{}".encode("utf-16")), **REFUSED),
    store("array metadata is a pipe", fifo("c.zarr/t.logits/zarr.json"), **REFUSED),
    store("array metadata of 1 TB", sparse("c.zarr/u.logits/zarr.json", 1 << 40), **REFUSED),
    store("array metadata is a link to zero", linked("/dev/zero", "c.zarr/t.last/zarr.json"), **REFUSED),
    store("commit metadata is a pipe", fifo("c.zarr/t.logits.commits/zarr.json"), **REFUSED),
    store("labels are a pipe", fifo("c.zarr/label/c/0"), **REFUSED),
    store("labels of 1 TB", sparse("c.zarr/label/c/0", 1 << 40), **REFUSED),
    store("labels are a link", linked("../../../images/a/00.png", "c.zarr/label/c/0"), **REFUSED),
    store("canaries are zero", linked("/dev/zero", "c.zarr/canary/c/0/0/0/0"), **REFUSED),
    store("the folder of digests is a link", linked("/proc/self/fd", "c.zarr/digest"), **REFUSED),
    store("the growth note is a pipe", fifo("c.zarr/digest/growing"), **UNREAD),
    store("the growth note is nested", written("c.zarr/digest/growing", DEEP), **UNREAD),
    store("the note of unreadable images is zero", linked("/dev/zero", "c.zarr/digest/unreadable"), **UNREAD),
    store("a record is a pipe", lambda f: fifo(str(first(f, "t.logits.commits").relative_to(f)))(f), **SHOWN),
    store("a record is empty", lambda f: first(f, "t.logits.commits").write_bytes(b""), **SHOWN),
    store("a record of 1 TB", lambda f: sparse(str(first(f, "u.logits.commits").relative_to(f)), 1 << 40)(f), **SHOWN),
    store(
        "a record claims 2^63 bytes",
        lambda f: first(f, "t.logits.commits").write_bytes(b"\xff" * 8 + bytes(72)),
        **SHOWN,
    ),
    store("a shard is a pipe", lambda f: fifo(str(first(f, "t.logits").relative_to(f)))(f), inspect=(OK, *OPENED)),
    store(
        "a shard is zero",
        lambda f: linked("/dev/zero", str(first(f, "u.logits").relative_to(f)))(f),
        inspect=(OK, *OPENED),
    ),
    store(
        "a shard of 1 TB", lambda f: sparse(str(first(f, "u.logits").relative_to(f)), 1 << 40)(f), inspect=(OK, *OPENED)
    ),
    store("a shard is a socket", lambda f: _socket(first(f, "t.logits")), inspect=(OK, *OPENED)),
    store(
        "frames of 64 MB a chunk",
        lambda f: chunked_shard(f, zstd.compress(bytes(64 << 20), 1)),
        ("inspect", "verify", "summary", "train"),
        inspect=(OK, *OPENED),
    ),
    store(
        "an index outside its shard",
        lambda f: chunked_shard(f, b"x" * 64, 2**63, 2**63),
        ("inspect", "verify", "summary", "train"),
        inspect=(OK, *OPENED),
    ),
    store("classes that do not exist", wrong_classes, ("verify", "summary", "train"), inspect=(OK, *OPENED)),
    store(
        "logits that are NaN",
        nan_rows,
        ("verify", "train"),
        inspect=(OK, *OPENED),
        summary=(OK, *OPENED),
        derive=(OK, *OPENED),
    ),
    store("labels of 2^62", big_labels, **REFUSED),
    store("a codec that unpickles", evil_codec("numcodecs.pickle"), **REFUSED),
    store("a codec of a library", evil_codec("numcodecs.json2", {"encoding": "utf-8"}), **REFUSED),
    store("a codec of no name", evil_codec("../../evil"), **REFUSED),
    store(
        "50,000 records too many",
        many_files,
        inspect=(OK, DAMAGED),
        verify=(OK, DAMAGED),
        summary=(OK, DAMAGED),
        train=(OK, DAMAGED),
        online=(OK, USAGE, OTHER),
        check=(OK,),
        derive=(OK, DAMAGED),
    ),
    store(
        "the cache is a link to itself", lambda f: (shutil.rmtree(f / "c.zarr"), (f / "c.zarr").symlink_to("c.zarr"))
    ),
    store("the cache is a file", lambda f: (shutil.rmtree(f / "c.zarr"), (f / "c.zarr").write_bytes(b"PK\3\4"))),
    store("the cache is a pipe", lambda f: (shutil.rmtree(f / "c.zarr"), os.mkfifo(f / "c.zarr"))),
]


def _socket(path: Path) -> None:
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


# --- Texts ----------------------------------------------------------------------------------------------------------

EVIL = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\u2066[red]x[/red]\x9b31m"


def text(name: str, change: Callable[[dict[str, Any]], object]) -> Case:
    """Put terminal controls into a text of the manifest."""
    every = dict.fromkeys(READERS, (OK, USAGE, DAMAGED, OTHER))
    return Case("text", name, lambda folder: forge(folder, change), every, ("inspect", "verify", "summary", "train"))


TEXTS = [
    text("a version", lambda m: m["versions"].update(torch=EVIL)),
    text("a version's name", lambda m: m["versions"].update({EVIL: "1"})),
    text("a root", lambda m: m["dataset"].update(root="images" + EVIL)),
    text("a tap", lambda m: m["teachers"]["t"]["features"]["last"].update(tap=EVIL)),
    text("a model's path", lambda m: m["teachers"]["t"]["model"].update(path=EVIL)),
    text("a teacher's name", lambda m: m["teachers"].update({EVIL: m["teachers"].pop("u")})),
    text("an unknown key", lambda m: m.update({EVIL: 1})),
    text("a kind", lambda m: m["dataset"].update(kind=EVIL)),
]

# --- Run folders ----------------------------------------------------------------------------------------------------


def run(name: str, prepare: Prepare, commands: tuple[str, ...] = ("evaluate", "teach"), **ends: Any) -> Case:
    """Spoil files of the run."""
    usual = {**dict.fromkeys(RUNS, (USAGE, DAMAGED, OTHER)), "resume": (OK, USAGE, DAMAGED, OTHER)}
    return Case("run", name, prepare, {**usual, **ends}, commands, RUNS)


def described(change: Callable[[dict[str, Any]], object], plant: Prepare = lambda folder: None) -> Prepare:
    """Change model.json of the run."""

    def prepare(folder: Path) -> None:
        plant(folder)
        file = folder / "run" / "model.json"
        found = json.loads(file.read_bytes())
        change(found)
        file.write_text(json.dumps(found))

    return prepare


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Prepare:
    """Change the weights of the run."""

    def prepare(folder: Path) -> None:
        from safetensors.numpy import load_file

        file = folder / "run" / "weights.safetensors"
        found = load_file(file)
        change(found)
        save_file(found, file)

    return prepare


def header(text: bytes, size: int | None = None) -> Prepare:
    """Put another header in the place of that of the weights."""
    return lambda folder: (folder / "run/weights.safetensors").write_bytes(
        struct.pack("<Q", len(text) if size is None else size) + text
    )


def checkpoint(make: Callable[[Path], object]) -> Prepare:
    """Put another checkpoint into a run that is not finished."""

    def prepare(folder: Path) -> None:
        (folder / "run" / "result.json").unlink()
        make(folder / "run" / "checkpoint.pt")

    return prepare


def altered(change: Callable[[dict[str, Any]], object]) -> Prepare:
    """Change the state in the checkpoint of a run that is not finished."""

    def make(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return checkpoint(make)


RESUMED = (USAGE, DAMAGED, OTHER)
ONLY_RESUMED = {**dict.fromkeys(("evaluate", "teach", "start"), (OK, *RESUMED)), "resume": RESUMED}
"""Codes of a file that only --resume reads."""
MAY_START = {"resume": RESUMED, **dict.fromkeys(("teach", "start"), (OK, *RESUMED))}
"""Codes of a file that evaluate and --resume read."""
RUN_FOLDERS = [
    run("a hub's model", described(lambda d: d.update(model=timm_model("hf-hub:somebody/evil", True)))),
    run("timm from a folder", described(lambda d: d.update(model=timm_model("local-dir:evil", True)), plant_weights)),
    run(
        "timm with a checkpoint",
        described(lambda d: d.update(model=timm_model("resnet18", checkpoint_path="evil.pt")), plant_weights),
    ),
    run("a factory", described(lambda d: d.update(model={"kind": "custom", "factory": "os:system", "arguments": {}}))),
    run("a width of 10^7", described(lambda d: d["model"].update(width=10**7))),
    run("a depth of 10^9", described(lambda d: d["model"].update(depth=10**9))),
    run("classes of 10^12", described(lambda d: d.update(num_classes=10**12))),
    run("channels of 10^12", described(lambda d: d.update(in_channels=10**12))),
    run("an input of 10^6", described(lambda d: d["preprocessing"].update(input_size=10**6))),
    run("a mean of 1e308", described(lambda d: d["preprocessing"].update(mean=[1e308] * 3))),
    run(
        "a std of 10^6 channels", described(lambda d: d["preprocessing"].update(mean=[0.5] * 10**6, std=[0.5] * 10**6))
    ),
    run("timm of depths 10^9", described(lambda d: d.update(model=timm_model("convnext_atto", depths=[10**9] * 4)))),
    run("model.json is a pipe", fifo("run/model.json")),
    run("model.json is zero", linked("/dev/zero", "run/model.json")),
    run("model.json nested", written("run/model.json", DEEP)),
    run("model.json of 1 TB", sparse("run/model.json", 1 << 40)),
    run("model.json in UTF-16", written("run/model.json", "{}".encode("utf-16"))),
    run("weights are a pipe", fifo("run/weights.safetensors")),
    run("weights are zero", linked("/dev/zero", "run/weights.safetensors")),
    run("weights of 1 TB", sparse("run/weights.safetensors", 1 << 40)),
    run("weights are a pickle", lambda f: torch.save(Bomb(), f / "run/weights.safetensors")),
    run("a header of 2^63", header(b"{}", 2**63)),
    run("a header that is nested", header(b'{"a":' * 100_000)),
    run("integers for weights", tensors(lambda t: t.update({k: v.astype(np.int32) for k, v in t.items()}))),
    run(
        "weights that are NaN",
        tensors(lambda t: t.update({k: v * np.float32("nan") for k, v in t.items() if v.dtype == np.float32})),
        evaluate=(OK, *RESUMED),
        teach=RESUMED,
        start=(OK, 1, *RESUMED),
    ),
    run(
        "weights of other shapes",
        tensors(lambda t: t.update({k: np.zeros((1, *v.shape), v.dtype) for k, v in t.items()})),
    ),
    run(
        "metrics that are no text",
        written("run/metrics.jsonl", b"\xff\xfe\x00"),
        ("resume", "evaluate"),
        evaluate=(OK, *RESUMED),
        teach=(OK, *RESUMED),
        start=(OK, *RESUMED),
    ),
    run("result.json nested", written("run/result.json", DEEP), ("resume",), **ONLY_RESUMED),
    run(
        "recipe.yaml of an alias bomb",
        written(
            "run/recipe.yaml",
            (
                "a0: &a0 [x,x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1},*a{n - 1},*a{n - 1}]\n" for n in range(1, 30))
            ).encode(),
        ),
        ("evaluate", "resume"),
        **MAY_START,
    ),
    run(
        "recipe.yaml that runs",
        written("run/recipe.yaml", b"!!python/object/apply:os.system ['touch PWNED']"),
        ("evaluate", "resume"),
        **MAY_START,
    ),
    run("recipe.yaml is a pipe", fifo("run/recipe.yaml"), ("evaluate", "resume"), **MAY_START),
    run(
        "environment.json is zero", linked("/dev/zero", "run/environment.json"), ("resume", "evaluate"), **ONLY_RESUMED
    ),
    run("a checkpoint that unpickles", checkpoint(lambda path: torch.save(Bomb(), path)), ("resume",), **ONLY_RESUMED),
    run(
        "a checkpoint that is a pipe",
        checkpoint(lambda path: (path.unlink(), os.mkfifo(path))),
        ("resume",),
        **ONLY_RESUMED,
    ),
    run("a checkpoint of 1 TB", checkpoint(lambda path: os.truncate(path, 1 << 40)), ("resume",), **ONLY_RESUMED),
    run("a checkpoint of texts", altered(lambda s: s.update(dict.fromkeys(s, "x"))), ("resume",), **ONLY_RESUMED),
    run("a checkpoint without keys", altered(lambda s: s.clear()), ("resume",), **ONLY_RESUMED),
    run("a checkpoint of step 10^18", altered(lambda s: s.update(place=[10**18] * 3)), ("resume",), **ONLY_RESUMED),
]

# --- Servers and keys -----------------------------------------------------------------------------------------------

Reply = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Serve the files of the case's folder as a web server or as S3, except where a fault replies."""

    protocol_version = "HTTP/1.1"
    folder: Path
    fault: Callable[["Handler"], bool]
    keys: tuple[str, ...] = ()
    visits: Path

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """Answer a request."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
            if not type(self).fault(self):
                self.plain()

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Send a whole answer."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def where(self) -> str:
        """The path of the request below the bucket."""
        from urllib.parse import unquote

        return unquote(self.path.partition("?")[0]).removeprefix("/bucket").lstrip("/")

    def plain(self) -> None:
        """Answer as a sound server does."""
        if "list-type" in self.path or self.path.partition("?")[0] in ("/bucket", "/bucket/"):
            return self.listing()
        file = self.folder / self.where
        if self.command in ("PUT", "POST", "DELETE") or not file.is_file():
            return self.send(404 if self.command in ("GET", "HEAD") else 403)
        data = file.read_bytes()
        span = self.headers.get("Range", "")
        if not span:
            return self.send(200, data, Accept_Ranges="bytes")
        start, _, stop = span.removeprefix("bytes=").partition("-")
        part = data[int(start) : int(stop) + 1 if stop else None]
        self.send(206, part, Content_Range=f"bytes {start}-{int(start) + len(part) - 1}/{len(data)}")

    def listing(self) -> None:
        """List the files below a prefix, and the evil keys."""
        from urllib.parse import parse_qs, urlsplit
        from xml.sax.saxutils import escape

        query = parse_qs(urlsplit(self.path).query)
        prefix = query.get("prefix", [""])[0]
        found = {
            file.relative_to(self.folder).as_posix(): file.stat().st_size
            for file in sorted(self.folder.rglob("*"))
            if file.is_file()
        }
        found |= dict.fromkeys(self.keys, 80)
        rows = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><ETag>&quot;{hash(key) & 0xFFFF:x}&quot;</ETag>"
            "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            for key, size in found.items()
            if key.startswith(prefix) or "../" in key
        )
        body = f"<ListBucketResult><Name>bucket</Name><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>"
        self.send(200, body.encode(), Content_Type="application/xml")


@contextlib.contextmanager
def serving(
    folder: Path, fault: Callable[[Handler], bool], keys: tuple[str, ...] = ()
) -> Iterator[tuple[dict[str, str], list[int]]]:
    """Serve a folder from a child process, beside a second server to which nobody should come."""
    visits = folder / "visits.txt"
    names = {"folder": folder, "fault": staticmethod(fault), "keys": keys, "visits": visits}
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), type("Served", (Handler,), names)) for _ in range(2)]
    ports = [server.server_address[1] for server in servers]
    for server in servers:
        server.handle_error = lambda request, address: None  # a client that hangs up is what a case wants
    child = os.fork()
    if child == 0:
        os.setsid()
        os.environ["TRAP"] = str(ports[1])
        threading.Thread(target=servers[1].serve_forever, daemon=True).start()
        with contextlib.suppress(BaseException):
            servers[0].serve_forever()
        os._exit(0)
    for server in servers:
        server.socket.close()
    (folder / "port").write_text(str(ports[0]))
    environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports[0]}", "CASE_PORT": str(ports[0]), **LOW}
    try:
        yield environment, ports[:1]
    finally:
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)


LOW = {"LOGITCACHE_REQUEST_SECONDS": str(REQUEST_SECONDS)}
"""The environment that sets the limits of requests low."""


def server(
    name: str,
    fault: Callable[[Handler], bool],
    scheme: str = "http",
    ends: tuple[int, ...] = (USAGE, DAMAGED, OTHER),
    keys: tuple[str, ...] = (),
    reports: tuple[int, ...] = (USAGE, DAMAGED, OTHER),
) -> Case:
    """Serve the cache from a server with a fault, as a web server or as S3; `reports` are codes of inspect and gc."""
    location = "http://127.0.0.1:PORT/c.zarr" if scheme == "http" else "s3://bucket/c.zarr"
    commands = (
        ("inspect", "verify", "train") if scheme == "http" else ("inspect", "verify", "gc", "train", "precompute")
    )
    every = {**dict.fromkeys(READERS, ends), **dict.fromkeys(("inspect", "gc"), reports if ends != ANY else ends)}
    return Case(
        "server" if not keys else "key",
        name,
        lambda folder: serving(folder, fault, keys),
        every,
        commands,
        READERS,
        location,
        4 * REQUEST_SECONDS,
    )


def at_root(reply: Reply, pattern: str = "c.zarr/zarr.json") -> Callable[[Handler], bool]:
    """Let a fault reply where the path holds a text."""

    def fault(handler: Handler) -> bool:
        if pattern not in handler.where or handler.command == "PUT":
            return False
        reply(handler)
        return True

    return fault


def endless(handler: Handler) -> None:
    """Send zeros for ever, without a length."""
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    while handler.command != "HEAD":
        handler.wfile.write(bytes(1 << 20))


def chunked(handler: Handler) -> None:
    """Send chunks for ever."""
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.end_headers()
    while handler.command != "HEAD":
        handler.wfile.write(b"100000\r\n" + bytes(1 << 20) + b"\r\n")


def lying(handler: Handler) -> None:
    """Declare 100 GB and send them."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(100 << 30))
    handler.end_headers()
    while handler.command != "HEAD":
        handler.wfile.write(bytes(1 << 20))


def dripping(handler: Handler) -> None:
    """Send a byte every half second."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(1000 if handler.command != "HEAD" else 0):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.5)


def dripping_headers(handler: Handler) -> None:
    """Send headers for ever."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        handler.wfile.write(b"X-A: b\r\n")
        handler.wfile.flush()
        time.sleep(0.2)


def zipped(handler: Handler) -> None:
    """Send a gzip bomb as a content encoding."""
    handler.send(200, BOMB, Content_Encoding="gzip")


def html(handler: Handler) -> None:
    """Answer with a page."""
    handler.send(200, b"<html>log in</html>", Content_Type="text/html")


def redirect(status: int, target: str) -> Reply:
    """Answer with a redirect; {trap} is the port of a server to which nobody should come."""
    return lambda handler: handler.send(status, Location=target.replace("TRAP", os.environ.get("TRAP", "1")))


def s3_redirect(status: int) -> Callable[[Handler], bool]:
    """Answer every request of S3 with a redirect to the second server."""

    def fault(handler: Handler) -> bool:
        if os.environ.get("TRAP") == str(handler.server.server_address[1]):
            handler.visits.write_text("PWNED")
            (handler.folder / "PWNED-by-redirect").write_text(str(handler.headers))
            handler.send(200)
            return True
        trap = os.environ["TRAP"]
        body = (
            f"<Error><Code>PermanentRedirect</Code><Endpoint>127.0.0.1:{trap}</Endpoint><Bucket>bucket</Bucket></Error>"
        )
        handler.send(
            status, body.encode(), Location=f"http://127.0.0.1:{trap}{handler.path}", Content_Type="application/xml"
        )
        return True

    return fault


def endless_listing(handler: Handler) -> bool:
    """List the same thousand keys for ever."""
    if "list-type" not in handler.path:
        return False
    when = "<LastModified>2026-01-01T00:00:00.000Z</LastModified>"
    keys = (f"<Key>c.zarr/t.logits/c.9.{number}.0</Key><Size>1</Size>{when}" for number in range(1000))
    rows = "".join(f"<Contents>{key}</Contents>" for key in keys)
    more = "<IsTruncated>true</IsTruncated><NextContinuationToken>again</NextContinuationToken>"
    handler.send(200, f"<ListBucketResult>{more}{rows}</ListBucketResult>".encode(), Content_Type="application/xml")
    return True


ANY = (OK, USAGE, DAMAGED, OTHER)
SERVERS = [
    server("a body without end", at_root(endless)),
    server("chunks without end", at_root(chunked)),
    server("100 GB", at_root(lying)),
    server("records without end", at_root(endless, "commits/c.")),
    server("labels without end", at_root(endless, "label/c/0")),
    server("a byte every half second", at_root(dripping)),
    server("headers without end", at_root(dripping_headers)),
    server("a gzip bomb", at_root(zipped)),
    # `inspect` reports how much of a cache is committed, `gc` what else lies there.
    server("records of HTML", at_root(html, "commits/c."), reports=ANY),
    server("records of nothing", at_root(lambda h: h.send(200), "commits/c."), reports=ANY),
    server("shards of HTML", at_root(html, "t.logits/c."), ends=ANY),
    server("a redirect to itself", at_root(redirect(302, "/c.zarr/zarr.json"))),
    server("a redirect to file", at_root(redirect(301, "file:///etc/passwd"))),
    server("a redirect inside", at_root(redirect(307, "http://169.254.169.254/latest"))),
    server("a redirect to another host", at_root(redirect(308, "http://127.0.0.2:TRAP/x"))),
    server("S3 moved for good", s3_redirect(301), "s3"),
    server("S3 moved for now", s3_redirect(307), "s3"),
    server("S3 bodies without end", at_root(endless), "s3"),
    server("S3 lists without end", endless_listing, "s3", ends=(USAGE, DAMAGED, OTHER)),
    server("S3 records of HTML", at_root(html, "commits/c."), "s3", reports=ANY),
    server("S3 pages of nothing", at_root(lambda h: h.send(200)), "s3"),
    *(
        server(f"a key {number}", lambda handler: False, "s3", ANY, (f"c.zarr/{key}",))
        for number, key in enumerate(
            (
                "t.logits.commits/../../../../PWNED/c.0.0.0.0",
                "t.logits.commits/../../PWNED.c.0.0.0.0",
                "t.logits.commits//PWNED/c.0.0.0.0",
                "t.logits.commits/c.0.0.0.0/../../../../../PWNED",
                "t.logits.commits/\\..\\PWNED/c.0.0.0.0",
                "t.logits.commits/%2e%2e/%2e%2e/PWNED/c.0.0.0.0",
                "u.logits.commits/./../../../PWNED/c.1.0.0.0",
                "../PWNED/t.logits.commits/c.0.0.0.0",
            )
        )
    ),
]

CASES: tuple[Case, ...] = (*DATASETS, *VIEWS, *MODELS, *STORES, *TEXTS, *RUN_FOLDERS, *SERVERS)
