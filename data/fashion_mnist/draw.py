"""Draw the bundled images from the full Fashion-MNIST: python draw.py ROOT

ROOT is where torchvision keeps, or will download, its data sets. Of each class the images with the
smallest sha256 of "split/position" are taken, and all are put in the order of that digest: no
random generator, so any machine draws the same ones.
"""

import hashlib
import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST

PER_CLASS = {"train": 500, "test": 200}
HERE = Path(__file__).parent


def main(root: str) -> None:
    """Write train.npz and test.npz beside this file."""
    for split, per_class in PER_CLASS.items():
        full = FashionMNIST(root, train=split == "train", download=True)
        images, labels = full.data.numpy(), full.targets.numpy()
        index = drawn(split, labels, per_class)
        write(
            HERE / f"{split}.npz",
            images=images[index],
            labels=labels[index].astype(np.uint8),
            index=index.astype(np.int32),
        )


def drawn(split: str, labels: np.ndarray, per_class: int) -> np.ndarray:
    """Return the positions of a class-balanced sample, in a shuffled order."""
    order = sorted(range(len(labels)), key=lambda place: hashlib.sha256(f"{split}/{place}".encode()).digest())
    taken = dict.fromkeys(range(10), 0)
    positions = []
    for place in order:
        label = int(labels[place])
        if taken[label] < per_class:
            taken[label] += 1
            positions.append(place)
    return np.array(positions)


def write(path: Path, **arrays: np.ndarray) -> None:
    """Write an npz without the time and the system, so that equal arrays give equal bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3
            archive.writestr(entry, buffer.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
