"""Zero-shot teachers, written views, synthesized images and imported answers in object storage, while requests fail."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logitcache.cache.cache import open_cache
from logitcache.classifier import Classifier
from logitcache.cli.app import main
from logitcache.config.recipe import dump_recipe, load_recipe
from logitcache.errors import MismatchError
from logitcache.stage_one.materialize import materialize as module
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.stage_one.synthesize.synthesize import synthesize
from logitcache.store.mirrors_folder import FOLDER
from logitcache.views.datasets.image_folder import ImageFolder
from tests.cache.made import Linear, contents, recipe, teacher, write_images
from tests.objects import Bucket, bucket
from tests.stage_one.synthesized import PREPROCESSING, learner, synthesis
from tests.stage_one.test_import_targets import KEPT, answered, imported, views, write_npz
from tests.stage_one.test_storage import QUICK


@pytest.fixture(scope="module")
def served() -> Iterator[Bucket]:
    with bucket() as found:
        yield found


@pytest.fixture
def store(served: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """Storage of which every tenth request fails, and copies of its caches in a folder of the test."""
    monkeypatch.setenv(FOLDER, str(tmp_path / "copies"))
    served.front.fail(0.1, *QUICK, seed=11)
    return served


def test_views_are_written_to_storage_and_of_caches_that_lie_there(
    store: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", 3 * 3 * 4 * 4)
    folder = {"kind": "image_folder", "root": str(write_images(tmp_path / "images", {"a": 7})), "labelled": False}
    file = tmp_path / "r.yaml"
    changes: dict[str, Any] = {"dataset": folder, "shard_rows": 4}
    model = {"kind": "custom", "factory": "tests.cache.made:Linear"}
    cache = f"{store.url}/views.zarr"
    file.write_text(dump_recipe(recipe(cache, **changes, teachers={"t": teacher(model=model)})))  # type: ignore[arg-type]
    quick = ["--num-workers", "0"]
    assert main(["materialize", str(file), str(tmp_path / "here"), *quick]) == 0
    assert len(contents(tmp_path / "here")) == 2 * 3 + 1
    for part in ("2/2", "1/2"):
        assert main(["materialize", str(file), f"{store.url}/there", "--part", part, *quick]) == 0
    assert store.contents("there") == contents(tmp_path / "here")
    assert main(["precompute", str(file)]) == 0
    assert main(["materialize", cache, f"{store.url}/again", *quick]) == 0
    assert store.contents("again") == contents(tmp_path / "here")
    assert store.front.asked(failed=True)


def test_images_are_synthesized_into_storage_with_an_adaptive_round_and_read_from_there(
    store: Bucket, tmp_path: Path
) -> None:
    url, student = f"{store.url}/made", Classifier(learner(), PREPROCESSING)
    for part in ("2/2", "1/2"):
        synthesize(synthesis(), url, part=part)
    synthesize(synthesis(), tmp_path / "here")
    for out in (url, tmp_path / "here"):
        made = synthesize(synthesis(num_batches=1), out, student=student)
        assert (made.round, made.batches_written) == (1, 1)
    assert store.contents("made") == contents(tmp_path / "here")
    there = ImageFolder(root=f"{url}/images", mode="L").open()
    here = ImageFolder(root=str(tmp_path / "here/images"), mode="L").open()
    assert (list(there.ids), there.labels.tolist()) == (list(here.ids), here.labels.tolist())
    assert len(there.ids) == 30
    with pytest.raises(MismatchError, match="holds other images"):
        synthesize(synthesis(seed=1), url)
    assert store.front.asked(failed=True)


def test_answers_are_imported_into_storage_in_parts_and_its_card_says_when_it_is_whole(
    store: Bucket, tmp_path: Path
) -> None:
    write_npz(tmp_path / "a.npz", answered(views(tmp_path / "v", tmp_path / "x.zarr"), Linear(16)))
    kept = {**KEPT, "teachers": {"t": teacher(model=imported(tmp_path / "a.npz"))}}
    precompute(recipe(tmp_path / "here.zarr", **kept))
    url, file = f"{store.url}/imported.zarr", tmp_path / "r.yaml"
    file.write_text(dump_recipe(recipe(url, **kept)))  # type: ignore[arg-type]
    for number, state in ((2, "It is not finished: 3 of 6 shards."), (1, "The images are not in it.\n")):
        assert main(["precompute", str(file), "--part", f"{number}/2"]) == 0
        assert main(["card", url, "--out", str(tmp_path / f"{number}.md")]) == 0
        assert state in (tmp_path / f"{number}.md").read_text()
    assert store.contents("imported.zarr") == contents(tmp_path / "here.zarr")
    assert main(["verify", url]) == 0
    card = (tmp_path / "1.md").read_text()
    assert "# imported.zarr" in card
    assert '"whose": "a matrix", "pixels": "proven"' in card


def test_a_zero_shot_cache_in_storage_has_the_objects_of_one_on_a_disk_and_its_head(
    store: Bucket, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="CLIP needs the extra hf")
    from tests.models.hugging_face import write_clip

    write_clip(tmp_path / "clip")
    write_images(tmp_path / "images", {"a": 5}, side=36)
    model = {"kind": "transformers", "path": str(tmp_path / "clip"), "task": "zero_shot", "labels": ["cat", "dog"]}

    def plan(cache: object) -> PrecomputeRecipe:
        entries = {
            "cache": str(cache),
            "dataset": {"kind": "image_folder", "root": str(tmp_path / "images"), "labelled": False},
            "views": {"num_views": 2, "augmentations": [{"kind": "random_crop", "size": 32}]},
            "teachers": {"clip": {"model": model, "logits": {"kind": "head", "dtype": "float32"}}},
            "shard_rows": 3,
            "num_workers": 0,
            "device": "cpu",
        }
        return load_recipe(entries, PrecomputeRecipe)

    url = f"{store.url}/zero.zarr"
    for number in (1, 2):
        precompute(plan(url), part=f"{number}/2")
    precompute(plan(tmp_path / "c.zarr"))
    assert store.contents("zero.zarr") == contents(tmp_path / "c.zarr")
    assert main(["verify", url]) == 0
    found, expected = open_cache(url).head("clip"), open_cache(tmp_path / "c.zarr").head("clip")
    assert found is not None
    assert expected is not None
    assert np.array_equal(found[0], expected[0])
