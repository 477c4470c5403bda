"""Options without effect are refused with their fix, before anything is opened; what was begun with them goes on."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from logitcache.config.recipe import dump_recipe, load_recipe, require_effect
from logitcache.errors import RecipeError
from logitcache.report.recipe_check import check_recipes
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe
from logitcache.views.spec import ViewSpec
from tests.student.small import GREY, IMAGES, LINEAR, fill, network, recipe, student, teacher

EPOCHS = 4
KL = {"kind": "kl_divergence"}
LINEAR_ZERO = {"kind": "linear", "start": 0, "stop": 0}
DYNAMIC = {"kind": "dynamic", "start": 2.0, "step": 0.5, "min": 2.0, "max": 2.0}
STUDENTS: list[tuple[dict[str, Any], str]] = [
    ({"schedule": {"warmup_epochs": 5}}, r"schedule warms up beyond the run: warmup_epochs is 5, .*Fix: .*4 at most"),
    ({"losses": [KL, KL | {"weight": 0}]}, r"losses\.1 has weight 0 at all times.*Fix: "),
    ({"losses": [KL | {"weight": LINEAR_ZERO}]}, r"losses\.0 has weight 0"),
    ({"losses": [{"kind": "dkd", "alpha": 0, "beta": 0}]}, r"losses\.0 has alpha and beta 0"),
    ({"losses": [{"kind": "dist", "beta": 0, "gamma": 0}]}, r"losses\.0 has beta and gamma 0"),
    ({"losses": [KL | {"weight": {"kind": "warm_up", "value": 1, "epochs": 9}}]}, r"losses\.0\.weight warms up beyond"),
    (
        {"losses": [KL | {"temperature": {"kind": "linear", "start": 3, "stop": 3}}]},
        "starts where it stops",
    ),
    ({"losses": [KL | {"temperature": {"kind": "exponential", "start": 3, "decay": 1}}]}, "temperature never falls"),
    ({"losses": [KL | {"temperature": DYNAMIC}]}, "temperature has min equal to max"),
    ({"losses": [KL | {"temperature": {"kind": "by_confidence", "low": 2, "high": 2}}]}, "low equal to high"),
    ({"batch_size": 4, "micro_batches": 5}, "the recipe has micro_batches 5 of 4 images"),
    (
        {"losses": [KL | {"temperature": {"kind": "linear", "start": 3, "stop": 1, "epochs": 4.5}}]},
        r"losses\.0\.temperature goes on beyond the run: epochs is 4\.5, the run has 4 epochs\. Fix: epochs: 4 at most",
    ),
    (
        {"losses": [KL | {"weight": {"kind": "cosine", "start": 1, "stop": 2, "epochs": 9}}]},
        r"losses\.0\.weight goes on beyond the run",
    ),
    (
        {"ensembles": {"both": {"kind": "mean"}, "sure": {"kind": "by_entropy"}}, "losses": [KL | {"teacher": "both"}]},
        r"the recipe has ensembles \['sure'\], which no loss names\. Fix: ",
    ),
    ({"tap_layouts": {"layer1": "tokens"}}, r"the recipe has tap_layouts of \['layer1'\], the taps are \[\]\. Fix: "),
    (
        {"micro_batches": 999, "tap_layouts": {"layer1": "tokens"}},
        r"has micro_batches 999 of 32 images\. .*It has tap_layouts",
    ),
]
AUGMENTATIONS: list[tuple[dict[str, Any], str]] = [
    *(
        ({"kind": kind, "p": 0} | options, "p: 0 and is never applied. Fix: leave it out")
        for kind, options in (
            ("horizontal_flip", {}),
            ("random_grayscale", {}),
            ("random_erasing", {}),
            ("gaussian_blur", {"kernel_size": 3}),
            ("color_jitter", {"brightness": 0.4}),
        )
    ),
    ({"kind": "color_jitter"}, "changes nothing. Fix: give it brightness"),
    ({"kind": "color_jitter", "brightness": 0, "hue": [0, 0]}, "changes nothing"),
    ({"kind": "gaussian_blur", "kernel_size": 1}, "blurs nothing"),
    ({"kind": "random_erasing", "scale": [0, 0]}, "erases nothing"),
    ({"kind": "random_crop", "size": 28, "padding_mode": "reflect"}, "has padding: 0, and nothing is padded"),
    ({"kind": "random_crop", "size": 28, "fill": 9}, "has padding: 0, and nothing is padded"),
    (
        {"kind": "random_crop", "size": 28, "padding": 2, "padding_mode": "edge", "fill": 9},
        "pads by edge, which takes no fill",
    ),
]


def _student(**changes: Any) -> StudentRecipe:
    return student(Path("run"), Path("cache"), epochs=EPOCHS, **changes)


def _precompute(**views: Any) -> PrecomputeRecipe:
    entry = {"preprocessing": GREY.model_dump(mode="json")}
    return recipe(
        PrecomputeRecipe, cache="none.zarr", dataset=IMAGES, views=views, teachers={"net": entry}, device="cpu"
    )


@pytest.mark.parametrize(("changes", "text"), STUDENTS)
def test_a_student_of_such_options_is_refused_before_its_cache_is_opened(
    changes: dict[str, Any], text: str, tmp_path: Path
) -> None:
    refused = student(tmp_path / "run", tmp_path / "none.zarr", epochs=EPOCHS, **changes)
    with pytest.raises(RecipeError, match=text):
        train(refused)
    file = tmp_path / "student.yaml"
    file.write_text(dump_recipe(refused))
    (checked,) = check_recipes([file])
    assert re.search(text, checked.error or "")


@pytest.mark.parametrize(("entry", "text"), AUGMENTATIONS)
def test_views_of_such_augmentations_are_refused(
    entry: dict[str, Any], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=rf"views\.augmentations\.1 .*{text}"):
        precompute(_precompute(augmentations=[{"kind": "horizontal_flip"}, entry]), teachers={"net": network()})
    with pytest.raises(RecipeError, match=rf"^augmentations\.0 .*{text}"):
        train(teacher(tmp_path / "run", augmentations=[entry]))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixing_that_is_never_drawn_is_refused(kind: str) -> None:
    with pytest.raises(RecipeError, match=r"views\.mixing\.0 has p: 0"):
        require_effect(_precompute(mixing=[{"kind": kind, "p": 0}]))


def test_all_are_listed_at_once() -> None:
    changes: dict[str, Any] = {
        "losses": [KL | {"weight": 0}, KL],
        "schedule": {"warmup_epochs": 9},
        "micro_batches": 99,
    }
    with pytest.raises(RecipeError, match="3 options without effect") as caught:
        require_effect(_student(**changes), EPOCHS)
    assert all(text in str(caught.value) for text in ("losses.0", "schedule", "micro_batches"))


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": {"warmup_epochs": 4}},
        {"losses": [{"kind": "dkd", "alpha": 0}, {"kind": "nkd", "gamma": 0}]},
        {"losses": [KL | {"weight": {"kind": "linear", "start": 1, "stop": 0}}]},
        {"losses": [KL | {"weight": {"kind": "warm_up", "value": 1, "epochs": 4}}]},
        {"losses": [KL | {"temperature": {"kind": "linear", "start": 3, "stop": 1, "epochs": 4}}]},
        {"ensembles": {"both": {"kind": "mean"}}, "losses": [KL | {"teacher": "both"}]},
        {
            "losses": [{"kind": "hint", "feature": "maps", "student": "0"}],
            "validation": {"dataset": {"kind": "bundled"}, "taps": ["1"]},
            "tap_layouts": {"0": "tokens", "1": "channels_first"},
        },
        {"optimizer": {"kind": "sgd", "momentum": 0}},
    ],
)
def test_what_has_an_effect_is_taken(changes: dict[str, Any]) -> None:
    require_effect(_student(**changes), EPOCHS)


def test_nesterov_without_momentum_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    """By default it is on, and without momentum off: the recipe that a run stores is one that starts another."""
    asked = {"kind": "sgd", "momentum": 0, "nesterov": True}
    entries = _student().model_dump(mode="json") | {"optimizer": asked}
    with pytest.raises(RecipeError, match=r"optimizer has nesterov: true with momentum 0\. Fix: nesterov: false"):
        require_effect(load_recipe(entries, StudentRecipe), EPOCHS)
    file = tmp_path / "stored.yaml"
    file.write_text(dump_recipe(_student(optimizer={"kind": "sgd", "momentum": 0})))
    stored = load_recipe(file, StudentRecipe)
    assert stored.optimizer.model_dump()["nesterov"] is False
    require_effect(stored, EPOCHS)


def test_a_run_that_was_begun_with_such_an_option_goes_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = student(tmp_path / "run", cache, model=LINEAR, losses=[KL, KL | {"weight": 0}])
    with monkeypatch.context() as before:
        before.setattr("logitcache.student.training.require_effect", lambda recipe, epochs: None)
        train(begun)
    assert train(begun, resume=True).epochs == 2


def test_a_cache_of_such_views_opens_and_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    views = {"num_views": 1, "augmentations": [{"kind": "horizontal_flip", "p": 0}]}
    assert ViewSpec.model_validate_json(json.dumps(views)).num_views == 1
    with monkeypatch.context() as before:
        before.setattr("logitcache.stage_one.inputs.require_effect", lambda recipe: None)
        path = fill(tmp_path / "cache.zarr", views=views)
    fill(path, views=views | {"num_views": 2})
    assert train(student(tmp_path / "run", path, epochs=1)).loss > 0


def test_a_teacher_recipe_knows_its_epochs() -> None:
    wrong: TeacherRecipe = teacher(Path("run"), schedule={"warmup_epochs": 2})
    with pytest.raises(RecipeError, match="the run has 1 epochs"):
        require_effect(wrong, wrong.epochs)
