"""What `plan` tells, against what `precompute` then writes; time is for benchmarks/plan.py."""

import json
import re
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from logitcache.cache.cache import open_cache
from logitcache.cli import main
from logitcache.config.recipe import load_recipe
from logitcache.errors import CacheError, DataError, MismatchError, RecipeError
from logitcache.planning import dry_run
from logitcache.planning.plan import plan
from logitcache.runtime import console
from logitcache.stage_one.precompute import precompute
from logitcache.teacher import calibration
from logitcache.teacher.precompute_recipe import PrecomputeRecipe
from logitcache.views.canaries import NUM_CANARIES
from logitcache.views.datasets.map_style import MapImages
from tests.cache.made import (
    COUNT,
    DENSE16,
    ENCODINGS,
    PACKED,
    PACKED_TOP2,
    TRANSFORM,
    Linear,
    Pixels,
    flip,
    recipe,
    run,
    shard_files,
    stamps,
    teacher,
    write_images,
)
from tests.stage_one.runs import Stopping, entry, partial, truncated
from tests.teacher.nets import FEATURES, Net, images, keeping

Usage = namedtuple("Usage", ["total", "used", "free"])


def told(path: Path, count: int = COUNT, module: nn.Module | None = None, **changes: Any) -> dict[str, Any]:
    """Plan what `made` and `run` make."""
    options = {
        name: changes.pop(name) for name in ("batches", "taps", "workers", "probing", "dataset") if name in changes
    }
    given = {"t": module or Linear()}
    return plan(recipe(path, **changes), teachers=given, **{"dataset": Pixels(count), **options})


def require_told(document: dict[str, Any], path: Path, off: float = 0.05, most: int = 0) -> None:
    """Compare with a finished cache: files exactly, bytes of every array within a part of it, or `most` a file."""
    for array in document["arrays"]:
        files = shard_files(path, array["array"])
        assert array["files"] == len(files)
        size, away = sum(file.stat().st_size for file in files), most * len(files)
        assert array["bytes"] == pytest.approx(size, rel=off, abs=away), array["array"]
    every = [file for file in path.rglob("*") if file.is_file()]
    assert document["files"] == len(every)
    assert document["bytes"] == pytest.approx(sum(file.stat().st_size for file in every), rel=off)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "c"
    run(path, Pixels(COUNT), shard_rows=128)
    return path


@pytest.fixture
def cache(sound: Path, tmp_path: Path) -> Path:
    """A finished cache: six shards of dense float16 logits."""
    return Path(shutil.copytree(sound, tmp_path / "c"))


@pytest.mark.parametrize("name", ENCODINGS)
def test_bytes_and_files_are_those_of_the_run_that_follows(name: str, tmp_path: Path) -> None:
    rows = None if name in ("top_k", "uint8") else 128  # their shards of 128 rows would not fill whole pages
    options = {"teachers": {"t": teacher(ENCODINGS[name])}, "shard_rows": rows}
    document = told(tmp_path / "c", **options)
    run(tmp_path / "c", Pixels(COUNT), **options)
    require_told(document, tmp_path / "c")
    assert (document["new_files"], document["new_bytes"]) == (document["files"], document["bytes"])
    assert (document["state"], document["row_views_to_do"]) == ("new", 2 * COUNT)


@pytest.mark.parametrize("logits", [PACKED, PACKED_TOP2], ids=lambda entry: str(entry["kind"]))
def test_a_probe_of_some_batches_tells_what_all_of_them_take(logits: Any, tmp_path: Path) -> None:
    options = {"teachers": {"t": teacher(logits)}, "shard_rows": 2048, "batch_size": 200}
    document = told(tmp_path / "c", 3000, views={}, batches=4, **options)
    assert (document["probe"]["batches"], document["probe"]["row_views"]) == (4, 800)
    run(tmp_path / "c", Pixels(3000), views={}, **options)
    # Sums of errors by shard are a few hundred bytes, whatever is in it; arrays of zeros are even less.
    document["arrays"] = [array for array in document["arrays"] if not array["array"].endswith(".errors")]
    require_told(document, tmp_path / "c", most=16)


