"""Data sets of Hugging Face, written to disk here: the same images, ids, classes and fingerprint on every way."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from logitcache.cli.app import main
from logitcache.config.recipe import load_recipe
from logitcache.errors import DataError, LogitCacheError, MissingExtraError, RecipeError
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.store.mirrors_folder import FOLDER
from logitcache.student.training import train
from logitcache.student.training_recipes import StudentRecipe
from logitcache.views.datasets import ImageFolder
from logitcache.views.datasets.base import fingerprint
from logitcache.views.datasets.huggingface import HuggingFace
from tests.cache.made import contents
from tests.docs.world import COLOURED, HALF
from tests.models.hugging_face import write_classifier

datasets = pytest.importorskip("datasets", exc_type=ImportError)
pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

CLASSES = ("cat", "dog", "fish")
COUNT = 9


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of caches of the test's own; nothing is asked of a network."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def files() -> list[bytes]:
    """PNG files of several sizes."""
    generator, found = np.random.default_rng(0), []
    for number in range(COUNT):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (12 + number, 20 - number, 3), dtype=np.uint8)).save(file, "PNG")
        found.append(file.getvalue())
    return found


def rows(**more: Any) -> Any:
    """Rows with images, classes and names."""
    columns = {
        "image": [{"bytes": content, "path": None} for content in files()],
        "label": [number % 3 for number in range(COUNT)],
        "key": [f"k{number}" for number in range(COUNT)],
        "hot": [[number % 2, 1, -1] for number in range(COUNT)],
        **more,
    }
    made = datasets.Dataset.from_dict(columns)
    return made.cast_column("image", datasets.Image()).cast_column("label", datasets.ClassLabel(names=list(CLASSES)))


def parquet(folder: Path) -> None:
    folder.mkdir()
    rows().select(range(4)).to_parquet(folder / "train-00000-of-00002.parquet")
    rows().select(range(4, COUNT)).to_parquet(folder / "train-00001-of-00002.parquet")


def saved(folder: Path) -> None:
    rows().save_to_disk(folder)


def splits(folder: Path) -> None:
    datasets.DatasetDict({"train": rows(), "test": rows().select(range(2))}).save_to_disk(folder)


def arrow(folder: Path) -> None:
    folder.mkdir()
    rows().save_to_disk(folder.with_name("x"))
    next(folder.with_name("x").glob("*.arrow")).rename(folder / "train.arrow")


FORMS: dict[str, Callable[[Path], None]] = {"parquet": parquet, "saved": saved, "splits": splits, "arrow": arrow}


def of(folder: Path, **fields: Any) -> HuggingFace:
    return HuggingFace(path=str(folder), **{"split": "train", "label": "label", **fields})


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_images_ids_classes_and_bytes(form: str, tmp_path: Path) -> None:
    FORMS[form](tmp_path / "d")
    found = of(tmp_path / "d", split=None if form == "saved" else "train", id="key").open()
    assert list(found.ids) == [f"k{number}" for number in range(COUNT)]
    assert found.class_names == CLASSES
    assert found.labels.tolist() == [number % 3 for number in range(COUNT)]
    for number, content in enumerate(files()):
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        assert np.array_equal(found.read(number).permute(1, 2, 0).numpy(), expected)
    for number, content in enumerate(files()):
        (tmp_path / "folder" / CLASSES[number % 3]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / CLASSES[number % 3] / f"{number}.png").write_bytes(content)
    folder = ImageFolder(root=str(tmp_path / "folder")).open()
    # The same encoded bytes have the same digests, whatever holds them.
    assert sorted(found.digests().tolist()) == sorted(folder.digests().tolist())
    assert sorted(map(tuple, found.sizes().tolist())) == sorted(map(tuple, folder.sizes().tolist()))


def test_rows_are_named_by_split_and_number_without_a_column(tmp_path: Path) -> None:
    splits(tmp_path / "d")
    assert list(of(tmp_path / "d", split="test").open().ids) == ["test/00000", "test/00001"]


def test_a_fingerprint_is_remembered_and_is_of_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "a")
    first = fingerprint(of(tmp_path / "a").open())
    rows(label=[2] * COUNT).save_to_disk(tmp_path / "b")
    other = fingerprint(of(tmp_path / "b").open())
    assert (other.content, other.sizes) == (first.content, first.sizes)
    assert other.labels != first.labels
    changed = [*files()[:-1], files()[0]]
    rows(image=[{"bytes": content, "path": None} for content in changed]).save_to_disk(tmp_path / "c")
    assert fingerprint(of(tmp_path / "c").open()).content != first.content


def test_images_in_files_of_their_own_are_read_and_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, content in enumerate(files()):
        (tmp_path / "d" / CLASSES[number % 3]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / CLASSES[number % 3] / f"{number}.png").write_bytes(content)
    opened = of(tmp_path / "d").open()
    first, rows_of_files = fingerprint(opened), datasets.load_dataset(str(tmp_path / "d"), split="train")
    bare = rows_of_files.cast_column("image", datasets.Image(decode=False))
    assert {row["image"]["bytes"] for row in bare} == {None}
    assert opened.class_names == CLASSES
    (tmp_path / "d/cat/0.png").write_bytes(files()[1])
    monkeypatch.setattr(HuggingFace, "_rows", lambda entry: rows_of_files)  # as if `datasets` had not noticed
    assert fingerprint(of(tmp_path / "d").open()).content != first.content
    (tmp_path / "d/cat/0.png").unlink()
    with pytest.raises(DataError, match=r"row 'train/00000' .*No such file(.|\n)*Fix"):
        of(tmp_path / "d").open().read(0)


def test_labels_of_any_number_of_classes_and_none(tmp_path: Path) -> None:
    saved(tmp_path / "d")
    hot = of(tmp_path / "d", label="hot").open()
    assert (hot.labels.shape, hot.num_classes) == ((COUNT, 3), 3)
    none = of(tmp_path / "d", label=None).open()
    assert (none.labels.tolist(), none.num_classes, none.class_names) == ([-1] * COUNT, None, None)


def test_grey_mode_and_orientation_are_those_of_every_kind(tmp_path: Path) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(file, "JPEG", exif=exif)
    rows(image=[{"bytes": file.getvalue(), "path": None}] * COUNT).save_to_disk(tmp_path / "d")
    found = of(tmp_path / "d", mode="L", orientation="apply").open()
    assert found.read(0).shape == (1, 20, 10)
    assert found.sizes()[0].tolist() == [20, 10]
    assert len(of(tmp_path / "d").open().turned()) == COUNT


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"image": "imag"}, r"no column 'imag'.*image(.|\n)*Fix: dataset\.image"),
        ({"image": "key"}, r"holds .*not images(.|\n)*cast_column"),
        ({"label": "lable"}, r"no column 'lable'.*label(.|\n)*Fix"),
        ({"id": "keys"}, r"no column 'keys'"),
        ({"id": "label"}, "stands for two images"),
        ({"split": None}, r"the splits train, test, and no split is named(.|\n)*Fix: split: train"),
        ({"split": "tests"}, r"no split 'tests'.*test"),
        ({"name": "plain"}, "leave `name` out"),
        ({"split": "train[:4]"}, r"no split 'train\[:4\]'"),
        ({"revision": "v1"}, "leave `revision` out"),
        ({"label": "key"}, "no usable label"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_fix(fields: dict[str, Any], named: str, tmp_path: Path) -> None:
    splits(tmp_path / "d")
    with pytest.raises(LogitCacheError, match=named):
        fingerprint(of(tmp_path / "d", **fields).open())


def test_a_split_of_another_name_and_a_folder_of_nothing_are_refused(tmp_path: Path) -> None:
    parquet(tmp_path / "d")
    with pytest.raises(DataError, match=r"cannot be opened: .*tests(.|\n)*Fix"):
        of(tmp_path / "d", split="tests").open()
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"cannot be opened(.|\n)*Fix"):
        of(tmp_path / "empty").open()
    with pytest.raises(RecipeError, match=r"does not exist(.|\n)*hf://datasets/OWNER/NAME"):
        of(tmp_path / "none").open()


def test_rows_without_an_image_or_with_a_broken_one_are_named(tmp_path: Path) -> None:
    entries: list[Any] = [{"bytes": content, "path": None} for content in files()]
    rows(image=[*entries[:3], None, *entries[4:]]).save_to_disk(tmp_path / "d")
    with pytest.raises(DataError, match=r"row 'train/00003' .*has no image"):
        fingerprint(of(tmp_path / "d").open())
    rows(image=[*entries[:3], {"bytes": b"BM nothing", "path": None}, *entries[4:]]).save_to_disk(tmp_path / "e")
    with pytest.raises(DataError, match="row 'train/00003'"):
        fingerprint(of(tmp_path / "e").open())


def test_streams_are_refused_with_the_fix() -> None:
    with pytest.raises(ValidationError, match=r"cannot be replayed(.|\n)*Leave streaming out"):
        HuggingFace(path="x", streaming=True)
    with pytest.raises(DataError, match=r"no length(.|\n)*stream of images has no order"):
        precompute(
            load_recipe({"cache": "c.zarr", "teachers": {"t": {}}}, PrecomputeRecipe),
            teachers={"t": torch.nn.Flatten()},
            dataset=rows().to_iterable_dataset(),
        )


def test_without_the_extra_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'logitcache\[hf\]'"):
        of(tmp_path).open()


def test_the_hub_is_asked_for_the_revision_and_part(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("datasets.load_dataset", lambda *values, **named: asked.append((values, named)) or rows())
    HuggingFace(path="hf://datasets/owner/name", name="plain", split="train[:9]", revision="v1").open()
    assert asked == [(("owner/name", "plain"), {"split": "train[:9]", "revision": "v1"})]
    with pytest.raises(RecipeError, match="hf://datasets/OWNER/NAME"):
        HuggingFace(path="hf://datasets/a b").open()


def test_a_cache_of_rows_is_verified_trained_from_and_matched_by_another_form(tmp_path: Path) -> None:
    parquet(tmp_path / "d")
    entries = {
        "cache": str(tmp_path / "c.zarr"),
        "dataset": of(tmp_path / "d", id="key").model_dump(mode="json"),
        "views": {"num_views": 2, "augmentations": [{"kind": "random_resized_crop", "size": 8}]},
        "teachers": {"t": {"model": COLOURED, "preprocessing": HALF}},
        "num_workers": 2,
        "start_method": "spawn",
        "device": "cpu",
    }
    entries["dataset"]["label"] = None
    precompute(load_recipe(entries, PrecomputeRecipe))
    assert main(["verify", str(tmp_path / "c.zarr")]) == 0
    saved(tmp_path / "again")
    moved = f"dataset={{kind: huggingface, path: {tmp_path}/again, id: key}}"
    assert main(["verify", str(tmp_path / "c.zarr"), "--set", moved]) == 0
    student = written_student(tmp_path, str(tmp_path / "c.zarr"))
    assert main(["train-student", str(student), "--set", moved]) == 0
    other = f"dataset={{kind: huggingface, path: {tmp_path}/again}}"
    assert main(["train-student", str(student), "--set", other, "--set", "out=x"]) == 4


def test_a_part_of_one_split_that_was_saved_is_refused(tmp_path: Path) -> None:
    named = datasets.Dataset.from_dict({"key": ["a"]}, split="train")
    for folder, made in {"named": named, "unnamed": rows()}.items():
        made.save_to_disk(tmp_path / folder)
        with pytest.raises(RecipeError, match=r"is the split 'train', not 'train\[:4\]'. Fix: split: train"):
            of(tmp_path / folder, split="train[:4]").open()
    parquet(tmp_path / "p")
    assert len(of(tmp_path / "p", split="train[:4]").open().ids) == 4


def test_a_cache_of_rows_in_storage_has_the_objects_of_one_on_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Beside datasets, which caps fsspec, pip searches for releases of s3fs and moto for many minutes.
    pytest.importorskip("moto", reason="moto and s3fs are not installed beside datasets")
    from tests.objects import bucket

    saved(tmp_path / "d")
    entries: dict[str, Any] = {
        "dataset": {"kind": "huggingface", "path": str(tmp_path / "d"), "id": "key", "label": "label"},
        "views": {"num_views": 2, "augmentations": [{"kind": "random_resized_crop", "size": 8}]},
        "teachers": {"t": {"model": COLOURED, "preprocessing": HALF, "classes": [0, 1, 2]}},
        "shard_rows": 4,
        "num_workers": 0,
        "device": "cpu",
    }
    monkeypatch.setenv(FOLDER, str(tmp_path / "copies"))
    with bucket() as store:
        store.front.fail(0.1, "503", seed=2)
        there = load_recipe({"cache": f"{store.url}/c.zarr", **entries}, PrecomputeRecipe)
        for number in (2, 1):
            precompute(there, part=f"{number}/2")
        precompute(load_recipe({"cache": str(tmp_path / "c.zarr"), **entries}, PrecomputeRecipe))
        assert store.contents("c.zarr") == contents(tmp_path / "c.zarr")
        assert main(["verify", f"{store.url}/c.zarr"]) == 0
        assert main(["train-student", str(written_student(tmp_path, f"{store.url}/c.zarr"))]) == 0


def written_student(folder: Path, cache: str) -> Path:
    file = folder / "s.yaml"
    file.write_text(
        f"{{cache: {cache}, out: {folder}/run, model: {{kind: small_cnn, width: 2}}, epochs: 1, "
        "num_workers: 0, device: cpu, losses: [{kind: kl_divergence}]}"
    )
    return file


def test_the_pipeline_runs_on_folders(tmp_path: Path) -> None:
    pipeline = Path(__file__).parents[2] / "pipelines/hugging_face"
    made = rows().rename_column("label", "labels")
    made.save_to_disk(tmp_path / "beans")
    write_classifier(tmp_path / "vit")
    small = [f"cache={tmp_path}/c.zarr", "num_workers=0", "device=cpu", "batch_size=3"]
    changes = [f"dataset.path={tmp_path}/beans", f"teachers.vit.model.path={tmp_path}/vit", "views.num_views=2"]
    changes += ["views.augmentations.0.size=32", *small]
    assert precompute(load_recipe(pipeline / "precompute.yaml", PrecomputeRecipe, changes)).row_views == 2 * COUNT
    shorter = [f"out={tmp_path}/run", "epochs=2", "schedule.warmup_epochs=1", *small]
    assert train(load_recipe(pipeline / "student.yaml", StudentRecipe, shorter)).teacher_passes == 0
