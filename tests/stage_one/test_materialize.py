"""Rendered views in files: the pixels that a teacher answers, each with its key, id and CRC-32."""

import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from logitcache.cli.app import main
from logitcache.errors import MismatchError, RecipeError
from logitcache.planning.plan import plan
from logitcache.stage_one.materialize import materialize as module
from logitcache.stage_one.materialize.materialize import materialize
from logitcache.stage_one.materialize.view_files import FileForm
from logitcache.stage_one.precompute import precompute
from logitcache.views.datasets.custom import as_image_dataset
from logitcache.views.keys import ViewKey
from logitcache.views.spec import Views
from tests.cache.made import Linear, Pixels, contents, recipe, teacher
from tests.stage_one.test_import_targets import KEPT, PIXELS

COUNT = 90
FORMS_OF_PNG: tuple[FileForm, ...] = ("webdataset", "tfrecord")


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of 40 views: three of each of the two views of all images."""
    monkeypatch.setattr(module, "FILE_BYTES", 40 * 3 * 4 * 4)


def expected(tmp_path: Path) -> dict[str, np.ndarray]:
    """The views of the recipe, rendered one by one."""
    views = Views(as_image_dataset(Pixels(COUNT)), recipe(tmp_path).views)
    return {f"{view}/{index}": views[ViewKey(view, index)].numpy() for view in range(2) for index in range(COUNT)}


def read_npz(folder: Path) -> dict[str, tuple[np.ndarray, str, int]]:
    found = {}
    for file in sorted(folder.glob("*.npz")):
        rows = np.load(file)
        for key, name, crc32, pixels in zip(rows["key"], rows["id"], rows["crc32"], rows["pixels"], strict=True):
            found[str(key)] = (pixels, str(name), int(crc32))
    return found


def read_webdataset(folder: Path, ending: str = "png") -> dict[str, tuple[np.ndarray, str, int]]:
    found = {}
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as archive:
            members = {member.name: archive.extractfile(member).read() for member in archive}  # type: ignore[union-attr]
        for name in [name for name in members if name.endswith(f".{ending}")]:
            facts = json.loads(members[name.replace(f".{ending}", ".json")])
            assert f"{facts['key']}.{ending}" == name
            content = members[name]
            if ending == "png":
                pixels = np.moveaxis(np.asarray(Image.open(io.BytesIO(content))), 2, 0)
            else:
                pixels = np.frombuffer(content, np.uint8).reshape(facts["shape"])
            found[facts["key"]] = (pixels, facts["id"], facts["crc32"])
    return found


def example_message() -> Any:
    """The message tf.train.Example, as tensorflow/core/example defines it."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name: str, *fields: tuple[str, int, int, str]) -> None:
        made = file.message_type.add(name=name)
        for field, number, kind, of in fields:
            label = 1 if kind == 11 and of != "t.Features.FeatureEntry" else 3
            made.field.add(name=field, number=number, type=kind, label=label, type_name=of or None)

    message("BytesList", ("value", 1, 12, ""))
    message("Int64List", ("value", 1, 3, ""))
    message("Feature", ("bytes_list", 1, 11, "t.BytesList"), ("int64_list", 3, 11, "t.Int64List"))
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=9, label=1)
    entry.field.add(name="value", number=2, type=11, label=1, type_name="t.Feature")
    features.field.add(name="feature", number=1, type=11, label=3, type_name="t.Features.FeatureEntry")
    message("Example", ("features", 1, 11, "t.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def read_tfrecord(folder: Path) -> dict[str, tuple[np.ndarray, str, int]]:
    reader = pytest.importorskip("tensorboard.compat.tensorflow_stub.pywrap_tensorflow")
    example, found = example_message(), {}
    for file in sorted(folder.glob("*.tfrecord")):
        records = reader.PyRecordReader_New(str(file))  # compares both checksums of every record
        while True:
            try:
                records.GetNext()
            except Exception:
                break
            facts = example.FromString(records.record()).features.feature
            shape = facts["shape"].int64_list.value
            pixels = np.frombuffer(facts["image"].bytes_list.value[0], np.uint8).reshape(shape)
            key = facts["key"].bytes_list.value[0].decode()
            found[key] = (pixels, facts["id"].bytes_list.value[0].decode(), facts["crc32"].int64_list.value[0])
    return found


FORMS: dict[str, tuple[dict[str, Any], Any]] = {
    "npz": ({"form": "npz"}, read_npz),
    "png": ({"form": "webdataset"}, read_webdataset),
    "raw": ({"form": "webdataset", "pixels": "raw"}, lambda folder: read_webdataset(folder, "raw")),
    "tfrecord": ({"form": "tfrecord", "pixels": "raw"}, read_tfrecord),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_all_views_with_keys_ids_and_checksums(form: str, tmp_path: Path) -> None:
    options, read = FORMS[form]
    result = materialize(recipe(tmp_path / "c.zarr", **KEPT), tmp_path / "v", **options)
    assert (result.files, result.files_written, result.views) == (6, 6, 2 * COUNT)
    found, wanted = read(tmp_path / "v"), expected(tmp_path)
    assert found.keys() == wanted.keys()
    for key, (pixels, name, crc32) in found.items():
        assert np.array_equal(pixels, wanted[key])
        assert name == f"{int(key.split('/')[1]):05}"
        assert crc32 == zlib.crc32(wanted[key].tobytes())


@pytest.mark.parametrize("form", ["npz", "raw", "tfrecord"])
def test_bytes_are_predicted_before_anything_is_written(form: str, tmp_path: Path) -> None:
    options, _ = FORMS[form]
    planned = materialize(recipe(tmp_path / "c.zarr", **KEPT), tmp_path / "v", dry_run=True, **options)
    assert not (tmp_path / "v").exists()
    written = materialize(recipe(tmp_path / "c.zarr", **KEPT), tmp_path / "v", **options)
    assert planned.predicted_bytes == written.predicted_bytes
    assert planned.files == written.files
    assert abs(written.bytes / planned.predicted_bytes - 1) < 0.1  # views of 48 bytes: all of it is overhead


def test_large_views_are_predicted_to_a_hundredth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", 64 << 20)
    images = {"kind": "custom", "factory": "tests.cache.made:Pixels", "arguments": {"count": 20, "side": 64}}
    kept = {"dataset": images, "views": {"num_views": 1}}
    for form, (options, _) in FORMS.items():
        result = materialize(recipe(tmp_path / "c.zarr", **kept), tmp_path / form, **options)
        assert abs(result.bytes / result.predicted_bytes - 1) < 0.03, form


def test_bytes_of_png_are_predicted_from_some_views_also_by_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FILE_BYTES", 64 << 20)
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(60):  # of one colour, but for a patch of noise of another size in each
        image = np.full((48, 48, 3), number, np.uint8)
        side = 8 + number // 2
        image[:side, :side] = generator.integers(0, 256, (side, side, 3))
        Image.fromarray(image).save(tmp_path / f"images/{number:02}.png")
    kept = {
        "dataset": {"kind": "image_folder", "root": str(tmp_path / "images"), "labelled": False},
        "views": {"num_views": 2, "augmentations": [{"kind": "center_crop", "size": 48}]},
    }
    for form in FORMS_OF_PNG:
        planned = materialize(recipe(tmp_path / "c.zarr", **kept), tmp_path / form, form=form, dry_run=True)
        written = materialize(recipe(tmp_path / "c.zarr", **kept), tmp_path / form, form=form)
        assert planned.predicted_bytes == written.predicted_bytes
        assert written.bytes / planned.predicted_bytes == pytest.approx(1, abs=0.2)
    document = plan(recipe(tmp_path / "c.zarr", **kept), teachers={"t": Linear(16, side=48)}, probing=False)
    webdataset = materialize(recipe(tmp_path / "c.zarr", **kept), tmp_path / "webdataset")
    assert document["materialized"]["png_bytes"] == webdataset.predicted_bytes
    assert document["materialized"]["raw_bytes"] > 1.5 * document["materialized"]["png_bytes"]


def test_further_views_are_added_to_the_files_that_are_there(tmp_path: Path) -> None:
    spec = recipe(tmp_path).views.model_dump(mode="json")
    more = {**KEPT, "views": spec | {"num_views": 3}}
    materialize(recipe(tmp_path / "c.zarr", **KEPT), tmp_path / "v", form="npz")
    added = materialize(recipe(tmp_path / "c.zarr", **more), tmp_path / "v", form="npz")
    assert (added.files, added.files_written) == (9, 3)
    materialize(recipe(tmp_path / "c.zarr", **more), tmp_path / "w", form="npz")
    assert contents(tmp_path / "v") == contents(tmp_path / "w")
    with pytest.raises(MismatchError, match=r"num_views: 3 there, 2 here"):
        materialize(recipe(tmp_path / "c.zarr", **KEPT), tmp_path / "v", form="npz")


def test_a_cache_gives_the_files_of_its_recipe_and_the_checksums_that_it_recorded(tmp_path: Path) -> None:
    precompute(recipe(tmp_path / "c.zarr", **KEPT, teachers={"t": teacher()}), teachers={"t": Linear(16)})
    images = tmp_path / "images"
    images.mkdir()
    for number in range(4):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(images / f"{number}.png")
    folder = {"kind": "image_folder", "root": str(images), "labelled": False}
    kept = {"dataset": folder, "row_checksums": True}
    precompute(recipe(tmp_path / "f.zarr", **kept), teachers={"t": Linear(16)})
    materialize(recipe(tmp_path / "f.zarr", **kept), tmp_path / "a", form="npz")
    materialize(tmp_path / "f.zarr", tmp_path / "b", form="npz")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    images.rename(tmp_path / "moved")
    command = ["materialize", str(tmp_path / "f.zarr"), str(tmp_path / "d"), "--format", "npz", "--num-workers", "0"]
    assert main(command) == 2
    assert main([*command, "--set", f"dataset.root={tmp_path}/moved"]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "d")
    assert main([*command, "--set", "views.num_views=1"]) == 2
    with pytest.raises(RecipeError, match=r"user's own code|dataset"):
        materialize(tmp_path / "c.zarr", tmp_path / "d")


def test_parts_and_a_continued_run_write_the_same_files(tmp_path: Path) -> None:
    whole = materialize(recipe(tmp_path / "c.zarr", **KEPT), tmp_path / "whole")
    for number in (2, 1):
        part = materialize(recipe(tmp_path / "c.zarr", **KEPT), tmp_path / "parts", part=f"{number}/2")
        assert part.files_left == (3 if number == 2 else 0)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    (tmp_path / "whole/0001-000000040.tar").unlink()
    again = materialize(recipe(tmp_path / "c.zarr", **KEPT), tmp_path / "whole")
    assert (again.files_written, whole.files_written) == (1, 6)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    (tmp_path / "url").mkdir()
    url = materialize(recipe(tmp_path / "c.zarr", **KEPT), f"file://{tmp_path}/url")
    assert url.files_written == 6
    assert contents(tmp_path / "url") == contents(tmp_path / "whole")


def test_a_folder_of_other_views_is_refused(tmp_path: Path) -> None:
    materialize(recipe(tmp_path / "c.zarr", **KEPT), tmp_path / "v")
    views = {"num_views": 2, "seed": 4, "augmentations": [{"kind": "center_crop", "size": 4}]}
    with pytest.raises(MismatchError, match=r"holds other views:\n  views(.|\n)*Fix: another folder"):
        materialize(recipe(tmp_path / "c.zarr", **KEPT, views=views), tmp_path / "v")
    with pytest.raises(MismatchError, match="format: 'webdataset' there, 'npz' here"):
        materialize(recipe(tmp_path / "c.zarr", **KEPT), tmp_path / "v", form="npz")
    with pytest.raises(RecipeError, match="neither a recipe nor a cache"):
        materialize(tmp_path / "v", tmp_path / "w")


def test_the_command_takes_a_recipe_and_refuses_other_forms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"{{cache: {tmp_path}/c.zarr, dataset: {json.dumps(PIXELS)}, teachers: {{t: {{}}}}}}")
    command = ["materialize", str(file), str(tmp_path / "v"), "--num-workers", "0"]
    assert main([*command, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predicted_bytes"] > 0
    assert main([*command, "--format", "npz"]) == 0
    for wrong in (["--format", "npy"], ["--pixels", "jpeg"], ["--part", "3/2"], ["--trust", "0" * 64]):
        assert main([*command, *wrong]) == 2
        assert "Fix:" in capsys.readouterr().err
