"""The files of a store."""

import hashlib
import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import zstd

from hostile_cases.common import COUNT, DAMAGED, OK, OTHER, USAGE, Case, Prepare, forge
from hostile_cases.datasets import fifo, sparse

STORE = {
    **dict.fromkeys(("precompute", "plan"), (OK, USAGE, DAMAGED, OTHER)),
    "gc": (OK, DAMAGED, USAGE),
    "check": (OK, DAMAGED, USAGE),  # it reads the manifest alone
}


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
    """Put 20,000 records of shards that no manifest implies beside the real ones."""
    commits = folder / "c.zarr" / "t.logits.commits"
    data = first(folder, "t.logits.commits").read_bytes()
    for number in range(20_000):
        (commits / f"c.{number + 5}.0.0.0").write_bytes(data[:1])


OPENED = (DAMAGED, USAGE)
REFUSED = dict.fromkeys(("inspect", "verify", "summary", "train", "online", "derive"), OPENED)
UNREAD = {**dict.fromkeys((*REFUSED, "check"), (OK, *OPENED)), "online": (OK, USAGE, DAMAGED, OTHER)}
SHOWN = {**REFUSED, "inspect": (OK, *OPENED)}
"""Codes of a cache that is not whole: `inspect` reports how much of it is committed."""
OF_U = dict.fromkeys(("inspect", "derive"), (OK, *OPENED))
"""Codes of rows of the teacher u that cannot be decoded, of which `inspect` and `derive` read none."""
KEYS = b",".join(b'"@.%03d":null' % number for number in range(1000))
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
        written(
            "c.zarr/zarr.json", lambda: b"{" + b",".join(KEYS.replace(b"@", b"%d" % n) for n in range(4000)) + b"}"
        ),
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
        **OF_U,
    ),
    store(
        "an index outside its shard",
        lambda f: chunked_shard(f, b"x" * 64, 2**63, 2**63),
        ("inspect", "verify", "summary", "train"),
        **OF_U,
    ),
    store("classes that do not exist", wrong_classes, ("verify", "summary", "train"), **OF_U),
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
        "20,000 records too many",
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
