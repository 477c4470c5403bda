"""Pairings: those that tests/cache/test_paired_images.py spoils, and records that name other places."""

from pathlib import Path
from typing import Any

from hostile_cases.common import DAMAGED, OK, OTHER, USAGE, Case, Prepare
from hostile_cases.datasets import fifo, folder_of, plant_pickles, sparse, tv
from hostile_cases.stores import DEEP, linked, written
from tests.cache.test_paired_images import DAMAGE, forged

_READERS = ("verify pairing", "train pairing")
_REFUSED = dict.fromkeys(_READERS, (USAGE, DAMAGED, OTHER))


def pairing(name: str, prepare: Prepare, **ends: tuple[int, ...]) -> Case:
    """Spoil a pairing."""
    codes = {**_REFUSED, **{name.replace("_", " "): codes for name, codes in ends.items()}}
    return Case("pairing", name, prepare, codes, _READERS, _READERS)


def record(name: str, plant: Prepare = lambda folder: None, **changes: Any) -> Case:
    """Let a record state something else; `plant` puts files into the working directory."""

    def prepare(folder: Path) -> None:
        plant(folder)
        forged(folder / "pairs", lambda entries: entries.update(changes))

    return pairing(name, prepare, verify_pairing=(OK, USAGE, DAMAGED, OTHER))  # it reports images that are not there


PAIRINGS = [
    *(pairing(name, lambda folder, spoil=spoil: spoil(folder / "pairs")) for name, spoil in DAMAGE.items()),
    pairing("the record is a link to zero", linked("/dev/zero", "pairs/pairing.json")),
    pairing("the record of 1 TB", sparse("pairs/pairing.json", 1 << 40)),
    pairing("the record is nested", written("pairs/pairing.json", DEEP)),
    pairing("rows of 1 TB", sparse("pairs/rows", 1 << 40)),
    pairing("canaries of 1 TB", sparse("pairs/canaries", 1 << 40)),
    pairing("canaries are a link to zero", linked("/dev/zero", "pairs/canaries")),
    record("images in a folder of pipes", fifo("planted/a/0.png"), dataset=folder_of("planted")),
    record("images at a URL", dataset=folder_of("https://192.0.2.1/images")),
    record("pickles", plant_pickles, dataset=tv("EMNIST")),
    record("code", dataset={"kind": "custom", "factory": "os:abort", "arguments": {}}),
    record("views of 16,384 pixels", image_shape=[3, 16_384, 16_384]),
    record("16,384 channels", image_shape=[16_384, 8, 8]),
]
