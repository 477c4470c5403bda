"""Caches to which images were appended, growths that were begun, and folders of `synthesize`."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile_cases.common import DAMAGED, OK, OTHER, USAGE, Case, Prepare, forge
from hostile_cases.datasets import fifo, sparse
from hostile_cases.stores import DEEP, STORE, as_folder, linked, written

_ENTRY = {
    **STORE,
    **dict.fromkeys(("inspect", "summary", "derive", "view", "card", "page"), (OK, USAGE, DAMAGED, OTHER)),
    "else": (USAGE, DAMAGED, OTHER),
}
"""Codes of a grown cache: not all commands read what was appended."""

_BEGUN = dict.fromkeys((*_ENTRY, "else"), (OK, USAGE, DAMAGED, OTHER))
"""Codes of a cache that is growing: readers see what it was before."""


def _in_place(folder: Path, other: str) -> None:
    """Put another cache in the place of the sound one, and the images that it was made from."""
    shutil.rmtree(folder / "c.zarr")
    (folder / other).rename(folder / "c.zarr")
    (folder / "images").rename(folder / "first")
    (folder / "many").rename(folder / "images")


def grown(name: str, prepare: Prepare, **ends: tuple[int, ...]) -> Case:
    """Spoil a cache to which images were appended."""

    def spoil(folder: Path) -> Any:
        _in_place(folder, "grown.zarr")
        return prepare(folder)

    return Case("grown", name, spoil, {**_ENTRY, **ends}, ("verify", "train", "inspect", "precompute"))


def record(name: str, change: Callable[[dict[str, Any]], object], **ends: tuple[int, ...]) -> Case:
    """Let the manifest of a grown cache state something else."""
    return grown(name, lambda folder: forge(folder, change), **ends)


def begun(name: str, prepare: Prepare) -> Case:
    """Spoil a cache whose growth has begun."""

    def spoil(folder: Path) -> Any:
        _in_place(folder, "growing.zarr")
        return prepare(folder)

    return Case("grown", name, spoil, _BEGUN, ("precompute", "verify", "gc", "train"))


def note(name: str, change: Callable[[dict[str, Any]], object]) -> Case:
    """Let the note of a growth state something else."""

    def rewrite(folder: Path) -> None:
        file = folder / "c.zarr/digest/growing"
        entries = json.loads(file.read_bytes())
        change(entries)
        file.write_text(json.dumps(entries))

    return begun(name, rewrite)


def _ids(folder: Path, names: bytes, **changes: Any) -> None:
    """Put other ids into a grown cache, with the digest and the size of the manifest made to fit."""
    (folder / "c.zarr/id/c/0").write_bytes(names)

    def fit(manifest: dict[str, Any]) -> None:
        manifest["fingerprint"].update(ids=hashlib.sha256(names).hexdigest())
        manifest["appended"].update(id_bytes=len(names), **changes)

    forge(folder, fit)


def _appended(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["appended"].update(changes)


def _first(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["appended"]["first"].update(changes)


def _images(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda entries: entries["images"].update(changes)


def made(name: str, prepare: Prepare) -> Case:
    """Spoil a folder of images that were synthesized."""

    def spoil(folder: Path) -> Any:
        (folder / "synthesized").rename(folder / "made")
        return prepare(folder)

    return Case("made", name, spoil, {"else": (OK, USAGE, DAMAGED, OTHER)}, ("synthesize",), ("synthesize",))


def described(name: str, change: Callable[[dict[str, Any]], object], file: str = "synthesis.json") -> Case:
    """Let the description of synthesized images, or a batch's record, state something else."""

    def rewrite(folder: Path) -> None:
        path = folder / "made" / file
        entries = json.loads(path.read_bytes())
        change(entries)
        path.write_text(json.dumps(entries))

    return made(name, rewrite)


