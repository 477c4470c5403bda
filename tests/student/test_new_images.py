"""Students of a cache to which images are appended: a run continues on those that it began with."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from logitcache.cache.snapshot import open_snapshot
from logitcache.errors import MismatchError, RecipeError
from logitcache.student.training import train
from tests.stage_one.test_new_images import FIRST, MIXED, NEW, add, grow
from tests.student.small import metrics, student, weights
from tests.student.test_growth import stopped

LOSS = [{"kind": "kl_divergence"}]
MODEL = {"kind": "custom", "factory": "tests.cache.made:Linear", "arguments": {"num_classes": 2}}


def learning(root: Path, out: str, cache: str, **changes: Any) -> Any:
    place = {"kind": "image_folder", "root": str(root / "images")}
    changes = {"model": MODEL, "losses": LOSS, "dataset": place, "batch_size": 20, "epochs": 3} | changes
    return student(root / out, root / cache, checkpoint_steps=1, **changes)


@pytest.fixture(scope="module", params=["alone", "mixed"])
def steps(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 90 images, the same of 106, and the same of 114, and a folder of all that they have."""
    root, views = tmp_path_factory.mktemp("steps"), {"views": MIXED} if request.param == "mixed" else {}
    add(root / "images", FIRST)
    grow(root / "90", root / "images", "t", **views)
    train(learning(root, "whole-90", "90"))
    for count in (106, 114):
        shutil.copytree(root / ("90" if count == 106 else "106"), root / str(count))
        grow(root / str(count), add(root / "images", NEW[: count - 90]), "t", **views)
        if count == 106:
            train(learning(root, "whole-106", "106"))
    return root


@pytest.mark.parametrize("count", ["90", "106"])
def test_a_run_continues_bit_by_bit_on_the_images_that_it_began_with(count: str, steps: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(steps, tmp_path / "w", symlinks=True))
    if count == "90":  # whose folder had no others
        shutil.copytree(root / "images", root / "all")
        for name in NEW[:24]:
            (root / "images" / name).unlink()
    stopped(learning(root, "run", count), 7)
    if count == "90":
        shutil.rmtree(root / "images")
        (root / "all").rename(root / "images")
    train(learning(root, "run", "114"), resume=True)
    assert weights(root / "run") == weights(steps / f"whole-{count}")
    assert metrics(root / "run") == metrics(steps / f"whole-{count}")


def test_a_run_that_begins_on_a_grown_cache_learns_from_all(steps: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(steps, tmp_path / "w"))
    train(learning(root, "run", "114"))
    assert weights(root / "run") != weights(steps / "whole-106")
    with pytest.raises(MismatchError, match="has 106 images and began with 90, not 114"):
        train(learning(root, "run", "106"), resume=True)


def test_images_that_are_not_in_the_cache_yet_are_left_out(steps: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(steps, tmp_path / "w"))
    train(learning(root, "run", "106"))
    assert weights(root / "run") == weights(steps / "whole-106")


def test_students_leave_out_images_that_are_gone(steps: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(steps, tmp_path / "w"))
    gone = ["cat/007.png", NEW[3]]
    for name in gone:
        (root / "images" / name).unlink()
    mixed = bool(open_snapshot(root / "114").manifest.views.mixing)
    with pytest.raises(MismatchError, match=r"(?s)2 of its 114 images are missing.*Fix: .*`without: missing`"):
        train(learning(root, "run", "114"))
    if mixed:
        with pytest.raises(RecipeError, match=r"mixes each image with another.*Fix: put the images back"):
            train(learning(root, "run", "114", without="missing"))
        return
    with pytest.raises(MismatchError, match=r"(?s)1 of its 114 images are missing.*'cat/a03.png'"):
        train(learning(root, "run", "114", without=gone[:1]))
    with pytest.raises(RecipeError, match=r"has no image 'cat/x.png'. Fix"):
        train(learning(root, "run", "114", without=["cat/x.png"]))
    result = train(learning(root, "run", "114", without="missing"))
    assert result.images == 3 * 112
    train(learning(root, "named", "114", without=gone))
    assert weights(root / "named") == weights(root / "run")
    stopped(learning(root, "more", "114", without="missing"), 7)
    (root / "images/cat/008.png").unlink()
    with pytest.raises(MismatchError, match="these differ: without"):
        train(learning(root, "more", "114", without="missing"), resume=True)


def test_left_out_images_do_not_hide_changed_ones(steps: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(steps, tmp_path / "w"))
    (root / "images/cat/007.png").unlink()
    shutil.copy(root / "images/cat/001.png", root / "images/cat/002.png")
    with pytest.raises((MismatchError, RecipeError), match=r"content of 1 differ: 'cat/002.png'|mixes each"):
        train(learning(root, "run", "114", without="missing"))


def test_a_cache_that_never_grew_keeps_no_ids_to_leave_out(steps: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"keeps no ids of its images.*Fix: put the missing images back"):
        train(learning(steps, str(tmp_path / "run"), "90", without="missing"))
    for changes in ({"validation": {"split": 0.3}}, {"pairing": str(tmp_path)}):
        with pytest.raises(RecipeError, match=r"without leaves out images of the cache.*Fix"):
            train(learning(steps, str(tmp_path / "run"), "114", without="missing", **changes))


@pytest.mark.parametrize("measured", ["held out", "another cache"])
def test_a_run_is_measured_on_the_images_that_it_began_with(measured: str, steps: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(steps, tmp_path / "w"))
    if open_snapshot(root / "106").manifest.views.mixing:
        return  # which measures nothing
    place = {"kind": "image_folder", "root": str(root / "images")}
    validation = {"split": 0.3} if measured == "held out" else {"cache": str(root / "v"), "dataset": place}
    for name in ("v", "c"):
        shutil.copytree(root / "106", root / name)
    train(learning(root, "whole", "c", validation=validation))
    stopped(learning(root, "run", "c", validation=validation), 7)
    for name in ("v", "c"):
        shutil.rmtree(root / name)
        shutil.copytree(root / "114", root / name)
    train(learning(root, "run", "c", validation=validation), resume=True)
    assert metrics(root / "run") == metrics(root / "whole")
