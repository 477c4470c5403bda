"""Views that other code has a part in: nothing of the user's runs unnamed, no other release goes unnoticed."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from logitcache.cache.cache import open_cache
from logitcache.errors import RecipeError, ReplayMismatchError
from logitcache.report.verify_and_repair import verify
from logitcache.views.keys import ViewKey
from tests.cache.made import Linear, Pixels, forge, run, write_images

calls: list[int] = []
FACTORY = "tests.cache.test_locks:speckled"


def speckled() -> Any:
    """Make a transform that draws from torch's generator."""

    def apply(image: Tensor) -> Tensor:
        calls.append(1)
        return image ^ torch.randint(0, 2, image.shape, dtype=torch.uint8)

    return apply


def views_with(**augmentation: Any) -> dict[str, Any]:
    return {"num_views": 2, "seed": 3, "augmentations": [augmentation]}


CUSTOM = views_with(kind="custom", factory=FACTORY)


def test_a_function_of_the_views_runs_only_where_the_user_names_it(tmp_path: Path) -> None:
    run(tmp_path / "c.zarr", Pixels(40), views=CUSTOM)
    opened = open_cache(tmp_path / "c.zarr")
    calls.clear()
    for factories in ((), ("tests.cache.made:Pixels",), (FACTORY + "2",), f"x{FACTORY}x"):
        with pytest.raises(RecipeError, match=rf'call functions of a user.s own code: \["{FACTORY}"\]'):
            opened.views(Pixels(40), factories=factories)
    assert not calls
    for views in (
        opened.views(Pixels(40), factories=[FACTORY]),
        opened.loader(dataset=Pixels(40), factories=[FACTORY]).views,
    ):
        assert views[ViewKey(1, 7)].shape == (3, 4, 4)
    assert calls


def test_verify_calls_them_only_where_they_are_named(tmp_path: Path) -> None:
    path, root = tmp_path / "c.zarr", write_images(tmp_path / "images", {"a": 20})
    run(path, None, Linear(1), views=CUSTOM, dataset={"kind": "image_folder", "root": str(root)})
    calls.clear()
    found = verify(path)
    assert (found.images, found.problems, calls) == ("not compared", (), [])
    assert FACTORY in str(found.note)
    assert verify(path, [f"factories=['{FACTORY}']"]).images == "the same"


def test_verify_never_opens_a_data_set_by_a_function_that_the_cache_names(tmp_path: Path) -> None:
    run(tmp_path / "c.zarr", Pixels(20))
    forge(tmp_path / "c.zarr", lambda m: m.update(dataset={"kind": "custom", "factory": "os:abort", "arguments": {}}))
    with pytest.raises(RecipeError):
        verify(tmp_path / "c.zarr", ["factories=[]"])


def test_transforms_are_locked_to_the_release_that_the_cache_was_made_with(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    run(path, Pixels(40), views=views_with(kind="torchvision", name="RandomVerticalFlip"))
    open_cache(path).views(Pixels(40))
    forge(path, lambda m: m["views"]["augmentations"][0].update(torchvision_version="0.1.2"))
    opened = open_cache(path)
    with pytest.raises(
        ReplayMismatchError, match=r"torchvision's RandomVerticalFlip: torchvision 0\.1\.2, here "
    ) as no:
        opened.views(Pixels(40))
    assert "Fix: install that release" in str(no.value)
    with pytest.warns(UserWarning, match="locked to another release"):
        opened.views(Pixels(40), "numeric")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened.views(Pixels(40), "off")