_BATCH = "batches/00-00000.json"
GROWN = [
    record("ids of 1 TB", _appended(id_bytes=1 << 40)),
    record("ids of 2^62 bytes", _appended(id_bytes=1 << 62)),
    record("ids of no bytes", _appended(id_bytes=1)),
    grown("ids of 1 TB, claimed and there", lambda folder: _of_a_terabyte(folder)),
    record("more images first than in all", _first(num_images=10**6)),
    record("first images of a billion", _first(num_images=10**9)),
    record("no first images", _first(num_images=0)),
    record("first images of other ids", _first(ids="0" * 64)),
    record("first images of other classes", _first(num_classes=2**30)),
    record("appended to nothing", lambda manifest: manifest.update(appended=None)),
    record("appended is a list", lambda manifest: manifest.update(appended=[1] * 1000)),
    record("canaries of appended images that do not exist", lambda m: m["canaries"][-1].update(index=10**7)),
    record("600 canaries", lambda m: m.update(canaries=m["canaries"] * 600)),
    grown("ids are a link", linked("/etc/passwd", "c.zarr/id/c/0")),
    grown("ids are a link to zero", linked("/dev/zero", "c.zarr/id/c/0")),
    grown("ids are a pipe", fifo("c.zarr/id/c/0")),
    grown("ids are a folder", as_folder("c.zarr/id/c/0")),
    grown("sizes of 1 TB", sparse("c.zarr/size/c/0/0", 1 << 40)),
    grown("sizes are a link to zero", linked("/dev/zero", "c.zarr/size/c/0/0")),
    grown("ids that are all the same", lambda folder: _ids(folder, b"\n".join([b"a/00.png"] * 30))),
    grown("ids that climb", lambda folder: _ids(folder, b"\n".join(b"../../etc/%02d" % n for n in range(30)))),
    grown("ids of escapes", lambda folder: _ids(folder, b"\n".join(b"\x1b]0;%02d\x07\x9b2J" % n for n in range(30)))),
    begun("the note is a link to zero", linked("/dev/zero", "c.zarr/digest/growing")),
    begun("the note is a pipe", fifo("c.zarr/digest/growing")),
    begun("the note of 1 TB", sparse("c.zarr/digest/growing", 1 << 40)),
    begun("the note is nested", written("c.zarr/digest/growing", DEEP)),
    begun("the ids to come are a pipe", fifo("c.zarr/digest/growing.ids")),
    begun("the ids to come of 1 TB", sparse("c.zarr/digest/growing.ids", 1 << 40)),
    note("growing to a billion images", lambda entries: entries["images"]["fingerprint"].update(num_images=10**9)),
    note("growing to ids of 1 TB", lambda entries: entries["images"]["appended"].update(id_bytes=1 << 40)),
    note("growing by images of a pipe", _images(dataset={"kind": "webdataset", "shards": ["/dev/zero"]})),
    note("staged shards of 2^60 views", _images(staged=[1 << 60, 0, 24])),
    note("staged shards of negative rows", _images(staged=[2, -(1 << 40), 24])),
    note("growing to a million views", lambda entries: entries.update(num_views=10**6)),
]
MADE = [
    made("synthesis.json is a link to zero", linked("/dev/zero", "made/synthesis.json")),
    made("synthesis.json is a pipe", fifo("made/synthesis.json")),
    made("synthesis.json of 1 TB", sparse("made/synthesis.json", 1 << 40)),
    made("synthesis.json is nested", written("made/synthesis.json", DEEP)),
    described("a billion batches", lambda entries: entries["rounds"][0].update(num_batches=10**9)),
    described("a million rounds", lambda entries: entries.update(rounds=entries["rounds"] * 10**6)),
    described("files elsewhere", lambda e: e.update(sha256={"../../PWNED": "0" * 64, "/etc/passwd": "0" * 64}), _BATCH),
    described("a file that is a pipe", lambda e: e.update(sha256={"pipe": "0" * 64}), _BATCH),
    made("an image is a link to zero", lambda folder: linked("/dev/zero", _image(folder))(folder)),
    made("an image is a pipe", lambda folder: fifo(_image(folder))(folder)),
    made("an image of 1 TB", lambda folder: sparse(_image(folder), 1 << 40)(folder)),
]


def _of_a_terabyte(folder: Path) -> None:
    sparse("c.zarr/id/c/0", 1 << 40)(folder)
    forge(folder, _appended(id_bytes=1 << 40))


def _image(folder: Path) -> str:
    return str(sorted((folder / "made/images").rglob("*.png"))[0].relative_to(folder))
