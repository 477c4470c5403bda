"""A step is tried on copies before the first: what fails in training mode, or on the smallest batch, fails there."""

import itertools
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from logitcache.config.recipe import dump_recipe
from logitcache.errors import RecipeError
from logitcache.report.recipe_check import check_recipes
from logitcache.runtime import console
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.student import training, trial
from logitcache.student.lesson import Lesson
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe, TeacherRecipe, TrainingRecipe
from logitcache.targets import Batch
from logitcache.views.datasets import open_dataset
from logitcache.views.epochs import EpochLoader
from logitcache.views.spec import Views, ViewSpec
from tests.student.featured import LOSSES, fill_featured
from tests.student.small import DROPOUT, recipe, student, teacher, weights

NUM_IMAGES = 33
HERE = "tests.student.test_trial"
SHUFFLENET = {"kind": "torchvision", "name": "shufflenet_v2_x0_5", "weights": None}
GOOGLENET = {"kind": "torchvision", "name": "googlenet", "weights": None, "options": {"init_weights": False}}


class Noise:
    """33 images of 32 x 32 in colour."""

    classes = ("a", "b", "c")

    def __init__(self, count: int = NUM_IMAGES) -> None:
        drawn = np.random.default_rng(0)
        self._pixels = drawn.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(self._pixels[index]), index % 3


class Net(nn.Module):
    """Flat logits, by a layer that may normalise over the batch, be used in evaluation alone, or not be copied."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        self.kind = kind
        self.body, self.head, self.aside = nn.Linear(3072, 8), nn.Linear(8, 3), nn.Identity()
        self.norm = nn.BatchNorm1d(8)
        if kind == "locked":
            self.lock = threading.Lock()

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = self.body(pixels.flatten(1))
        if self.kind == "norm":
            hidden = self.norm(hidden)
        if self.kind == "nan":
            hidden = hidden / hidden.std(dim=0, correction=1) if self.training else hidden
        if not self.training:
            hidden = self.aside(hidden)
        if self.kind == "groups" and self.training and len(hidden) % 4:
            raise RuntimeError("groups of four")
        logits: Tensor = self.head(hidden)
        return logits


NOISE = {"kind": "custom", "factory": f"{HERE}:Noise"}


def _student(out: Path, cache: Path, **changes: Any) -> StudentRecipe:
    return student(out, cache, **{"dataset": NOISE, "epochs": 1} | changes)


def _net(kind: str) -> dict[str, Any]:
    return {"kind": "custom", "factory": f"{HERE}:Net", "arguments": {"kind": kind}}


@pytest.fixture(scope="module")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trial") / "cache.zarr"
    entry = {
        "preprocessing": {"mean": [0.5] * 3, "std": [0.5] * 3},
        "features": {"hidden": {"kind": "pooled", "tap": "body"}},
    }
    entries: dict[str, Any] = {"dataset": NOISE, "teachers": {"net": entry}}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net()
    precompute(recipe(PrecomputeRecipe, cache=str(path), num_workers=0, device="cpu", **entries), teachers={"net": net})
    return path


def _refused(tmp_path: Path, cache: Path, **changes: Any) -> str:
    """Return how training refuses a student; `recipe check` refuses it alike, and neither leaves a run."""
    entry = _student(tmp_path / "run", cache, **changes)
    with pytest.raises(RecipeError) as refused:
        train(entry)
    assert not (tmp_path / "run").exists()
    assert _checked(tmp_path, entry) == str(refused.value)
    return str(refused.value)


def _checked(tmp_path: Path, entry: TrainingRecipe) -> str | None:
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_recipe(entry))
    (checked,) = check_recipes([file])
    return checked.error


def _fixes(error: str) -> list[dict[str, Any]]:
    """The changes that an error proposes, as keys and values."""
    return [yaml.safe_load(fix) for fix in error.rpartition("Fix: ")[2].split(", or ")]


def test_a_last_batch_of_one_is_refused_where_the_model_normalises_by_batch(coloured: Path, tmp_path: Path) -> None:
    error = _refused(tmp_path, coloured, model=SHUFFLENET)
    assert "33 images in batches of 32 leave a batch of 1" in error
    assert "more than 1 value per channel" in error
    assert _fixes(error) == [{"drop_last": True}, {"batch_size": 33}]
    for number, fix in enumerate(_fixes(error)):
        fixed = _student(tmp_path / f"run{number}", coloured, **{"model": SHUFFLENET} | fix)
        assert _checked(tmp_path, fixed) is None
        assert train(fixed).steps == 1


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch_size": 16, "micro_batches": 5}, "33 images in batches of 16 for 5 micro_batches leave a batch of 1"),
        ({"batch_size": 33, "micro_batches": 33}, "33 images in batches of 33 for 33 micro_batches leave a batch of 1"),
        ({"batch_size": 1}, "33 images in batches of 1 leave a batch of 1"),
    ],
)
@pytest.mark.parametrize("kind", ["norm", "nan"])
def test_every_fix_that_is_proposed_trains(
    kind: str, changes: dict[str, Any], text: str, coloured: Path, tmp_path: Path
) -> None:
    error = _refused(tmp_path, coloured, model=_net(kind), **changes)
    assert text in error
    fixes = _fixes(error)
    assert fixes
    for number, fix in enumerate(fixes):
        result = train(_student(tmp_path / f"run{number}", coloured, model=_net(kind), **changes | fix))
        assert result.loss > 0


def test_auxiliary_outputs_in_training_mode_are_refused(coloured: Path, tmp_path: Path) -> None:
    error = _refused(tmp_path, coloured, model=GOOGLENET, batch_size=33)
    assert "fails in training mode" in error
    assert "GoogLeNetOutputs" in error
    fix = yaml.safe_load(re.findall(r"model.options: (\{.*?\})", error)[0])
    fixed = _student(
        tmp_path / "run", coloured, model=GOOGLENET | {"options": {"init_weights": False} | fix}, batch_size=33
    )
    assert _checked(tmp_path, fixed) is None


def test_a_tap_that_fires_in_evaluation_alone_is_refused(coloured: Path, tmp_path: Path) -> None:
    hint = {"kind": "hint", "feature": "hidden", "student": "aside"}
    error = _refused(tmp_path, coloured, model=_net("plain"), losses=[{"kind": "kl_divergence"}, hint])
    assert "in training mode with losses.1 (hint)" in error
    assert "the tap 'aside' did not fire" in error


def test_a_model_is_judged_by_the_batches_that_it_will_see(
    coloured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows are tried first: what fails there, and not on a real batch, is taken."""
    monkeypatch.setattr(trial, "_PIXELS", 1)
    assert "groups of four" in _refused(tmp_path, coloured, model=_net("groups"))
    assert train(_student(tmp_path / "run", coloured, model=_net("groups"), drop_last=True)).steps == 1


