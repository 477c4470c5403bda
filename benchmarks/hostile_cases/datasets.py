"""What a manifest names as its data set."""

import io
import os
import pickle
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import torch

from hostile_cases.common import DAMAGED, OK, OTHER, USAGE, Bomb, Case, Prepare, forge

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
