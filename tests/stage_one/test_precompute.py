"""Precompute: what it writes, how it continues, and what does not change a byte."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcache.cache.cache import open_cache
from logitcache.cache.write.writer_locks import alone, preparing, writing
from logitcache.config.recipe import load_recipe
from logitcache.errors import RecipeError
from logitcache.models import Classifier, Preprocessing, save_weights
from logitcache.models.small_cnn import small_cnn
from logitcache.report.recipe_check import check_recipes
from logitcache.runtime import console
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.store.local import LocalStore
from logitcache.views.datasets import ImageFolder
from logitcache.views.keys import ViewKey
from tests.cache.made import (
    DENSE32,
    FLIP_AND_CROP,
    TOP2,
    TRIED,
    Linear,
    Pixels,
    contents,
    raw,
    recipe,
    run,
    stamps,
    teacher,
)
from tests.stage_one.runs import NUM_IMAGES, entry, folder, partial, whole


def test_the_result_counts_what_was_done(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "c.zarr"
    result = run(path, Pixels(NUM_IMAGES), shard_rows=128)
    assert (result.cache, result.shards, result.shards_written) == (str(path), 6, 6)
    assert (result.row_views, result.teacher_passes) == (600, 600 + TRIED)
    assert result.bytes == sum(len(data) for data in contents(path).values())
    assert result.seconds > 0


def test_a_complete_cache_says_that_there_is_nothing_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole(tmp_path / "c.zarr")
    before = stamps(tmp_path)
    console.configure()
    try:
        result = run(tmp_path / "c.zarr", Pixels(NUM_IMAGES), shard_rows=128)
    finally:
        console.configure(quiet=True)
    assert "is complete, there is nothing to do" in capsys.readouterr().err
    assert (result.shards, result.shards_written, result.row_views, result.teacher_passes) == (6, 0, 0, TRIED)
    assert stamps(tmp_path) == before


def test_a_run_continues_where_another_stopped(tmp_path: Path) -> None:
    partial(tmp_path / "c.zarr")
    done = [name for name in contents(tmp_path / "c.zarr") if name.startswith("t.logits.commits/c.")]
    assert done == ["t.logits.commits/c.0.0.0.0"]
    before = stamps(tmp_path / "c.zarr")
    result = run(tmp_path / "c.zarr", Pixels(NUM_IMAGES), shard_rows=128)
    assert (result.shards, result.shards_written, result.row_views) == (6, 5, 600 - 128)
    after = stamps(tmp_path / "c.zarr")
    kept = ("t.logits.commits/c.0.0.0.0", "t.logits/c.0.0.0", "t.logits.errors/c.0.0.0.0")
    assert all(after[name] == before[name] for name in kept)
    assert contents(tmp_path / "c.zarr") == whole(tmp_path / "w.zarr")
    assert sorted(os.listdir(tmp_path)) == ["c.zarr", "w.zarr"]


def test_labels_are_kept_and_may_be_absent(tmp_path: Path) -> None:
    run(tmp_path / "l.zarr", Pixels(50, num_classes=16))
    run(tmp_path / "u.zarr", Pixels(50))
    assert np.array_equal(open_cache(tmp_path / "l.zarr").labels, np.arange(50) % 16)
    assert np.array_equal(open_cache(tmp_path / "u.zarr").labels, np.full(50, -1))


def test_teachers_of_different_class_counts_share_unlabelled_images(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    teachers = {"few": teacher(TOP2), "many": teacher(DENSE32)}
    result = precompute(
        recipe(path, teachers=teachers), teachers={"few": Linear(5), "many": Linear(33)}, dataset=Pixels(60)
    )
    assert (result.row_views, result.teacher_passes) == (120, 2 * (120 + TRIED))
    rows = open_cache(path).rows([ViewKey(0, 59)])
    assert (rows["few"].num_classes, rows["few"].keeps_logits) == (5, False)
    assert (rows["many"].logits.shape, rows["many"].keeps_logits) == ((1, 33), True)


def test_an_empty_directory_may_become_a_cache(tmp_path: Path) -> None:
    (tmp_path / "c.zarr").mkdir()
    run(tmp_path / "c.zarr", Pixels(20))
    assert open_cache(tmp_path / "c.zarr").complete
    assert os.listdir(tmp_path) == ["c.zarr"]


def test_a_worker_that_outlives_its_parent_holds_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    (go_on, end), (began, begin) = os.pipe(), os.pipe()
    partial(path)
    store = LocalStore(path)
    with preparing(store), writing(store):
        child = os.fork()
        if child == 0:
            os.close(end)
            os.write(begin, b"x")  # by now it has closed what it inherited
            os.read(go_on, 1)
            os._exit(0)
        os.read(began, 1)
    try:
        with preparing(store):
            assert alone(store)
    finally:
        os.close(end)
        os.waitpid(child, 0)
        for descriptor in (go_on, began, begin):
            os.close(descriptor)


def test_a_lower_precision_is_close_and_recorded(tmp_path: Path) -> None:
    network = small_cnn(4, 1, 16, 3)
    dataset = Pixels(60, side=8)
    views = {"num_views": 1}
    for precision in ("float32", "bfloat16"):
        path = tmp_path / precision
        teachers = {"t": teacher(DENSE32, precision=precision)}
        run(path, dataset, network, teachers=teachers, views=views)
        assert open_cache(path).manifest.teachers["t"].precision == precision
    keys = [ViewKey(0, index) for index in range(60)]
    [full], [half] = (raw(open_cache(tmp_path / p).rows(keys)["t"].compact) for p in ("float32", "bfloat16"))
    assert not np.array_equal(full, half)
    np.testing.assert_allclose(full, half, atol=0.05)


def test_workers_and_batches_do_not_change_a_byte(tmp_path: Path) -> None:
    expected = whole(tmp_path / "plain")
    for number, changes in enumerate(
        (
            {"num_workers": 2, "start_method": "fork"},
            {"batch_size": 1},
            {"batch_size": 7},
            {"batch_size": 128},
            {"batch_size": 10_000},
            {"num_workers": 2, "start_method": "fork", "batch_size": 33},
        )
    ):
        assert whole(tmp_path / str(number), **changes) == expected


def test_workers_that_are_started_afresh_write_the_same_bytes(tmp_path: Path) -> None:
    expected = whole(tmp_path / "plain")
    assert whole(tmp_path / "other", num_workers=1, start_method="forkserver") == expected


def test_the_callers_module_stays_trainable(tmp_path: Path) -> None:
    module = Linear()
    run(tmp_path / "c.zarr", Pixels(20), module)
    assert module.weight.requires_grad
    assert module.weight.grad is None


def test_global_random_states_are_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr,index]
    run(tmp_path / "c.zarr", Pixels(20))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[union-attr,index]


def test_the_manifest_names_no_object_that_was_passed_in_place_of_an_entry(tmp_path: Path) -> None:
    root = folder(tmp_path / "images")
    named = {"t": teacher(model={"kind": "small_cnn"})}
    run(tmp_path / "c.zarr", Pixels(40), dataset=entry(root), teachers=named)
    manifest = open_cache(tmp_path / "c.zarr").manifest
    assert manifest.dataset is None
    assert manifest.teachers["t"].model is None
    run(tmp_path / "d.zarr", ImageFolder(root=str(root)), Linear(2))
    assert open_cache(tmp_path / "d.zarr").manifest.dataset == ImageFolder(root=str(root))


def test_weights_in_a_file_take_their_classes_from_the_labels(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", small_cnn(4, 1, 3, 3))
    model = {
        "kind": "checkpoint",
        "path": str(tmp_path / "w.safetensors"),
        "model": {"kind": "small_cnn", "width": 4},
    }
    plan = recipe(tmp_path / "c.zarr", teachers={"t": teacher(model=model)}, views={"num_views": 1})
    precompute(plan, dataset=Pixels(40, num_classes=3, side=8))
    assert open_cache(tmp_path / "c.zarr").manifest.teachers["t"].num_classes == 3


BARE = {"views": {"num_views": 2, "seed": 3, "augmentations": FLIP_AND_CROP}, "batch_size": 50, "num_workers": 0}


def test_objects_need_no_entries(tmp_path: Path) -> None:
    bare = load_recipe({"cache": str(tmp_path / "bare"), "device": "cpu", **BARE}, PrecomputeRecipe)
    module = Classifier(Linear(), Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3))
    precompute(bare, teachers={"t": module}, dataset=Pixels(70))
    run(tmp_path / "named", Pixels(70))
    assert contents(tmp_path / "bare") == contents(tmp_path / "named")


def test_a_module_whose_normalisation_nobody_knows_is_refused_and_the_fix_helps(tmp_path: Path) -> None:
    entries = {"cache": str(tmp_path / "c"), "device": "cpu", **BARE}
    with pytest.raises(RecipeError, match=r"Fix: .*teachers\.t\.preprocessing: \{mean: .*lc\.Classifier\(module"):
        precompute(load_recipe(entries, PrecomputeRecipe), teachers={"t": Linear()}, dataset=Pixels(70))
    fix = ["teachers.t.preprocessing={mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}"]
    precompute(load_recipe(entries, PrecomputeRecipe, fix), teachers={"t": Linear()}, dataset=Pixels(70))


def test_a_recipe_of_no_teachers_is_refused(tmp_path: Path) -> None:
    bare = load_recipe({"cache": str(tmp_path / "c"), **BARE}, PrecomputeRecipe)
    with pytest.raises(RecipeError, match=r"names no teachers\. Fix: give `teachers:`, or pass the modules"):
        precompute(bare, dataset=Pixels(70))
    file = tmp_path / "precompute.yaml"
    file.write_text("cache: c.zarr\ndataset: {kind: bundled}\nviews: {num_views: 2}\n")
    (checked,) = check_recipes([file])
    assert (checked.command, "names no teachers" in str(checked.error)) == ("precompute", True)
