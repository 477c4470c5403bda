"""The escape hatch: any transform, by key, with the global generators left alone."""

import json
import random
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import AutoAugmentPolicy, v2

from logitcache.errors import RecipeError
from logitcache.views.augmentations.foreign import Custom, Torchvision, foreign_transforms
from logitcache.views.canaries import take
from logitcache.views.keys import ViewKey
from logitcache.views.loader import ViewLoader
from logitcache.views.spec import Views, ViewSpec
from tests.views.images import Images, textured
from tests.views.planning import image_of, plan_one

ELASTIC = Torchvision(name="ElasticTransform", options={"alpha": 40.0, "sigma": 1.0})
SHAKE = Custom(factory="tests.views.shaking:Shake", arguments={"strength": 30})
FOREIGN = [
    ELASTIC,
    SHAKE,
    Torchvision(name="AutoAugment", options={"policy": "cifar10"}),
    Torchvision(name="RandomPerspective", options={"p": 1.0, "interpolation": "nearest"}),
    Torchvision(name="RandomPhotometricDistort"),
]
every = pytest.mark.parametrize("augmentation", FOREIGN, ids=lambda one: getattr(one, "name", one.kind))


def states() -> tuple[object, ...]:
    name, words, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), (name, words.tolist(), *rest), random.getstate()


def spec_of(*augmentations: Any) -> ViewSpec:
    return ViewSpec(num_views=3, seed=5, augmentations=augmentations)


@every
def test_pixels_depend_on_the_key_alone(augmentation):
    views = Views(Images(textured(12, 20, 24)), spec_of(augmentation))
    keys = [ViewKey(view, index) for view in range(3) for index in range(12)]
    together = views.__getitems__(keys)
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        backwards = views.__getitems__(keys[::-1])
        assert torch.equal(backwards.flip(0), together)
    assert torch.equal(views[keys[7]], together[7])
    assert len({image.numpy().tobytes() for image in together}) > 30, "views differ"


@every
@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_global_generators_are_left_alone(augmentation, num_workers):
    views = Views(Images(textured(6, 20, 24)), spec_of(augmentation))
    before = states()
    batches = [[ViewKey(0, index), ViewKey(1, index)] for index in range(6)]
    found = torch.cat(list(ViewLoader(views, num_workers, "fork").render(batches)))
    assert states() == before
    assert torch.equal(found, views.__getitems__([key for keys in batches for key in keys]))


def test_the_global_generators_are_put_back_when_a_transform_fails():
    views = Views(Images(textured(1, 8, 8)), spec_of(Custom(factory="tests.views.shaking:raising")))
    before = states()
    text = r"view 0 of image 'image 0': .*raising' failed on an image of shape \(3, 8, 8\): KeyError: 'no 3'"
    with pytest.raises(RecipeError, match=text):
        views[ViewKey(0, 0)]
    assert states() == before


def test_all_three_generators_are_seeded_with_words_of_their_own():
    params, _ = plan_one(SHAKE, [(4, 4)] * 500)
    assert params.shape == (500, 3)
    assert len(np.unique(params)) > 1490
    image = image_of(4, 4)
    shifts = {int((SHAKE.apply(image[None], row[None])[0] - image)[0, 0, 0]) for row in params[:200]}
    assert len(shifts) > 40


def test_the_pixels_are_those_of_torchvision_with_the_same_seed():
    image = image_of(20, 24)
    params, _ = plan_one(ELASTIC, [(20, 24)])
    found = ELASTIC.apply(image[None], params)[0]
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(int(params[0, 0]))
        expected = v2.ElasticTransform(alpha=40.0, sigma=1.0)(image)
    assert torch.equal(found, expected)


def test_options_may_be_enums_by_their_values():
    augmentation = Torchvision(name="AutoAugment", options={"policy": "svhn", "interpolation": "bilinear"})
    image = image_of(20, 24)
    params, _ = plan_one(augmentation, [(20, 24)])
    with torch.random.fork_rng():
        torch.default_generator.manual_seed(int(params[0, 0]))
        expected = v2.AutoAugment(AutoAugmentPolicy.SVHN, v2.InterpolationMode.BILINEAR)(image)
    assert torch.equal(augmentation.apply(image[None], params)[0], expected)


def test_a_transform_that_changes_the_size_says_so():
    halved = Custom(factory="tests.views.shaking:halved", size=(4, 5))
    assert Views(Images(textured(1, 8, 10)), spec_of(halved))[ViewKey(0, 0)].shape == (3, 4, 5)


@pytest.mark.parametrize(
    ("augmentation", "text"),
    [
        (Torchvision(name="Pad", options={"padding": 3}), r"\(3, 14, 14\), uint8 \(3, 8, 8\) was expected.*`size`"),
        (Torchvision(name="ToPILImage"), "returns a Image"),
        (Custom(factory="tests.views.shaking:halved"), r"'tests.views.shaking:halved' returns .*\(3, 4, 4\)"),
        (Custom(factory="tests.views.shaking:floating"), "returns torch.float32"),
        (Custom(factory="tests.views.shaking:nothing"), "returned a int. Fix: return a callable"),
        (Custom(factory="tests.views.shaking:no_such"), "has no 'no_such'"),
        (Custom(factory="tests.views.shaking:leaving"), "SystemExit: 3"),
    ],
)
def test_what_is_no_transform_of_images_is_refused(augmentation, text, capfd):
    views = Views(Images(textured(2, 8, 8)), spec_of(augmentation))
    with pytest.raises(RecipeError, match=text):
        list(ViewLoader(views, 1, "fork").render([[ViewKey(0, 0)]]))
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"kind": "torchvision", "name": "ElasticTransfrm"}, "Did you mean 'ElasticTransform'"),
        ({"kind": "torchvision", "name": "functional"}, "has no transform 'functional'"),
        ({"kind": "torchvision", "name": "ElasticTransform", "options": {"beta": 1}}, "these options: .*beta"),
        ({"kind": "custom", "factory": "tests.views.shaking.Shake"}, "factory"),
    ],
)
def test_what_is_wrong_with_a_transform_is_told_with_the_recipe(entry, text):
    with pytest.raises(ValueError, match=text):
        ViewSpec.model_validate_json(json.dumps({"augmentations": [entry]}))


def test_transforms_that_keep_something_between_images_are_refused():
    counting = Views(Images(textured(4, 8, 8)), spec_of(Custom(factory="tests.views.shaking:Counter")))
    with pytest.raises(RecipeError, match=r"tests\.views\.shaking:Counter' must do so from the global generators"):
        take(counting, [ViewKey(0, index) for index in range(4)])


def test_the_release_of_torchvision_is_part_of_the_stored_form():
    stored = json.loads(spec_of(ELASTIC, SHAKE).model_dump_json())
    stored["augmentations"][0]["torchvision_version"] = "0.1"
    spec = ViewSpec.model_validate_json(json.dumps(stored))
    assert spec.digest() != spec_of(ELASTIC, SHAKE).digest()
    first, second = foreign_transforms(spec.augmentations)
    assert (first.torchvision, first.factory) == ("0.1", None)
    assert second.factory == "tests.views.shaking:Shake"
    assert list(foreign_transforms(ViewSpec().augmentations)) == []
