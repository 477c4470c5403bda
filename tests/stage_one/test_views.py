"""Stage one over mixed views and several views per decode: the teacher sees what a student will see."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from logitcache.cache.cache import open_cache
from logitcache.errors import DataError, RecipeError
from logitcache.logits import LinearLogits
from logitcache.models import Preprocessing
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views
from tests.cache.made import DENSE32, FLIP_AND_CROP, Linear, Pixels, contents, recipe, run, teacher
from tests.stage_one.runs import NUM_IMAGES, partial

MIXING = [{"kind": "mixup", "p": 0.5}, {"kind": "cutmix", "p": 0.5}]
HALF = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)


def views_of(num_views: int = 2, **entries: Any) -> dict[str, Any]:
    return {"num_views": num_views, "seed": 3, "augmentations": FLIP_AND_CROP, **entries}


def answers(images: torch.Tensor) -> torch.Tensor:
    """What the linear teacher says of uint8 images."""
    with torch.no_grad():
        found: torch.Tensor = Linear()((images / 255 - 0.5) / 0.5)
    return found


@pytest.mark.parametrize("views_per_image", [2, 3, 4])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cache_is_the_same_however_many_views_share_a_decode(
    tmp_path: Path, views_per_image: int, num_workers: int
) -> None:
    changes: dict[str, Any] = {"views": views_of(4), "shard_rows": 128, "start_method": "fork"}
    run(tmp_path / "one.zarr", Pixels(NUM_IMAGES), **changes)
    several = changes | {"views_per_image": views_per_image, "num_workers": num_workers}
    result = run(tmp_path / "several.zarr", Pixels(NUM_IMAGES), **several)
    assert (result.shards, result.shards_written, result.row_views) == (12, 12, 4 * NUM_IMAGES)
    assert contents(tmp_path / "several.zarr") == contents(tmp_path / "one.zarr")


class Counting(Pixels):
    """Images that count how often they are read."""

    reads = 0

    def __getitem__(self, index: int) -> Any:
        Counting.reads += 1
        return super().__getitem__(index)


def test_images_are_decoded_once_for_the_views_that_share_them(tmp_path: Path) -> None:
    reads = {}
    for views_per_image in (1, 4):
        Counting.reads = 0
        run(tmp_path / f"{views_per_image}.zarr", Counting(200), views=views_of(4), views_per_image=views_per_image)
        reads[views_per_image] = Counting.reads
    assert reads[1] - reads[4] == 3 * 200


def test_a_stopped_run_of_several_views_continues(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"views": views_of(3), "shard_rows": 128}
    partial(tmp_path / "c.zarr", batches=9, views_per_image=2, **changes)
    done = [name for name in contents(tmp_path / "c.zarr") if name.startswith("t.logits.commits/c.")]
    assert 0 < len(done) < 9
    run(tmp_path / "c.zarr", Pixels(NUM_IMAGES), views_per_image=3, **changes)
    run(tmp_path / "w.zarr", Pixels(NUM_IMAGES), **changes)
    assert contents(tmp_path / "c.zarr") == contents(tmp_path / "w.zarr")


@pytest.mark.parametrize("window", [None, 32])
def test_the_teacher_answers_the_mixed_images(tmp_path: Path, window: int | None) -> None:
    views = views_of(2, mixing=MIXING, pairing_window=window)
    images = Pixels(201)
    run(tmp_path / "c.zarr", images, views=views, teachers={"t": teacher(DENSE32)}, shard_rows=128)
    cache = open_cache(tmp_path / "c.zarr")
    keys = [ViewKey(view, index) for view in range(2) for index in range(201)]
    seen = cache.views(images).__getitems__(keys)
    logits = cache.rows(keys)["t"].logits
    assert torch.allclose(logits, answers(seen), atol=1e-5)
    plain = Views(cache.views(images).dataset, cache.manifest.views.model_copy(update={"mixing": ()}))
    assert not torch.allclose(logits, answers(plain.__getitems__(keys)), atol=0.1)


def test_partners_in_a_shard_are_decoded_once(tmp_path: Path) -> None:
    reads = {}
    for name, mixing in {"plain": {}, "mixed": {"mixing": MIXING, "pairing_window": 64}}.items():
        Counting.reads = 0
        run(tmp_path / name, Counting(256), views=views_of(2, **mixing), shard_rows=128, batch_size=32)
        reads[name] = Counting.reads
    assert reads["mixed"] - reads["plain"] <= 2 * 32 + 2, "only canaries, rendered twice, take partners from elsewhere"


def test_linear_targets_mix_the_answers_to_the_images_before_mixing(tmp_path: Path) -> None:
    images = Pixels(120)
    views = views_of(2, mixing=MIXING, targets="linear")
    run(tmp_path / "linear.zarr", images, views=views, teachers={"t": teacher(DENSE32)})
    run(tmp_path / "plain.zarr", images, views=views_of(2), teachers={"t": teacher(DENSE32)})
    linear, plain = open_cache(tmp_path / "linear.zarr"), open_cache(tmp_path / "plain.zarr")
    keys = [ViewKey(1, index) for index in range(120)]
    spec = linear.manifest.views
    mixture = spec.mixture(keys, spec.partners(120, 120), (4, 4))
    assert mixture is not None
    logits, own = linear.rows(keys)["t"].compact, plain.rows(keys)["t"].logits
    assert isinstance(logits, LinearLogits)
    for temperature in (1.0, 3.0):
        p = torch.softmax(own.double() / temperature, dim=1)
        share = torch.from_numpy(mixture.share)[:, None]
        expected = share * p + (1 - share) * p[torch.from_numpy(mixture.partners)]
        assert torch.allclose(logits.log_probs(temperature).double().exp(), expected, atol=1e-6)
    [batch] = linear.loader(batch_size=120, dataset=images).epoch(1)
    mixed = linear.views(images).__getitems__([ViewKey(*key) for key in batch.keys.tolist()])
    assert torch.equal(batch.images, mixed), "students see mixed images"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"views": views_of(4, mixing=MIXING), "views_per_image": 2}, "with mixing each view brings another partner"),
        ({"views": views_of(4, mixing=MIXING, targets="linear"), "row_checksums": True}, "a student sees others"),
        ({"teachers": {"views": teacher()}}, "another name"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_recipe(tmp_path: Path, changes: Any, text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        recipe(tmp_path / "c.zarr", **changes)


def _folder(root: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    for name, (height, width) in sizes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((height, width, 3), 9, np.uint8)).save(root / name)
    return root


@pytest.mark.parametrize(
    ("augmentations", "text"),
    [
        ([{"kind": "random_crop", "size": 8}], r"'ant/7\.png': random_crop to \(8, 8\) does not fit"),
        ([{"kind": "horizontal_flip"}], r"'ant/0\.png' gives \(9, 9\), 'ant/7\.png' gives \(6, 9\)"),
    ],
)
def test_an_image_of_a_wrong_size_is_named_before_any_is_decoded(
    tmp_path: Path, augmentations: Any, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _folder(tmp_path / "i", {f"ant/{n}.png": (6 if n == 7 else 9, 9) for n in range(10)})
    monkeypatch.setattr("logitcache.views.datasets.image_folder.FolderImages.read", lambda *_: pytest.fail("decoded"))
    entry = {"kind": "image_folder", "root": str(root)}
    with pytest.raises(DataError, match=text):
        run(tmp_path / "c.zarr", dataset=entry, views={"augmentations": augmentations})
    assert not (tmp_path / "c.zarr").exists()