def test_features_are_told_one_by_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"teachers": {"t": keeping(features=FEATURES)}, "batch_size": 30}
    document = told(tmp_path / "c", module=Net(), dataset=images(), views={"num_views": 2}, **options)
    run(tmp_path / "c", images(), Net(), views={"num_views": 2}, **options)
    require_told(document, tmp_path / "c")
    features = {feature["feature"]: feature for feature in document["features"]}
    assert features.keys() == {f"t.{name}" for name in FEATURES}
    for name, feature in features.items():
        stored = [file.stat().st_size for file in tmp_path.glob(f"c/{name}*/c.*") if ".commits" not in file.parent.name]
        own = [size for size in stored if size]
        assert feature["bytes"] <= sum(own) * 1.05
    assert features["t.maps"]["bytes"] > features["t.small"]["bytes"] > features["t.pooled"]["bytes"]


def test_what_is_recorded_of_views_counts(tmp_path: Path) -> None:
    options = {"row_checksums": True, "record_parameters": True, "shard_rows": 128, "views_per_image": 2}
    document = told(tmp_path / "c", **options)
    run(tmp_path / "c", Pixels(COUNT), **options)
    require_told(document, tmp_path / "c")
    assert {"views.crc32", "views.parameters"} < {array["array"] for array in document["arrays"]}


def test_mixed_views_are_planned_too(tmp_path: Path) -> None:
    views = {"num_views": 2, "mixing": [{"kind": "mixup"}], "pairing_window": 50}
    options = {"views": views, "shard_rows": 128, "teachers": {"t": teacher(PACKED)}}
    document = told(tmp_path / "c", **options)
    run(tmp_path / "c", Pixels(COUNT), **options)
    require_told(document, tmp_path / "c")


def test_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    before = stamps(tmp_path / "work")
    told(tmp_path / "work" / "deep" / "c")
    assert stamps(tmp_path / "work") == before
    partial(tmp_path / "work" / "c")
    before = stamps(tmp_path / "work")
    told(tmp_path / "work" / "c", shard_rows=128)
    told(tmp_path / "work" / "c", shard_rows=128, views={**recipe(tmp_path).views.model_dump(), "num_views": 4})
    assert stamps(tmp_path / "work") == before


def test_of_a_run_that_was_stopped_the_rest_is_planned(tmp_path: Path) -> None:
    partial(tmp_path / "c")
    there = {str(file) for file in (tmp_path / "c").rglob("*") if file.is_file()}
    document = told(tmp_path / "c", shard_rows=128)
    result = run(tmp_path / "c", Pixels(COUNT), shard_rows=128)
    assert document["state"] == "resume"
    assert 0 < document["shards_to_do"] == result.shards_written < document["shards"]
    require_told(document, tmp_path / "c")
    added = [file for file in (tmp_path / "c").rglob("*") if file.is_file() and str(file) not in there]
    assert document["new_files"] == len(added)
    assert document["new_bytes"] == pytest.approx(sum(file.stat().st_size for file in added), rel=0.05)


def test_damaged_shards_are_to_be_written_again(cache: Path) -> None:
    flip(shard_files(cache)[1], 5)
    document = told(cache, shard_rows=128)
    assert (document["state"], document["shards_to_do"]) == ("resume", 1)


def test_of_a_cache_that_grows_the_difference_is_planned(cache: Path) -> None:
    there = {str(file) for file in (cache).rglob("*") if file.is_file()}
    more = {"views": {**recipe(cache).views.model_dump(), "num_views": 5}}
    document = told(cache, shard_rows=128, **more)
    run(cache, Pixels(COUNT), shard_rows=128, **more)
    assert (document["state"], document["shards"], document["shards_to_do"]) == ("growth", 15, 9)
    require_told(document, cache)
    added = [file for file in (cache).rglob("*") if file.is_file() and str(file) not in there]
    assert document["new_files"] == len(added)


