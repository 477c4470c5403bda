"""A cache is read by docs/reference/format.md with zarr alone: what is said there is so, and it is enough.

Nothing of this project reads here. What zarr finds is compared with views that are made here with numpy, and with the
teacher's answers to them.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from tests.cache.made import DENSE32, ENCODINGS, Linear, Pixels, run, teacher

COUNT, ROWS = 300, {"dense16": 128, "dense32": 128, "packed": 128, "top_k": 1024, "top_k_packed": 100}
ROWS |= {"uint8": 1024, "packed_top_k": 100, "transform": 100}
PARTS = {
    "dense": [""],
    "top_k": [""],
    "uint8": [".level", ".scale"],
    "packed_top_k": [".index", ".fall", ".tail"],
    "transform": [".wide", ".byte", ".pair", ".triple", ".quint", ".top_byte", ".top_pair", ".mean", ".exponent"],
}
Array = np.ndarray[Any, Any]
PAGE = " ".join((Path(__file__).parents[2] / "docs" / "reference" / "format.md").read_text().split())


@pytest.fixture(scope="module", params=ENCODINGS)
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("format") / "c.zarr"
    teachers = {"t": teacher(ENCODINGS[request.param])}
    recorded = {"row_checksums": True, "record_parameters": True}
    run(cache, Pixels(COUNT, 16), teachers=teachers, shard_rows=ROWS[request.param], **recorded)
    return cache


def manifest_of(path: Path) -> dict[str, Any]:
    entry = zarr.open_group(path, mode="r").attrs["logitcache"]
    assert isinstance(entry, dict)
    assert entry["format_version"] == 1
    manifest = entry["manifest"]
    assert hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest() == entry["sha256"]
    assert isinstance(manifest, dict)
    return manifest


def array(path: Path, name: str) -> Array:
    return np.asarray(zarr.open_group(path, mode="r")[name][...])


def groups(path: Path) -> dict[str, list[str]]:
    """Return the arrays of each group in the order of its records."""
    manifest = manifest_of(path)
    found = {}
    for name, entry in manifest["teachers"].items():
        form = entry["stored_logits"]["form"]
        parts = PARTS[form["kind"]] + ([] if form.get("dtype") == "float32" else [".errors"])
        if form["kind"] == "transform":
            counts = [form[name] for name in ("wide", "bytes", "pairs", "triples", "quints", "correction_bytes")]
            counts += [form["corrections"] - form["correction_bytes"], 1, 1, 1]
            parts = [part for part, count in zip(parts, counts, strict=True) if count]
        found[f"{name}.logits"] = [f"{name}.logits{part}" for part in parts]
    views = ["views.crc32"] if manifest["row_checksums"] else []
    views += ["views.parameters"] if manifest["parameters"] else []
    return found | ({"views": views} if views else {})


def pixels_by_parameters(images: Array, drawn: Array) -> Array:
    """Crop and flip padded images [N, H, W, C] by what was drawn [N, 3], as uint8 [N, C, H, W]."""
    padded = np.pad(images.transpose(0, 3, 1, 2), ((0, 0), (0, 0), (1, 1), (1, 1)))
    views = np.empty((len(images), 3, 4, 4), np.uint8)
    for number, (top, left, flipped) in enumerate(drawn.tolist()):
        view = padded[number, :, top : top + 4, left : left + 4]
        views[number] = view[..., ::-1] if flipped else view
    return views


def answers(views: Array) -> Array:
    return Linear()((torch.from_numpy(views).float() / 255 - 0.5) / 0.5).detach().numpy()


def test_recorded_parameters_and_checksums_are_those_of_the_views(path: Path) -> None:
    assert manifest_of(path)["parameters"] == ["0.random_crop.top", "0.random_crop.left", "1.horizontal_flip.flipped"]
    drawn, checksums = array(path, "views.parameters"), array(path, "views.crc32")
    for view in range(2):
        made = pixels_by_parameters(Pixels(COUNT).images, drawn[view])
        assert checksums[view].tolist() == [zlib.crc32(pixels.tobytes()) for pixels in made]


def test_the_rows_are_the_answers_to_the_views(path: Path) -> None:
    drawn = array(path, "views.parameters")
    logits = np.stack([answers(pixels_by_parameters(Pixels(COUNT).images, drawn[view])) for view in range(2)])
    kind = manifest_of(path)["teachers"]["t"]["stored_logits"]["form"]["kind"]
    if kind == "transform":
        assert np.abs(transformed(path) - logits).max() < 0.1  # the step
        return
    if kind == "dense":
        stored = array(path, "t.logits")
        assert np.allclose(stored, logits, rtol=2e-3 if stored.dtype == np.float16 else 1e-5, atol=2e-3)
        return
    if kind == "uint8":
        low, step = np.moveaxis(array(path, "t.logits.scale").astype(np.float64), -1, 0)
        read = low[..., None] + step[..., None] * array(path, "t.logits.level")
        assert (np.abs(read - logits) <= 0.51 * step[..., None] + 1e-3).all()
        return
    log_p = logits - np.log(np.exp(logits.astype(np.float64)).sum(axis=-1, keepdims=True))
    order = np.argsort(-log_p, axis=-1)
    kept = np.take_along_axis(log_p, order, axis=-1)
    if kind == "packed_top_k":
        bits = np.unpackbits(array(path, "t.logits.index"), axis=-1, bitorder="little")
        classes = (bits[..., :8].reshape(2, COUNT, 2, 4) << np.arange(4)).sum(axis=-1)
        assert np.array_equal(classes, order[..., :2])
        read = -0.0625 * np.cumsum(array(path, "t.logits.fall"), axis=-1)
        assert np.allclose(read, kept[..., :2], atol=0.0625 / 2 + 2e-2)
        tail = array(path, "t.logits.tail")
    else:
        record = np.dtype([("tail", "<f4", 3), ("index", "<u2", 2), ("log_p", "<f2", 2)])
        rows = array(path, "t.logits").astype("<u2").view(record)[..., 0]
        assert np.array_equal(rows["index"], order[..., :2])
        assert np.allclose(rows["log_p"], kept[..., :2], rtol=2e-3, atol=1e-3)
        tail = rows["tail"]
    dropped = kept[..., 2:]
    moments = np.stack([np.log(np.exp(dropped).sum(-1)), dropped.mean(-1), dropped.var(-1)], axis=-1)
    tolerance = 1e-4 if kind == "top_k" else 2e-3
    assert np.allclose(tail, moments, rtol=tolerance, atol=tolerance)


def digits(packed: Array, base: int, each: int, count: int) -> Array:
    """Read the digits of bytes, the first that of ones, from -base/2 to less than base/2."""
    places = [packed.astype(int) // base**place % base for place in range(each)]
    values = np.stack(places, axis=-1).reshape(*packed.shape[:-1], -1)[..., :count]
    return np.where(2 * values >= base, values - base, values)


def transformed(path: Path) -> Array:
    """Decode a transform number by number, as the page says."""
    form = manifest_of(path)["teachers"]["t"]["stored_logits"]["form"]
    table = {name: array(path, f"t.logits.{name}") for name in ("basis", "centre", "correction_step")}
    rows = {name: array(path, f"t.logits.{name}") for name in ("mean", "exponent")}
    nothing = np.empty((*rows["mean"].shape, 0), int)

    def part(name: str, count: int, base: int = 0, each: int = 1) -> Array:
        found = array(path, f"t.logits.{name}") if count else nothing
        return digits(found, base, each, count) if base and count else found

    coupled = [part("wide", form["wide"]), part("byte", form["bytes"])]
    coupled += [part("pair", form["pairs"], 16, 2), part("triple", form["triples"], 6, 3)]
    coupled_q, quints = np.concatenate(coupled, -1), part("quint", form["quints"], 3, 5)
    num_bytes = form["correction_bytes"]
    top = [part("top_byte", num_bytes), part("top_pair", form["corrections"] - num_bytes, 16, 2)]
    corrections = np.concatenate(top, -1)
    found = np.empty((*quints.shape[:2], table["basis"].shape[1]))
    for place in np.ndindex(found.shape[:2]):
        state, numbers = 0, []
        for number in coupled_q[place].tolist():
            bit = state & 1
            numbers.append(-2 * number - 1 if bit else 2 * number)
            state = (state >> 1) ^ (166 * bit) ^ (121 * (number % 2))
        numbers += [2 * number for number in quints[place].tolist()]
        scale = 2 ** int(rows["exponent"][place])
        whole = np.array(numbers) @ table["basis"].astype(int) * scale + table["centre"]
        values = whole * form["step"] / 4096
        order = np.argsort(-whole, kind="stable")[: form["corrections"]]
        values[order] += corrections[place] * scale * table["correction_step"]
        parts = [values, int(rows["mean"][place]) * scale * form["step"] / 16]
        bend = form["bend"]
        found[place] = sum(parts) if scale > 1 else sum(bend * np.sinh(part / bend) for part in parts)
    return found


def test_tables_have_the_digests_of_the_manifest(path: Path) -> None:
    for name, digest in manifest_of(path)["teachers"]["t"]["stored_logits"]["tables"].items():
        stored = zarr.open_group(path, mode="r")[f"t.logits.{name}"]
        file = path / f"t.logits.{name}" / "c" / Path(*["0"] * stored.ndim)
        assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
        assert file.read_bytes() == np.asarray(stored[...]).tobytes()


def test_errors_are_counted_in_bins(path: Path) -> None:
    entry = manifest_of(path)["teachers"]["t"]
    temperatures = entry["stored_logits"]["error_temperatures"]
    if entry["stored_logits"]["form"].get("dtype") == "float32":
        assert (temperatures, entry["errors"]) == ([], {})
        return
    errors = array(path, "t.logits.errors")
    assert errors.shape == (2, -(-COUNT // manifest_of(path)["shard_rows"]), 2, 386)
    for place, (temperature, told) in enumerate(zip(temperatures, entry["errors"]["logits"], strict=True)):
        found = errors[:, :, place]
        assert temperature == told["temperature"] == (1.0, 4.0)[place]
        assert found[..., 2:].sum() == 2 * COUNT
        assert told["mean"] == pytest.approx(found[..., 0].sum() / (2 * COUNT))
        largest = 2.0 ** (np.flatnonzero(found[..., 2:].sum((0, 1))).max() / 8 - 40 + 1 / 8)
        assert told["max"] == found[..., 1].max() < largest


def test_labels_digests_and_canaries_agree_with_the_manifest(path: Path) -> None:
    manifest, images = manifest_of(path), Pixels(COUNT, 16).images.transpose(0, 3, 1, 2)
    labels, digests, canary = (array(path, name) for name in ("label", "digest", "canary"))
    assert labels.dtype == np.int64
    assert labels.tolist() == [number % 16 for number in range(COUNT)]
    assert hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest() == manifest["fingerprint"]["labels"]
    shape = np.array([3, 4, 4], "<i8").tobytes()
    words = [hashlib.sha256(shape + image.tobytes()).digest()[:8] for image in images]
    assert digests.astype("<u8").tobytes() == b"".join(words)
    assert hashlib.sha256(b"".join(words)).hexdigest() == manifest["fingerprint"]["content"]
    assert len(canary) == len(manifest["canaries"]) == 32
    checksums = array(path, "views.crc32")
    for pixels, entry in zip(canary, manifest["canaries"], strict=True):
        text = f"|u1{tuple(manifest['image_shape'])}".encode()
        assert hashlib.sha256(text + pixels.tobytes()).hexdigest() == entry["augmented"]
        assert zlib.crc32(pixels.tobytes()) == checksums[entry["view"], entry["index"]]


def test_commit_records_seal_the_files_of_all_shards(path: Path) -> None:
    manifest = manifest_of(path)
    rows, count = manifest["shard_rows"], manifest["fingerprint"]["num_images"]
    for group, names in groups(path).items():
        records = array(path, f"{group}.commits")
        assert records.shape == (manifest["views"]["num_views"], -(-count // rows), len(names), 40)
        for (view, number, place), record in zip(np.ndindex(records.shape[:3]), records.reshape(-1, 40), strict=True):
            axes = zarr.open_group(path, mode="r")[names[place]].ndim - 2
            key = f"{names[place]}/c.{view}.{number}" + ".0" * axes
            data = (path / key).read_bytes()
            assert int.from_bytes(record[:8].tobytes(), "little") == len(data)
            assert hashlib.sha256(hashlib.sha256(data).digest() + key.encode()).digest() == record[8:].tobytes()


def test_a_hot_shard_begins_with_its_rows(path: Path) -> None:
    rows, entry = manifest_of(path)["shard_rows"], manifest_of(path)["teachers"]["t"]["stored_logits"]["form"]
    for name in groups(path)["t.logits"]:
        if name.endswith(".errors"):
            continue
        values = array(path, name)
        file = path / name / ("c.1.0" + ".0" * (values.ndim - 2))
        begins = file.read_bytes().startswith(values[1, :rows].tobytes())
        assert begins == (entry["storage"] == "hot")
        if begins:
            assert rows * values[0, 0].nbytes % 4096 == 0


def test_all_that_lies_in_a_cache_is_on_the_page(path: Path) -> None:
    named = {"label", "digest", "canary", *(name for names in groups(path).values() for name in names)}
    named |= {f"{group}.commits" for group in groups(path)}
    named |= {f"t.logits.{name}" for name in manifest_of(path)["teachers"]["t"]["stored_logits"]["tables"]}
    assert set(zarr.open_group(path, mode="r").array_keys()) == named
    assert {file.name for file in path.iterdir()} == named | {"zarr.json"}
    for name in named:
        own = name.rpartition(".")[2]
        assert f"`{'g.commits' if own == 'commits' else name}`" in PAGE or f"table `{own}`" in PAGE, name
        stored = json.loads((path / name / "zarr.json").read_bytes())
        assert stored["dimension_names"]
        assert set(codecs(stored["codecs"])) <= {"bytes", "transpose", "zstd", "sharding_indexed", "crc32c"}
        if "sharding_indexed" in codecs(stored["codecs"]) and own != "errors":
            assert stored["chunk_grid"]["configuration"]["chunk_shape"][1] == manifest_of(path)["shard_rows"]


def codecs(chain: list[dict[str, Any]]) -> list[str]:
    found = []
    for codec in chain:
        inner = codec.get("configuration", {})
        found += [codec["name"], *codecs(inner.get("codecs", [])), *codecs(inner.get("index_codecs", []))]
    return found


def test_every_field_of_the_manifest_is_on_the_page(path: Path) -> None:
    for field in manifest_of(path):
        assert f"`{field}`" in PAGE or f"`{field}." in PAGE, field
    for field in manifest_of(path)["teachers"]["t"]:
        assert f"`{field}`" in PAGE or f"`{field}." in PAGE, field


def test_a_shard_without_a_record_is_not_committed(tmp_path: Path) -> None:
    path = tmp_path / "c.zarr"
    run(path, Pixels(COUNT), teachers={"t": teacher(DENSE32)}, shard_rows=128)
    (path / "t.logits.commits" / "c.1.2.0.0").unlink()
    records = array(path, "t.logits.commits")
    assert [bool(record.any()) for record in records[1, :, 0]] == [True, True, False]
