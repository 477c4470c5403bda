"""Write a split of the bundled images at half their size: SPLIT FOLDER.

A file is named as its image: `logitcache pair … --by stem` finds it.
"""

import sys
from pathlib import Path

from PIL import Image

from logitcache.views.datasets.bundled import Bundled


def halve(split: str, folder: Path, **images: object) -> None:
    """Write PNG files of 14 x 14 pixels; `images` are further keys of the data set."""
    dataset = Bundled.model_validate({"split": split, **images}).open()
    for index, name in enumerate(dataset.ids):
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(dataset.read(index)[0].numpy())
        image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX).save(file)


if __name__ == "__main__":
    halve(sys.argv[1], Path(sys.argv[2]))