def test_a_further_teacher_is_planned_alone(cache: Path) -> None:
    both = {"teachers": {"t": teacher(), "u": teacher(PACKED_TOP2)}, "shard_rows": 128}
    given = {"t": Linear(), "u": Linear(seed=1)}
    document = plan(recipe(cache, **both), teachers=given, dataset=Pixels(COUNT))
    precompute(recipe(cache, **both), teachers=given, dataset=Pixels(COUNT))
    assert (document["state"], document["row_views_to_do"]) == ("growth", 2 * COUNT)
    require_told(document, cache)


def test_a_complete_cache_has_nothing_to_do(cache: Path) -> None:
    document = told(cache, shard_rows=128)
    assert (document["state"], document["shards_to_do"], document["new_bytes"]) == ("complete", 0, 0)
    assert document["probe"]["batches"] == 0
    require_told(document, cache, off=1e-9)


def test_a_disk_that_would_fill_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def usage(path: Path) -> Usage:
        assert path == tmp_path  # the nearest folder that is there
        return Usage(10**6, 10**6 - 5000, 5000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.warns(UserWarning, match=r"takes .* kB more, and its disk has 5 kB free: it would fill\. Fix: "):
        document = told(tmp_path / "deep" / "c", shard_rows=128)
    assert (document["fits"], document["free_bytes"]) == (False, 5000)
    assert "it would fill" in document["warnings"][0]


def test_a_disk_with_room_is_not_warned_of(tmp_path: Path) -> None:
    document = told(tmp_path / "c", shard_rows=128)
    assert document["fits"] is True
    assert document["warnings"] == []


def test_time_has_its_parts_and_pays_at_some_number_of_students(tmp_path: Path) -> None:
    document = told(tmp_path / "c", shard_rows=128)
    parts = [seconds if isinstance(seconds, list) else [seconds] * 2 for seconds in document["time"].values()]
    assert document["seconds"] == pytest.approx([sum(ends) for ends in zip(*parts, strict=True)])
    assert all(0 <= least <= most for least, most in parts)
    assert document["break_even_students"] >= 1
    assert any(f"from {document['break_even_students']} students on" in note for note in document["notes"])


def test_views_are_rendered_by_as_many_processes_as_in_the_run(tmp_path: Path) -> None:
    options = {"num_workers": 1, "start_method": "fork", "shard_rows": 128}
    with_process, without = told(tmp_path / "c", **options), told(tmp_path / "c", shard_rows=128)
    assert with_process["arrays"] == without["arrays"]
    assert with_process["memory"]["rendered_bytes"] == 3 * without["memory"]["rendered_bytes"]


def test_several_workers_are_an_estimate_that_says_so(tmp_path: Path) -> None:
    document = told(tmp_path / "c", shard_rows=128, workers=2)
    assert any("2 workers are not measured" in note for note in document["notes"])


def test_trials_of_a_variant_are_no_calibration(tmp_path: Path) -> None:
    asked = teacher(DENSE16) | {"speed": {"channels_last": True, "fold": True}}
    plain, faster = (told(tmp_path / "c", teachers={"t": entry}) for entry in (teacher(DENSE16), asked))
    assert faster["probe"]["calibration_row_views_wanted"] == 0
    assert faster["teacher_passes"] == plain["teacher_passes"]


class Counted(Linear):
    """A teacher that counts the images that it and its variants take."""

    images = 0

    def forward(self, images: Tensor) -> Tensor:
        Counted.images += len(images)
        return super().forward(images)


@pytest.mark.parametrize(("speed", "passes"), [(None, 2), ({"channels_last": True}, 4)])
def test_few_canaries_are_answered_and_the_time_of_all_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speed: object, passes: int
) -> None:
    wanted = recipe(tmp_path / "c", teachers={"t": teacher(DENSE16) | {"speed": speed}})
    monkeypatch.setattr(Counted, "images", 0)
    with dry_run.dry_run(wanted, teachers={"t": Counted()}, dataset=Pixels(200)) as run:
        assert Counted.images == (2 + passes) * dry_run.PACED
        assert len(run.todo.goal.canaries) == NUM_CANARIES
        assert run.canaries_left_out == passes * (NUM_CANARIES - dry_run.PACED)
    monkeypatch.setattr(Counted, "images", 0)
    precompute(wanted, teachers={"t": Counted()}, dataset=Pixels(200))
    assert Counted.images == passes * NUM_CANARIES + 400