def test_a_model_that_cannot_be_copied_is_trained(
    coloured: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    console.configure()
    result = train(_student(tmp_path / "run", coloured, model=_net("locked")))
    console.configure(quiet=True)
    assert result.steps == 2
    assert "the model cannot be copied" in capfd.readouterr().err


def test_the_trial_changes_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    featured = fill_featured(tmp_path / "cache")
    found = {}
    for name in ("tried", "untried"):
        if name == "untried":
            monkeypatch.setattr(training, "require_trainable", lambda *options: None)
        dropout = train(student(tmp_path / name / "dropout", cache, model=DROPOUT, ema=0.9, epochs=1))
        every = train(student(tmp_path / name / "featured", featured, losses=LOSSES, epochs=1))
        labels = train(teacher(tmp_path / name / "labels", mixing=[{"kind": "mixup"}]))
        found[name] = [weights(run) for run in (dropout, every, labels)]
    assert found["tried"] == found["untried"]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(("views_per_image", "mixes"), [(1, False), (2, False), (1, True)])
def test_the_smallest_batch_is_that_of_the_loop(drop_last: bool, views_per_image: int, mixes: bool) -> None:
    mixing: dict[str, Any] = {"mixing": [{"kind": "mixup"}]} if mixes else {}
    spec = recipe(ViewSpec, num_views=2, **mixing)
    for count, batch_size, micro_batches, processes in itertools.product((33, 34, 9), (4, 8, 10), (1, 2, 3), (1, 2)):
        options = {"batch_size": batch_size, "drop_last": drop_last, "views_per_image": views_per_image}
        try:
            loaders = [
                EpochLoader(Views(open_dataset(Noise(count)), spec), rank=rank, world_size=processes, **options)
                for rank in range(processes)
            ]
        except RecipeError:  # a process without a part, or no batch
            continue
        batches = [keys for loader in loaders for keys in loader.keys(0)]
        seen = [len(micro) for keys in batches for micro in _batch(len(keys)).parts(micro_batches)]
        entry = recipe(
            TeacherRecipe,
            **{"out": "run", "model": SHUFFLENET, "dataset": {"kind": "bundled"}, "epochs": 2},
            **options,
            micro_batches=micro_batches,
        )
        lesson = Lesson(3, (3, 32, 32), count, torch.zeros(3), np.zeros(1, np.int64), mixes)
        assert trial.smallest_batch(entry, lesson, processes) == min(seen)


def _batch(rows: int) -> Batch:
    return Batch(torch.zeros(rows, 1), torch.zeros(rows), torch.zeros(rows, 2), {})
