"""Students on one stream: each is bit for bit the student alone, and what decides batches decides who shares them."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from logitcache.student.training_recipes import StudentRecipe
from logitcache.sweeps.cells import members_of
from logitcache.sweeps.groups import groups_of
from logitcache.views.spec import Views
from tests.student.featured import LOSSES, ON_FEATURES
from tests.student.small import DROPOUT, LINEAR, metrics, weights
from tests.student.test_trackers import scalars
from tests.sweeps.small import CODE, VALIDATION, alone, assert_same, run, swept

KL, CE = {"kind": "kl_divergence"}, {"kind": "cross_entropy"}
CELLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"losses": [KL | {"temperature": 4}]},
    "scheduled": {"losses": [KL | {"temperature": {"kind": "linear", "start": 4, "stop": 1, "epochs": 2}}]},
    "dynamic": {"losses": [KL | {"temperature": {"kind": "dynamic", "start": 2, "step": 0.1, "min": 1, "max": 4}}]},
    "dkd": {"losses": [{"kind": "dkd"}]},
    "labels": {"losses": [CE], "optimizer": {"kind": "sgd"}},
    "dropout": {"model": DROPOUT, "losses": [KL, CE]},
    "stochastic_depth": {"model": CODE | {"factory": CODE["factory"] + "stochastic_depth"}},
    "ema": {"ema": 0.8, "optimizer": {"kind": "sgd"}, "validation": VALIDATION},
    "longer": {"model": LINEAR, "epochs": 3, "validation": VALIDATION | {"every": 2}},
    "shorter": {"epochs": 1, "clip_norm": 0.1},
    "parts": {"micro_batches": 3, "model": DROPOUT},
    "other_parts": {"micro_batches": 3, "losses": [KL | {"temperature": 4}], "checkpoint_steps": 3},
    "bfloat16": {"precision": "bfloat16", "channels_last": True},
    "best": {"keep": "best", "validation": VALIDATION},
    "tracked": {"trackers": [{"kind": "tensorboard"}]},
}


@pytest.fixture(scope="module")
def many(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of all cells."""
    out = tmp_path_factory.mktemp("many")
    result = run(cache, out, cells=CELLS)
    assert result.finished == len(CELLS)
    # The longest has three epochs of 200 images: all were on one stream.
    assert result.images_rendered == 3 * 200
    assert result.images_trained == (2 * (len(CELLS) - 2) + 3 + 1) * 200
    return out / "runs"


@pytest.mark.parametrize("cell", CELLS)
def test_a_student_beside_others_is_the_student_alone(cell: str, many: Path, tmp_path: Path) -> None:
    beside = many / f"{cell},seed=0"
    alone(beside, tmp_path / "alone")
    assert_same(beside, tmp_path / "alone")


def test_students_have_trackers_of_their_own_which_change_nothing(many: Path) -> None:
    runs = {name: many / f"{name},seed=0" for name in ("tracked", "plain")}
    assert weights(runs["tracked"]) == weights(runs["plain"])
    points = scalars(runs["tracked"] / "tensorboard")["loss"]
    assert [step for step, _ in points] == [row["step"] for row in metrics(runs["tracked"])]
    assert not (runs["plain"] / "tensorboard").exists()


def test_losses_that_train_adapters_share_a_stream_with_others(featured: Path, tmp_path: Path) -> None:
    cells = {kind: {"losses": [{"kind": kind, **fields}]} for kind, fields in ON_FEATURES.items()}
    cells |= {"labels": {"losses": [CE]}, "all": {"losses": LOSSES}}
    result = run(featured, tmp_path / "out", cells=cells)
    assert result.images_rendered == 2 * 200
    for cell in cells:
        alone(tmp_path / f"out/runs/{cell},seed=0", tmp_path / cell)
        assert_same(tmp_path / f"out/runs/{cell},seed=0", tmp_path / cell)