def test_calibration_on_fewer_rows_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "CALIBRATION_SECONDS", 0.0)
    monkeypatch.setattr(dry_run, "FEWEST_ROWS", 100)
    document = told(tmp_path / "c", shard_rows=128, teachers={"t": teacher(TRANSFORM)})
    assert document["probe"]["calibration_row_views"] == dry_run.FEWEST_ROWS
    assert document["probe"]["calibration_row_views_wanted"] == calibration.FEWEST
    assert any("100 row-views here, and to 256 by precompute" in note for note in document["notes"])


class Twice(nn.Module):
    """Modules that cannot be tapped beside some that can."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(3, 6, 3, padding=1)
            self.relu = nn.ReLU(inplace=True)
            self.same = nn.Identity()
            self.block = nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(96, 4), nn.Identity())
            self.idle = nn.Linear(4, 4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.block(self.same(self.same(self.relu(self.conv(pixels)))))


def test_taps_tell_what_each_module_would_take(tmp_path: Path) -> None:
    document = told(tmp_path / "c", count=60, module=Twice(), taps=True)
    taps = {tap["tap"]: tap for tap in document["taps"]}
    # The convolution's output is changed in place, `same` runs twice, `idle` never; dropout and identity return their
    # input; the output of the last layer is its block's.
    assert list(taps) == ["block", "block.1", "relu"]
    assert (taps["relu"]["shape"], taps["relu"]["pooled_row_bytes"], taps["relu"]["maps_row_bytes"]) == (
        [6, 4, 4],
        12,
        192,
    )
    assert taps["relu"]["maps_bytes"] == 192 * 60 * 2
    kept = {"t": teacher(features={"maps": {"kind": "maps", "tap": "relu"}})}
    run(tmp_path / "d", Pixels(60), Twice(), teachers=kept)
    stored = sum(file.stat().st_size for file in shard_files(tmp_path / "d", "t.maps"))
    assert stored >= taps["relu"]["maps_bytes"]


class ChannelsLast(nn.Module):
    """Maps [B, 4, 4, 6] at `relu`; and at `cube` [B, 3, 3, 3], whatever the image: nothing says its channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.relu = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()
        self.vector, self.cube, self.fc = nn.Linear(6, 27), nn.Unflatten(1, (3, 3, 3)), nn.Linear(27, 4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        maps = self.relu(self.conv(pixels).permute(0, 2, 3, 1))
        return self.fc(self.cube(self.vector(maps.mean(dim=(1, 2)))).flatten(1))


def test_taps_are_sized_by_where_their_channels_are(tmp_path: Path) -> None:
    document = told(tmp_path / "c", count=60, module=ChannelsLast(), taps=True)
    taps = {tap["tap"]: tap for tap in document["taps"]}
    assert (taps["relu"]["shape"], taps["relu"]["pooled_row_bytes"], taps["relu"]["maps_row_bytes"]) == (
        [6, 4, 4],
        12,
        192,
    )
    assert (taps["cube"]["pooled_row_bytes"], taps["cube"]["pooled_bytes"], taps["cube"]["maps_row_bytes"]) == (
        None,
        None,
        54,
    )
    kept = {"t": teacher(features={"pooled": {"kind": "pooled", "tap": "relu", "storage": "packed"}})}
    run(tmp_path / "d", Pixels(60), ChannelsLast(), teachers=kept)
    assert open_cache(tmp_path / "d").manifest.teachers["t"].stored_features["pooled"].shape == (6,)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"views": {"seed": 4}}, MismatchError, "was made by another recipe"),
        ({"shard_rows": 256}, MismatchError, "shard_rows"),
        ({"dataset": Pixels(COUNT, seed=1)}, MismatchError, "images"),
        ({"dataset": Pixels(7)}, MismatchError, "images"),
        ({"module": Linear(seed=5)}, MismatchError, "weights"),
        ({"batches": 0}, RecipeError, "at least 1"),
        ({"workers": 0}, RecipeError, "at least 1"),
    ],
)
def test_what_precompute_refuses_is_refused(
    changes: dict[str, Any], kind: type[Exception], message: str, cache: Path
) -> None:
    with pytest.raises(kind, match=message):
        told(cache, **{"shard_rows": 128, **changes})


