"""Students of mixed views, of views that share a decode, and of caches that prove every image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from logitcache.cache.cache import open_cache
from logitcache.errors import MismatchError, RecipeError, ReplayMismatchError
from logitcache.student.training import train
from logitcache.student.training_data import open_training_data
from logitcache.teacher.online import live_targets
from logitcache.views.datasets import Bundled
from logitcache.views.keys import ViewKey
from tests.student import small
from tests.student.small import AUGMENTATIONS, fill, network, recorded_losses, student, teacher

MIXING = [{"kind": "mixup", "p": 0.5}, {"kind": "cutmix", "p": 0.5}]
SHAKE = {"kind": "custom", "factory": "tests.views.shaking:Shake", "arguments": {"strength": 9}}


def views(num_views: int = 2, **entries: Any) -> dict[str, Any]:
    return {"num_views": num_views, "seed": 3, "augmentations": AUGMENTATIONS, **entries}


@pytest.fixture(scope="module")
def mixed(caches: Path) -> Path:
    return fill(caches / "mixed", views=views(mixing=MIXING))


@pytest.fixture(scope="module")
def linear(caches: Path) -> Path:
    return fill(caches / "linear", views=views(mixing=MIXING, targets="linear"))


def test_fifty_steps_on_mixed_images_are_fifty_steps_online(mixed: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "batch_size": 20,
        "epochs": 5,
        "losses": [{"kind": "kl_divergence"}, {"kind": "cross_entropy", "label_smoothing": 0.1, "weight": 0.5}],
    }
    with recorded_losses() as cached:
        train(student(tmp_path / "cached", mixed, **changes))
    with recorded_losses() as live:
        targets = live_targets(str(mixed), "cpu", modules={"net": network()})
        train(student(tmp_path / "online", mixed, **changes), live=targets)
    assert len(cached) == len(live) == 50
    assert np.abs(np.array(cached) - np.array(live)).max() <= 1e-6
    a, b = (load_file(tmp_path / name / "weights.safetensors") for name in ("cached", "online"))
    assert max(float((a[name] - b[name]).abs().max()) for name in a) <= 1e-6


def test_micro_batches_of_mixed_labels_sum_to_the_whole(mixed: Path, tmp_path: Path) -> None:
    losses = [{"kind": "cross_entropy"}, {"kind": "kl_divergence"}]
    found = []
    for count in (1, 3):
        out = tmp_path / str(count)
        train(student(out, mixed, model=small.LINEAR, losses=losses, micro_batches=count, optimizer={"kind": "sgd"}))
        found.append(load_file(out / "weights.safetensors"))
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


def test_a_teacher_learns_from_mixed_labels(tmp_path: Path) -> None:
    result = train(teacher(tmp_path / "run", mixing=MIXING, epochs=2))
    assert result.images == 400
    assert np.isfinite(result.loss)


@pytest.mark.parametrize("kind", ["dkd", "nkd", "wsld"])
def test_losses_of_one_label_are_refused_on_mixed_images(mixed: Path, tmp_path: Path, kind: str) -> None:
    with pytest.raises(RecipeError, match=rf"losses.1 \({kind}\) needs one label an image, .* are mixed. Fix"):
        train(student(tmp_path / "run", mixed, losses=[{"kind": "kl_divergence"}, {"kind": kind}]))


def test_students_learn_from_linear_targets(linear: Path, tmp_path: Path) -> None:
    result = train(student(tmp_path / "run", linear, losses=[{"kind": "kl_divergence", "temperature": 2.0}]))
    assert np.isfinite(result.loss)


@pytest.mark.parametrize(
    ("changes", "live", "text"),
    [
        ({"losses": [{"kind": "mean_squared_error"}]}, False, "mixes probabilities .*Fix: kl_divergence"),
        ({}, True, "which no live teacher gives. Fix: leave out --online"),
        ({"views_per_image": 2}, False, "with mixing each view brings another partner"),
    ],
)
def test_what_linear_targets_cannot_serve_is_refused(
    linear: Path, tmp_path: Path, changes: Any, live: bool, text: str
) -> None:
    with pytest.raises(RecipeError, match=text):
        train(student(tmp_path / "run", linear, **changes), live=(lambda images: {}) if live else None)


def test_mixed_images_are_no_measure(cache: Path, mixed: Path, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="mixed images, which have no one label"):
        train(student(tmp_path / "run", cache, validation={"cache": str(mixed)}))


def test_views_that_share_a_decode_are_each_learnt_from_once(caches: Path, tmp_path: Path) -> None:
    cache = fill(caches / "four", views=views(4))
    result = train(student(tmp_path / "run", cache, views_per_image=2, epochs=4))
    assert (result.images, result.steps) == (800, 28)
    loader = open_cache(cache).loader(batch_size=32, views_per_image=2)
    seen = [ViewKey(*key) for epoch in range(4) for batch in loader.epoch(epoch) for key in batch.keys.tolist()]
    assert sorted(seen) == [ViewKey(view, index) for view in range(4) for index in range(200)]


def test_epochs_that_use_images_unequally_are_refused(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make epochs a multiple of 2"):
        student(tmp_path / "run", cache, views_per_image=2, epochs=3)


def test_every_image_is_compared_where_its_checksum_is_recorded(caches: Path, tmp_path: Path) -> None:
    cache = fill(caches / "checked", row_checksums=True)
    train(student(tmp_path / "fine", cache))
    honest, images = (Bundled.model_validate(small.IMAGES).open() for _ in range(2))
    canaries = {canary.index for canary in open_cache(cache).manifest.canaries}
    changed = next(index for index in range(200) if index not in canaries)

    class Other(type(images)):  # type: ignore[misc]
        """The same files, one of which comes out differently."""

        def read(self, index: int) -> torch.Tensor:
            image: torch.Tensor = super().read(index)
            return image.clone().fill_(7) if index == changed else image

        def digests(self) -> Any:
            return honest.digests()

    images.__class__ = Other
    for verify, fails in {"strict": True, "numeric": False}.items():
        loader = open_cache(cache).loader(batch_size=50, dataset=images, verify=verify)
        if fails:
            with pytest.raises(ReplayMismatchError, match=f"image '{images.ids[changed]}' .*CRC-32"):
                list(loader.epoch(0))
        else:
            assert len(list(loader.epoch(0))) == 4


def test_recorded_parameters_are_replayed(caches: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = fill(caches / "recorded", views=views(mixing=MIXING), record_parameters=True)
    train(student(tmp_path / "planned", cache))
    monkeypatch.setattr("logitcache.views.augmentations.flip.bernoulli", lambda words, p: words % 2 == 0)
    with pytest.raises(ReplayMismatchError, match="replay the parameters that this cache keeps"):
        train(student(tmp_path / "refused", cache))
    train(student(tmp_path / "recorded", cache, replay="recorded"))
    assert small.weights(tmp_path / "recorded") == small.weights(tmp_path / "planned")


def test_functions_of_a_cache_are_called_only_where_the_user_names_them(caches: Path, tmp_path: Path) -> None:
    cache = fill(caches / "shaken", views={"num_views": 2, "augmentations": [*AUGMENTATIONS, SHAKE]})
    with pytest.raises(RecipeError, match=r'factories: \["tests.views.shaking:Shake"\]'):
        train(student(tmp_path / "refused", cache))
    train(student(tmp_path / "run", cache, factories=["tests.views.shaking:Shake"]))


def test_drift_within_wider_limits_is_accepted_when_numeric(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "logitcache.views.augmentations.flip.HorizontalFlip.apply",
        lambda self, pixels, params: (
            torch.where(torch.from_numpy(params[:, 0]).bool()[:, None, None, None], pixels.flip(-1), pixels) // 2 * 2
        ),
    )
    entries = {"verify": "numeric", "validation": None}
    tight = {"mean": 0.1, "max": 16}
    with pytest.raises(ReplayMismatchError, match=r"more than numeric drift \(limits 0.1 / 16\)"):
        train(student(tmp_path / "tight", cache, drift_limits=tight, **entries))
    with pytest.warns(UserWarning, match=r"numeric drift \(limits 0.9 / 1\)"):
        train(student(tmp_path / "wide", cache, drift_limits={"mean": 0.9, "max": 1}, **entries))


def test_a_run_on_labels_that_was_begun_by_the_first_plan_keeps_it(tmp_path: Path) -> None:
    """The first release did not record the plan of a run; new ones take the newest for CutMix."""
    entry = teacher(tmp_path / "run", mixing=[{"kind": "cutmix"}])
    new = open_training_data(entry).identity(entry)
    assert new["plan_version"] == 2
    begun = {"dataset": new["dataset"]}
    assert open_training_data(entry, begun=begun).identity(entry) == begun
    assert open_training_data(entry, begun=new).identity(entry) == new
    mixup = teacher(tmp_path / "run", mixing=[{"kind": "mixup"}])
    assert "plan_version" not in open_training_data(mixup).identity(mixup)
