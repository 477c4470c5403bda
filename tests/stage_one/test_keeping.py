"""What stage one does with a batch: images are named by their ids, and their files left alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from logitcache.errors import DataError
from logitcache.views.datasets.image_folder import FolderImages
from tests.cache.made import COUNT, TRANSFORM, Linear, Pixels, run, teacher
from tests.stage_one.runs import entry, folder


class Outlier(Linear):
    """Answers one image far beyond all others, but not while encodings are fitted."""

    def __init__(self, image: np.ndarray[Any, Any], fitting: int) -> None:
        super().__init__()
        self.left = fitting
        self.image = (torch.from_numpy(image).permute(2, 0, 1) / 255 - 0.5) / 0.5

    def forward(self, images: Tensor) -> Tensor:
        self.left -= 1
        strange = torch.isclose(images, self.image, atol=1e-6).flatten(1).all(dim=1)
        return super().forward(images) * torch.where(strange & (self.left < 0), 1e12, 1.0)[:, None]


def test_an_image_whose_logits_do_not_fit_their_transform_is_named(tmp_path: Path) -> None:
    images = Pixels(COUNT)
    batches = 1 + COUNT // 50  # canaries, then the calibration rows
    with pytest.raises(DataError, match=r"^teacher 't', image '00123': .*that the transform was fitted to.*Fix: "):
        run(
            tmp_path / "c",
            images,
            Outlier(images.images[123], batches),
            views={"num_views": 1},
            teachers={"t": teacher(TRANSFORM)},
        )


def test_sizes_of_images_are_asked_for_once_whatever_the_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real = [0], FolderImages.sizes

    def counted(self: FolderImages) -> Any:
        asked[-1] += 1
        return real(self)

    monkeypatch.setattr(FolderImages, "sizes", counted)
    root = folder(tmp_path / "images")
    for number, size in enumerate((40, 4)):
        run(tmp_path / str(number), None, Linear(2), dataset=entry(root), batch_size=size, record_parameters=True)
        asked.append(0)
    assert asked[0] == asked[1] > 0
