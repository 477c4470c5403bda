"""Predict the classes of images by a run, or by a file that was exported from one."""

from collections.abc import Sequence
from pathlib import Path

import torch

from logitcache.errors import RecipeError
from logitcache.shipping.exported import is_exported, open_exported
from logitcache.student.evaluation.predict import Prediction, Predictor, predict_images
from logitcache.views.datasets.images.image_files import Orientation


def predict(
    model: str | Path,
    images: Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    top: int = 5,
    batch_size: int = 32,
    orientation: Orientation | None = None,
) -> tuple[Prediction, ...]:
    """Predict the classes of images: files, folders (with all images below them) and URLs.

    `model` is a run or an exported ONNX file. Images are transformed as in the run's evaluation; with equal batches,
    the logits are those of `evaluate`. `orientation`: whether the EXIF orientation is applied; by default as for the
    run's validation images. `overrides` such as device=cpu change a run's recipe; a file has none. An image that cannot
    be read does not stop the others. Raises RecipeError for a model that cannot be loaded.
    """
    return predict_images(open_predictor(model, overrides, orientation, batch_size), images, top, batch_size)


def open_predictor(
    model: str | Path, overrides: Sequence[str] = (), orientation: Orientation | None = None, batch_size: int = 1
) -> Predictor:
    """Open a run or an exported ONNX file to predict with; raises as `predict`."""
    path = Path(model)
    if not is_exported(path):
        return Predictor.open(path, overrides, orientation, batch_size)
    if overrides:
        raise RecipeError(f"'{path}' has no recipe for {overrides[0]!r} to change. Fix: leave it out, or name a run")
    exported = open_exported(path)
    metadata = exported.metadata
    return Predictor(
        name=str(path),
        logits=exported.session(),
        transform=exported.transform,
        class_names=metadata.evaluation.class_names,
        device=torch.device("cpu"),
        is_multi_label=metadata.multi_label,
        orientation=orientation or metadata.orientation,
    )
