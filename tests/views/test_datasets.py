"""What every kind of data set offers, and what each kind refuses."""

import hashlib
import json
import pickle
import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter, ValidationError
from torch.utils.data import TensorDataset

from logitcache.errors import DataError, RecipeError
from logitcache.store import digest_index
from logitcache.views.datasets import Dataset, as_image_dataset
from logitcache.views.datasets.base import fingerprint, pixel_digest, read_images
from logitcache.views.datasets.fingerprint_diff import explain_difference
from tests.views.archives import samples, tarred, written

ADAPTER: TypeAdapter[Dataset] = TypeAdapter(Dataset)
KINDS = ["bundled", "custom", "huggingface", "image_folder", "torchvision", "webdataset"]
AT_URLS = ["image_folder at a URL", "webdataset at a URL"]
CUSTOM = """
import numpy as np

class Noise:
    def __init__(self, size):
        self.size = size
    def __len__(self):
        return self.size
    def __getitem__(self, index):
        generator = np.random.default_rng(index)
        return generator.integers(0, 256, (6, 7, 3), dtype=np.uint8), index % 3
"""


def dataset_of(recipe: dict[str, object]):
    return ADAPTER.validate_json(json.dumps(recipe)).open()


def write_mnist(root: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write files that torchvision takes for Fashion-MNIST."""
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        head = struct.pack(">IIII", 0x803, *images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        head = struct.pack(">II", 0x801, len(labels))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.astype(np.uint8).tobytes())


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture
def recipe(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, object]:
    kind = request.param
    if kind == "bundled":
        return {"kind": kind, "num_images": 30}
    if kind == "torchvision":
        images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
        write_mnist(tmp_path / "data", images, np.arange(12) % 10)
        return {"kind": kind, "name": "FashionMNIST", "root": "data", "split": "test"}
    if kind == "custom":
        (tmp_path / "noise_data.py").write_text(CUSTOM)
        return {"kind": kind, "factory": "noise_data:Noise", "arguments": {"size": 9}}
    if kind == "huggingface":
        rows = pytest.importorskip("datasets", reason="the extra hf; tests/integrations has it too")
        images = [Image.new("RGB", (5, 4), (number, 0, 0)) for number in range(4)]
        made = rows.Dataset.from_dict({"image": images, "label": [0, 1, 0, 2]})
        made.cast_column("image", rows.Image()).save_to_disk(tmp_path / "saved")
        return {"kind": kind, "path": "saved", "label": "label"}
    place = f"file://{tmp_path}/" if kind in AT_URLS else ""
    if kind.startswith("webdataset"):
        written(tmp_path, "a-1.tar", tarred(samples(range(5))))
        written(tmp_path, "a-2.tar", tarred(samples(range(5, 8))))
        return {"kind": "webdataset", "shards": [f"{place}a-{{1..2}}.tar"]}
    for name in ("cat/a", "cat/b", "dog/a"):
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        colour = (len(name), ord(name[-1]), 3)
        Image.new("RGB", (5, 4), colour).save(tmp_path / "pets" / f"{name}.png")
    return {"kind": "image_folder", "root": f"{place}pets"}


every_kind = pytest.mark.parametrize("recipe", [*KINDS, *AT_URLS], indirect=True)


def test_every_kind_of_the_union_is_tested() -> None:
    schema = ADAPTER.json_schema()
    assert sorted(schema["discriminator"]["mapping"]) == KINDS


@every_kind
def test_ids_labels_and_digests_fit_together(recipe) -> None:
    dataset = dataset_of(recipe)
    ids = list(dataset.ids)
    assert len(set(ids)) == len(ids) > 0
    assert dataset.ids[-1] == ids[-1]
    assert list(dataset.ids[1:3]) == ids[1:3]
    with pytest.raises(IndexError):
        dataset.ids[len(ids)]
    assert dataset.labels.shape == (len(ids),)
    assert dataset.labels.dtype == np.int64
    assert dataset.labels.min() >= 0
    assert dataset.labels.max() < dataset.num_classes
    assert dataset.digests().shape == (len(ids),)
    assert dataset.digests().dtype == np.uint64
    assert dataset.sizes().dtype == np.int64
    assert dataset.sizes().tolist() == [list(dataset.read(index).shape[1:]) for index in range(len(ids))]
    if dataset.class_names is not None:
        assert len(dataset.class_names) == dataset.num_classes


@every_kind
def test_images_are_bytes_and_the_same_each_time(recipe) -> None:
    dataset, again = dataset_of(recipe), dataset_of(recipe)
    for index in reversed(range(len(dataset.ids))):
        image = dataset.read(index)
        assert image.dtype == torch.uint8
        assert image.ndim == 3
        assert torch.equal(image, again.read(index))


@every_kind
def test_a_batch_is_what_single_reads_give(recipe) -> None:
    dataset = dataset_of(recipe)
    indices = [2, 0, 1, 2]
    for index, image in zip(indices, read_images(dataset, indices), strict=True):
        assert torch.equal(image, dataset.read(index))


@every_kind
def test_writing_into_an_image_does_not_change_the_data_set(recipe) -> None:
    dataset = dataset_of(recipe)
    image = dataset.read(0)
    before = image.clone()
    image.fill_(7)
    assert torch.equal(dataset.read(0), before)


@every_kind
def test_pickled_data_set_is_the_same(recipe) -> None:
    dataset = dataset_of(recipe)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy.read(1), dataset.read(1))
    assert fingerprint(copy) == fingerprint(dataset)


@every_kind
def test_fingerprint_is_stored_and_read_again(recipe) -> None:
    found = fingerprint(dataset_of(recipe))
    assert type(found).model_validate_json(found.model_dump_json()) == found
    assert explain_difference(found, None, dataset_of(recipe)) == ""


@every_kind
def test_recipe_entry_is_stored_and_read_again(recipe) -> None:
    component = ADAPTER.validate_json(json.dumps(recipe))
    assert ADAPTER.validate_json(component.model_dump_json()) == component


@every_kind
def test_global_random_states_are_untouched(recipe) -> None:
    def states() -> tuple[object, ...]:
        return random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    dataset = dataset_of(recipe)
    fingerprint(dataset)
    dataset.read(0)
    assert states() == before


def test_bundled_prefix_is_balanced_and_nested() -> None:
    whole = dataset_of({"kind": "bundled", "split": "test"})
    part = dataset_of({"kind": "bundled", "split": "test", "num_images": 50})
    assert len(whole.ids) == 2000
    assert np.bincount(part.labels).tolist() == [5] * 10
    places = [list(whole.ids).index(name) for name in part.ids]
    assert places == sorted(places)
    assert torch.equal(whole.read(places[7]), part.read(7))
    for label in range(10):
        assert np.flatnonzero(whole.labels == label)[4] in places


@pytest.mark.parametrize("num_images", [0, 15, 5010])
def test_bundled_refuses_other_numbers_of_images(num_images: int) -> None:
    with pytest.raises(ValidationError):
        ADAPTER.validate_json(json.dumps({"kind": "bundled", "num_images": num_images}))


def test_fake_data_is_read_without_a_trace_in_the_random_state() -> None:
    options = {"size": 8, "image_size": [3, 5, 5], "num_classes": 4}
    dataset = dataset_of({"kind": "torchvision", "name": "FakeData", "options": options})
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    dataset.read(5)
    assert torch.equal(torch.rand(2), expected)
    assert dataset.read(0).shape == (3, 5, 5)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"name": "FashionMnist"}, RecipeError, "Did you mean 'FashionMNIST'"),
        ({"name": "read_video"}, RecipeError, r"torchvision\.datasets has no"),
        ({"split": "val"}, RecipeError, "no split 'val': set train or test"),
        ({"options": {"trian": True}, "split": None}, RecipeError, "Did you mean 'train'"),
        ({"options": {"transform": "x"}}, RecipeError, "no option 'transform'"),
        ({"root": None}, RecipeError, "Set root"),
        ({"root": "none"}, DataError, r"(?s)none'.*download: true"),
        ({"name": "FakeData", "root": None}, RecipeError, "not divided into splits"),
        ({"name": "EuroSAT", "split": None}, DataError, "download: true"),
        ({"name": "ImageNet", "split": "trian"}, RecipeError, "trian"),
        ({"name": "ImageNet", "split": "val", "download": True}, RecipeError, "does not download"),
    ],
)
def test_torchvision_mistakes_name_the_fix(fields, error, message) -> None:
    recipe = {"kind": "torchvision", "name": "FashionMNIST", "root": ".", "split": "train"}
    with pytest.raises(error, match=message):
        dataset_of(recipe | fields)


@pytest.mark.parametrize("recipe", ["torchvision"], indirect=True)
def test_torchvision_images_are_read_once_until_a_file_changes(
    recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = digest_index.now_ns
    monkeypatch.setattr(digest_index, "now_ns", lambda: now() + 3_600_000_000_000)
    before = fingerprint(dataset_of(recipe))
    again = dataset_of(recipe)
    monkeypatch.setattr(again, "_item", None)
    assert fingerprint(again) == before
    (images,) = tmp_path.rglob("t10k-images-idx3-ubyte")
    data = bytearray(images.read_bytes())
    data[-1] ^= 1
    images.write_bytes(data)
    changed = dataset_of(recipe)
    assert fingerprint(changed).content != before.content
    assert changed.digests()[-1] == pixel_digest(changed.read(11))


def test_torchvision_prints_nothing_on_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import FakeData

    class Loud(FakeData):
        def __init__(self, size: int = 3, image_size: tuple[int, ...] = (3, 4, 4)) -> None:
            super().__init__(size, image_size)
            print("Files already downloaded and verified")

    monkeypatch.setattr("torchvision.datasets.FakeData", Loud)
    dataset_of({"kind": "torchvision", "name": "FakeData"})
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "verified" in captured.err


class Items(list):
    """A map-style object of given items."""


IMAGE = torch.arange(60, dtype=torch.uint8).reshape(3, 4, 5)


@pytest.mark.parametrize(
    "image",
    [
        IMAGE,
        IMAGE[0],
        IMAGE.permute(1, 2, 0).numpy(),
        IMAGE[0].numpy(),
        Image.fromarray(IMAGE.permute(1, 2, 0).numpy()),
        Image.fromarray(IMAGE[0].numpy()),
        Image.fromarray(IMAGE[0].numpy().astype(np.uint16) * 256 + 9),
    ],
    ids=["CHW", "HW", "HWC array", "HW array", "RGB", "L", "16 bit"],
)
def test_custom_images_of_every_type_have_the_same_pixels(image: object) -> None:
    expected = IMAGE if 3 in np.shape(image) or np.shape(image)[-1:] == (3,) else IMAGE[:1]
    dataset = as_image_dataset(Items([(image, 2), image, (image,), (image, torch.tensor(1))]))
    assert all(torch.equal(dataset.read(index), expected) for index in range(4))
    assert dataset.labels.tolist() == [2, -1, -1, 1]
    assert dataset.num_classes == 3


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (IMAGE / 255, r"torch\.float32 tensor.*Leave out ToTensor"),
        (IMAGE.numpy().astype(np.float64), r"float64 array.*Leave out"),
        (IMAGE.to(torch.int16), "Return uint8"),
        (torch.zeros(32, 32, 3, dtype=torch.uint8), r"permute\(2, 0, 1\)"),
        (np.zeros((3, 32, 32), np.uint8), r"transpose\(1, 2, 0\)"),
        (torch.zeros(0, 4, 4, dtype=torch.uint8), r"not \[0, 4, 4\]"),
        ({"image": IMAGE, "label": 3}, r"not a dict with \['image', 'label'\]"),
        ((IMAGE, 1, 2), "not 3 values"),
        ((IMAGE, "cat"), "a label is one whole number"),
        ((IMAGE, 1.5), "a label is one whole number"),
        ((IMAGE, 2 * torch.eye(3)[0]), "a label is one whole number"),
        ((IMAGE, -2), "not -2"),
        ("cat.png", "not str"),
        (None, "not NoneType"),
    ],
)
def test_custom_item_that_is_no_image_is_refused_by_id(item: object, message: str) -> None:
    with pytest.raises(DataError, match=r"(?s)image '00000'.*" + message):
        as_image_dataset(Items([item, item]))


def test_custom_objects_that_are_no_data_set_are_refused() -> None:
    with pytest.raises(DataError, match="no images by index"):
        as_image_dataset(3)
    with pytest.raises(DataError, match="no images"):
        as_image_dataset(Items())

    class Endless:
        def __getitem__(self, index: int) -> torch.Tensor:
            return IMAGE

    with pytest.raises(DataError, match="no length"):
        as_image_dataset(Endless())


def test_custom_error_of_the_users_code_names_the_image() -> None:
    class Broken(Items):
        def __getitem__(self, index: int) -> torch.Tensor:
            if index == 1:
                raise KeyError("lost")
            return IMAGE

    dataset = as_image_dataset(Broken([0] * 5))
    with pytest.raises(DataError, match=r"image '00001'.*KeyError\('lost'\)"):
        dataset.digests()


def test_digest_of_pixels_does_not_depend_on_their_order_in_memory() -> None:
    channels_last = IMAGE.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert channels_last.stride() != IMAGE.stride()
    assert pixel_digest(channels_last) == pixel_digest(IMAGE)
    # Its definition: the shape as int64, then the pixels.
    content = np.array([3, 4, 5], "<i8").tobytes() + bytes(range(60))
    assert pixel_digest(IMAGE) == int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def test_sizes_of_a_map_style_set_are_those_of_each_image() -> None:
    dataset = as_image_dataset(Items([torch.zeros(3, 4, 5, dtype=torch.uint8), np.zeros((7, 2, 3), np.uint8)]))
    assert dataset.sizes().tolist() == [[4, 5], [7, 2]]


def test_fingerprint_holds_the_sizes_and_a_difference_of_them_alone_is_explained(monkeypatch) -> None:
    dataset = numbered([1, 2])
    recorded = fingerprint(dataset)
    assert recorded.sizes == hashlib.sha256(np.array([[2, 2], [2, 2]], "<i8").tobytes()).hexdigest()
    monkeypatch.setattr(type(dataset), "sizes", lambda self: np.array([[2, 2], [2, 3]]))
    text = explain_difference(recorded, dataset.digests(), dataset)
    assert "sizes of the images" in text
    assert "Pillow" in text


@pytest.mark.parametrize("source", ["random", "numpy", "torch", "own"])
def test_custom_data_set_that_augments_is_refused(source: str) -> None:
    draws = {
        "random": lambda: random.randrange(200),
        "numpy": lambda: int(np.random.randint(200)),
        "torch": lambda: int(torch.randint(200, ())),
        "own": iter(range(200)).__next__,
    }

    class Augmenting(Items):
        def __getitem__(self, index: int) -> torch.Tensor:
            return IMAGE + draws[source]()

    with pytest.raises(DataError, match="comes out different when it is read twice"):
        as_image_dataset(Augmenting([0]))


def test_custom_ids_and_classes_are_used() -> None:
    class Named(Items):
        ids = ("a", "b\u00e9")
        classes = ("cat", "dog", "fish")

    dataset = as_image_dataset(Named([(IMAGE, 0), (IMAGE, 1)]))
    assert list(dataset.ids) == ["a", "b\u00e9"]
    assert (dataset.num_classes, dataset.class_names) == (3, ("cat", "dog", "fish"))
    for ids, message in ((["a"], "1 ids"), (["a", "a"], "two images"), ([1, 2], "strings")):
        Named.ids = ids
        with pytest.raises(DataError, match=message):
            as_image_dataset(Named([IMAGE, IMAGE]))


def test_custom_label_beyond_the_classes_is_refused() -> None:
    class Named(Items):
        num_classes = 2

    dataset = as_image_dataset(Named([(IMAGE, 0), (IMAGE, 2)]))
    with pytest.raises(DataError, match=r"image '00001'.*label 2, but there are 2 classes"):
        _ = dataset.num_classes


def test_torch_data_sets_are_taken_as_they_are() -> None:
    images = torch.randint(256, (4, 3, 5, 5), dtype=torch.uint8)
    dataset = as_image_dataset(TensorDataset(images, torch.tensor([1, 0, 3, 2])))
    assert torch.equal(dataset.read(2), images[2])
    assert dataset.labels.tolist() == [1, 0, 3, 2]
    assert as_image_dataset(dataset) is dataset


@pytest.mark.parametrize("value", ["tiny.png", 5, None])
def test_custom_factory_that_returns_no_data_set_is_refused(value: object) -> None:
    recipe = {"kind": "custom", "factory": "json:loads", "arguments": {"s": json.dumps(value)}}
    with pytest.raises(DataError, match="json:loads"):
        dataset_of(recipe)


def numbered(values: list[int], ids: list[str] | None = None, labels: list[int] | None = None):
    class Named(Items):
        pass

    items = Named([(torch.full((1, 2, 2), value, dtype=torch.uint8), 0) for value in values])
    for index, label in enumerate(labels or []):
        items[index] = (items[index][0], label)
    items.ids = ids or [f"{index}.png" for index in range(len(values))]
    return as_image_dataset(items)


@pytest.mark.parametrize(
    ("here", "messages"),
    [
        (numbered([1, 2, 9, 8]), ["content", "2 of 4 images changed: '2.png', '3.png'", "original"]),
        (numbered([1, 2, 4, 3]), ["another order, from '2.png' (row 2)"]),
        (
            numbered([1, 2, 4, 3], ["0.png", "1.png", "3.png", "2.png"]),
            ["ids and their order", "another order, from '3.png' (row 2)"],
        ),
        (numbered([1, 2, 3, 4], ["a", "b", "c", "d"]), ["under other names"]),
        (numbered([1, 2, 3, 4, 5]), ["recorded 4, here 5", "1 images are new or changed: '4.png'"]),
        (numbered([1, 3, 4]), ["recorded 4, here 3", "1 recorded images are missing", "rows 1"]),
        (numbered([1, 2, 3, 4], labels=[0, 0, 0, 5]), ["classes: recorded 1, here 6", "labels"]),
    ],
)
def test_difference_is_explained_with_values_and_fix(here, messages: list[str]) -> None:
    recorded = numbered([1, 2, 3, 4])
    text = explain_difference(fingerprint(recorded), recorded.digests(), here)
    for message in (*messages, "recorded", "here", "Fix:"):
        assert message in text, text
    assert "Fix:" in explain_difference(fingerprint(recorded), None, here)