def test_seeds_of_one_order_share_a_stream(cache: Path, tmp_path: Path) -> None:
    student = {"model": DROPOUT, "order_seed": 7}
    result = run(cache, tmp_path / "out", student=student, seeds=3)
    assert result.images_rendered == 2 * 200
    runs = [tmp_path / f"out/runs/student,seed={seed}" for seed in range(3)]
    assert len({weights(one) for one in runs}) == 3
    alone(runs[2], tmp_path / "alone")
    assert_same(runs[2], tmp_path / "alone")


def test_seeds_have_orders_of_their_own_by_default(cache: Path, tmp_path: Path) -> None:
    result = run(cache, tmp_path / "out", seeds=[0, 5])
    assert result.images_rendered == result.images_trained == 2 * 2 * 200
    assert "an order of images of its own" in result.orders
    stated = run(cache, tmp_path / "stated", seeds=[0, 5], student={"order_seed": 5})
    assert "order_seed 5" in stated.orders
    five = [tmp_path / f"{out}/runs/student,seed=5" for out in ("out", "stated")]
    assert weights(five[0]) == weights(five[1])
    assert metrics(five[0]) == metrics(five[1])
    zero = [weights(tmp_path / f"{out}/runs/student,seed=0") for out in ("out", "stated")]
    assert zero[0] != zero[1]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_workers_that_render_ahead_change_nothing(cache: Path, tmp_path: Path) -> None:
    student = {"num_workers": 2, "start_method": "fork", "model": DROPOUT}
    run(cache, tmp_path / "ahead", student=student, seeds=2, grid={"losses.0.temperature": [1, 4]})
    run(cache, tmp_path / "here", student={"model": DROPOUT}, seeds=2, grid={"losses.0.temperature": [1, 4]})
    for one in (tmp_path / "here/runs").iterdir():
        assert_same(one, tmp_path / "ahead/runs" / one.name)


def test_validation_images_are_rendered_once_for_all(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered: Counter[int] = Counter()
    render = Views.__getitems__

    def counted(self: Views, keys: Any) -> Any:
        rendered[len(self.dataset.ids)] += len(keys)
        return render(self, keys)

    monkeypatch.setattr(Views, "__getitems__", counted)
    run(cache, tmp_path / "one", student={"validation": VALIDATION})
    one = rendered[100]
    rendered.clear()
    run(cache, tmp_path / "four", student={"validation": VALIDATION}, grid={"losses.0.temperature": [1, 2, 3, 4]})
    assert rendered[100] == one + 3 * 8, "each student is tried on eight images when it is built"


@pytest.mark.parametrize(
    ("grid", "groups"),
    [
        ({"losses.0.temperature": [1, 2], "model.width": [4, 8], "epochs": [2, 4], "precision": ["float32"]}, [8]),
        ({"optimizer.lr": [0.1, 0.2], "batch_size": [32, 64]}, [2, 2]),
        ({"num_views": [1, 2], "drop_last": [False, True]}, [1, 1, 1, 1]),
        ({"sampling": [{"kind": "every_image"}, {"kind": "class_balanced"}]}, [1, 1]),
        ({"views_per_image": [1, 2]}, [1, 1]),
    ],
)
def test_what_decides_batches_decides_who_shares_them(
    grid: dict[str, Any], groups: list[int], cache: Path, tmp_path: Path
) -> None:
    members = members_of(swept(cache, grid=grid), tmp_path)
    found = groups_of(members, None, True, _never)
    assert [len(group.members) for group in found] == groups
    assert [len(group.members) for group in groups_of(members[:3], 2, True, _never)][:1] == [min(2, groups[0])]


def test_another_cache_has_its_own_stream(cache: Path, featured: Path, tmp_path: Path) -> None:
    members = members_of(swept(cache, grid={"cache": {"one": str(cache), "other": str(featured)}}), tmp_path)
    assert [[member.cell for member in group.members] for group in groups_of(members, None, True, _never)] == [
        ["cache=one"],
        ["cache=other"],
    ]


def _never(recipe: StudentRecipe, error: Exception) -> None:
    raise AssertionError(f"{recipe.out}: {error}")
