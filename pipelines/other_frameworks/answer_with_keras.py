"""Run a Keras model on the views that `materialize --format npz` wrote: MODEL VIEWS ANSWERS.

Existing files of answers are kept, so the same command continues. The model takes float images [B, H, W, C] of 0 to
255 and returns logits; put its own preprocessing, or the logarithm of its probabilities, here.
"""

import os
import sys
from pathlib import Path

import keras
import numpy as np

BATCH = 256


def answer(model: keras.Model, views: Path, answers: Path) -> None:
    """Write the logits of every file of views, with the keys and checksums that it has."""
    answers.mkdir(exist_ok=True)
    for file in sorted(views.glob("*.npz")):
        if (answers / file.name).exists():
            continue
        rows = np.load(file)
        images = np.moveaxis(rows["pixels"], 1, 3).astype(np.float32)
        logits = np.asarray(model.predict(images, batch_size=BATCH, verbose=0))
        part = answers / f"{file.stem}.part"
        with open(part, "wb") as stream:
            np.savez(stream, key=rows["key"], crc32=rows["crc32"], logits=logits)
        os.replace(part, answers / file.name)  # a file that is there is whole


if __name__ == "__main__":
    answer(keras.saving.load_model(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
