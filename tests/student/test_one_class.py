"""A softmax over one class is 1 whatever the logit is: losses that take one refuse, the others train."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from logitcache.config.recipe import dump_recipe
from logitcache.errors import RecipeError
from logitcache.report.recipe_check import check_recipes
from logitcache.student import losses
from logitcache.student.training import train
from tests.student.small import fill, student, teacher

ONE = {"kind": "custom", "factory": "tests.student.small:linear", "arguments": {"num_classes": 1}}
LABELS = torch.zeros(3, dtype=torch.long)
SOFTMAX: dict[str, Callable[[Tensor], Tensor]] = {
    "kl_divergence": lambda z: losses.kl_divergence(z, z),
    "standardize": losses.standardize,
    "cross_entropy": lambda z: losses.cross_entropy(z, LABELS),
    "dkd": lambda z: losses.dkd(z, z, LABELS),
    "nkd": lambda z: losses.nkd(z, z, LABELS),
    "wsld": lambda z: losses.wsld(z, z, LABELS),
    "dist": lambda z: losses.dist(z, z),
}
KINDS = ("kl_divergence", "cross_entropy", "dkd", "nkd", "wsld", "dist")


class OneLogit(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3))[:, None] * 3


class OneClass:
    """Images of one class, or without labels."""

    num_classes: int | None = 1

    def __init__(self, label: int = 0, count: int = 40) -> None:
        self._label, self._count = label, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.full((1, 28, 28), index * 5, dtype=torch.uint8), self._label


@pytest.fixture(scope="module")
def one_class(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("one") / "cache.zarr"
    return fill(path, {"net": OneLogit()}, images=OneClass(), views={"num_views": 1})


@pytest.mark.parametrize("name", SOFTMAX)
def test_a_softmax_of_one_class_is_refused_and_the_loss_for_it_named(name: str) -> None:
    with pytest.raises(RecipeError, match=r"1 class is constant.*Fix: multi_label_kl.*binary_cross_entropy"):
        SOFTMAX[name](torch.ones(3, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_of_a_softmax_on_one_class_is_refused_before_the_first_step(
    one_class: Path, tmp_path: Path, kind: str
) -> None:
    recipe = student(tmp_path / "run", one_class, model=ONE, losses=[{"kind": kind}], dataset=ENTRY)
    with pytest.raises(RecipeError, match=rf"softmax over 1 class.*losses\.0 \({kind}\).*Fix: multi_label_kl"):
        train(recipe)
    assert not (tmp_path / "run").exists()


ENTRY = {"kind": "custom", "factory": "tests.student.test_one_class:OneClass"}


def test_the_check_of_a_recipe_names_it_and_its_fix_trains(one_class: Path, tmp_path: Path) -> None:
    recipe = student(tmp_path / "run", one_class, model=ONE, dataset=ENTRY)
    file = tmp_path / "student.yaml"
    file.write_text(dump_recipe(recipe))
    (checked,) = check_recipes([file])
    assert checked.error is not None
    fix = re.search(r"Fix: (\w+)", checked.error)
    assert fix is not None
    changed = student(tmp_path / "run", one_class, model=ONE, dataset=ENTRY, losses=[{"kind": fix[1]}])
    assert train(changed).loss > 0


def test_labels_of_one_class_train_no_teacher(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"softmax over 1 class.*losses\.0 \(cross_entropy\)"):
        train(teacher(tmp_path / "run", model=ONE, dataset=ENTRY))


@pytest.mark.parametrize("function", [losses.multi_label_kl, losses.mean_squared_error])
def test_losses_without_a_softmax_train_one_logit(function: Any) -> None:
    z = torch.ones(3, 1, requires_grad=True)
    function(z, torch.zeros(3, 1)).backward()
    assert z.grad is not None
    assert (z.grad > 0).all()