def test_a_place_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CacheError, match="is no cache"):
        told(tmp_path)


def test_a_damaged_skeleton_is_refused(cache: Path) -> None:
    flip(cache / "label" / "c" / "0", 0)
    with pytest.raises(CacheError, match="is damaged"):
        told(cache, shard_rows=128)


def test_an_image_that_cannot_be_read_is_named_and_not_noted(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", {"ant": 200, "bee": 200})
    truncated(root)
    (tmp_path / "work").mkdir()
    changed = recipe(tmp_path / "work" / "c", dataset=entry(root))
    with pytest.raises(DataError, match="012"):
        plan(changed, teachers={"t": Linear(2)})
    assert not list((tmp_path / "work").iterdir())


def test_a_teacher_that_fails_leaves_no_hooks(tmp_path: Path) -> None:
    module = Stopping(3)
    with pytest.raises(KeyboardInterrupt):
        told(tmp_path / "c", module=module, shard_rows=128)
    assert not list(tmp_path.iterdir())
    assert not module._forward_hooks


def test_a_cache_at_a_url_has_no_disk(memory_url: str) -> None:
    changed = recipe(Path("c")).model_copy(update={"cache": memory_url})
    document = plan(changed, teachers={"t": Linear()}, dataset=Pixels(COUNT))
    assert document["free_bytes"] is document["fits"] is None
    assert document["requests"]["puts"] == document["files"]
    assert any("free space at a URL is not known" in note for note in document["notes"])


@pytest.fixture
def memory_url() -> Iterator[str]:
    import fsspec

    yield "memory://plan/c.zarr"
    files = fsspec.filesystem("memory")
    if files.exists("/plan"):
        files.rm("/plan", recursive=True)


def test_of_a_cache_at_a_url_only_what_it_lacks_is_planned(memory_url: str) -> None:
    changed = recipe(Path("c")).model_copy(update={"cache": memory_url})
    precompute(changed, teachers={"t": Linear()}, dataset=Pixels(COUNT))
    document = plan(changed, teachers={"t": Linear()}, dataset=Pixels(COUNT))
    assert (document["state"], document["new_files"], document["new_bytes"]) == ("complete", 0, 0)
    more = changed.model_copy(update={"views": changed.views.model_copy(update={"num_views": 3})})
    document = plan(more, teachers={"t": Linear()}, dataset=Pixels(COUNT))
    assert document["state"] == "growth"
    assert document["row_views_to_do"] == COUNT * (3 - changed.views.num_views)


def test_the_command_tells_it_as_text_and_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    bundled = {"kind": "bundled", "split": "train", "num_images": 60}
    entry = {"teacher": {"model": {"kind": "bundled"}}}
    plain = {"cache": str(tmp_path / "c"), "dataset": bundled, "teachers": entry, "num_workers": 0}
    file.write_text(yaml.safe_dump(plain))
    assert main(["plan", str(file), "--set", "views.num_views=2", "-q", "--json", "--taps", "--batches", "1"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["row_views_to_do"] == 120
    assert document["taps"]
    assert main(["plan", str(file), "-q"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("work      60 images × 1 view on ")
    assert re.search(r"^cache     .*/c: .* in \d+ files; .* are free$", text, re.MULTILINE)
    assert "students on, if each trains 1 epoch or more." in text
    assert len(text.splitlines()) < 15
    assert main(["plan", str(file), "-v"]) == 0
    every = capsys.readouterr().out
    assert every.startswith("work ")
    assert "teacher.logits" in every
    assert not (tmp_path / "c").exists()


def test_a_misspelt_key_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="num_view"):
        load_recipe({"cache": str(tmp_path), "num_view": 1, "teachers": {"t": teacher(DENSE16)}}, PrecomputeRecipe)


class Seen(Linear):
    """A teacher that counts images, beside a data set that reads none twice and hashes none."""

    images = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        Seen.images += len(images)
        return super().forward(images)


@pytest.mark.parametrize("logits", [*ENCODINGS.values(), {"kind": "auto", "max_kl": 1e-3}], ids=str)
def test_without_a_probe_files_and_bytes_are_bounds_and_two_images_are_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, logits: dict[str, Any]
) -> None:
    changes = {"teachers": {"t": teacher(logits)}, "row_checksums": True}
    Seen.images = 0
    with monkeypatch.context() as unhashed:
        unhashed.setattr(MapImages, "digests", lambda self: pytest.fail("every image is read"))
        document = told(tmp_path / "c", module=Seen(), probing=False, **changes)
    assert Seen.images <= 2
    assert not (tmp_path / "c").exists()
    run(tmp_path / "c", Pixels(COUNT), **changes)
    sizes = {row["array"]: row for row in document["arrays"]}
    for name in open_cache(tmp_path / "c").layout.arrays:
        files = shard_files(tmp_path / "c", name.name)
        if name.name in sizes:
            row, size = sizes[name.name], sum(file.stat().st_size for file in files)
            assert row["bytes"] == size if row["bound"] == "exact" else row["bytes"] >= size, name.name
    every = [file for file in (tmp_path / "c").rglob("*") if file.is_file()]
    fitted = logits["kind"] in ("auto", "transform")
    assert document["files"] == len(every) or (fitted and document["files"] > 0)
    assert document["bytes"] >= 0.99 * sum(file.stat().st_size for file in every)
    assert any("at most" in note for note in document["notes"])
    assert document["stop_loses"]["row_views"] == min(COUNT, document["shard_rows"])
    again = told(tmp_path / "c", probing=False, **changes)
    assert (again["state"], again["shards_to_do"]) == ("complete", 0)
    more = told(tmp_path / "c", probing=False, **changes, views={"num_views": 3, "seed": 3, "augmentations": []})
    assert (more["state"], more["shards_to_do"]) == ("growth", more["shards"] // 3)


def test_features_are_bounded_without_a_probe(tmp_path: Path) -> None:
    document = told(
        tmp_path / "c",
        module=Net(),
        dataset=images(),
        teachers={"t": keeping({"kind": "head"}, FEATURES)},
        probing=False,
    )
    run(tmp_path / "c", images(), Net(), teachers={"t": keeping({"kind": "head"}, FEATURES)})
    sizes = {row["array"]: row for row in document["arrays"]}
    for array in open_cache(tmp_path / "c").layout.arrays:
        size = sum(file.stat().st_size for file in shard_files(tmp_path / "c", array.name))
        row = sizes[array.name]
        assert row["bytes"] == size if row["bound"] == "exact" else row["bytes"] >= size, array.name


def test_the_command_answers_without_a_probe_and_refuses_batches_of_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.yaml"
    folder = write_images(tmp_path / "images", {"a": 40, "b": 40})
    model = {"kind": "custom", "factory": "tests.cache.made:Linear", "arguments": {"num_classes": 2}}
    entry = {"t": teacher(DENSE16) | {"model": model}}
    images = {"kind": "image_folder", "root": str(folder)}
    file.write_text(
        yaml.safe_dump({"cache": str(tmp_path / "c"), "dataset": images, "teachers": entry, "device": "cpu"})
    )
    assert main(["plan", str(file), "--no-probe", "-v"]) == 0
    text = capsys.readouterr().out
    assert "at most" in text
    assert re.search(r"t\.logits +hot +4 .*exact", text)
    assert main(["plan", str(file), "--no-probe", "--batches", "3"]) == 2
    assert "Fix: leave out one of both" in capsys.readouterr().err


def test_a_stop_loses_the_shards_in_progress_as_plan_and_precompute_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = told(tmp_path / "c", shard_rows=128, views_per_image=2)
    assert document["stop_loses"]["row_views"] == 256
    assert 0 < document["stop_loses"]["seconds"] < 60
    console.configure()
    try:
        run(tmp_path / "c", Pixels(COUNT), shard_rows=128, views_per_image=2)
    finally:
        console.configure(quiet=True)
    assert "6 shards to do; a stop loses at most the 256 row-views in progress" in capsys.readouterr().err
