"""A cache from a cache: against brute force over the dense logits, and against what stage one writes."""

import os
import signal
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from pydantic import TypeAdapter
from torch import Tensor

from logitcache.cache.cache import open_cache
from logitcache.cache.encodings import Encoding
from logitcache.errors import RecipeError, Stopped
from logitcache.logits import TopKLogits, log_probs
from logitcache.stage_one.derive import derive_task
from logitcache.stage_one.derive.derive import derive
from logitcache.student.training import train
from logitcache.teacher import calibration
from tests.cache.made import DENSE16, DENSE32, FLIP_AND_CROP, Pixels, contents, flip, run, teacher, verified
from tests.stage_one.derived import CLASSES, COUNT, derivation, keys, softmax, source, stored
from tests.student import small
from tests.teacher.nets import FEATURES, Net, images, keeping

ENCODING: TypeAdapter[Any] = TypeAdapter(Encoding)
PLAIN: dict[str, dict[str, Any]] = {
    "float16": {"kind": "dense", "storage": "packed"},
    "float32": {"kind": "dense", "dtype": "float32", "storage": "packed"},
    "top_k": {"kind": "top_k", "k": 3, "storage": "packed"},
    "packed_top_k": {"kind": "packed_top_k", "k": 5},
    "uint8": {"kind": "uint8", "storage": "packed"},
}
PACKED32 = {"kind": "dense", "dtype": "float32", "storage": "packed"}
TRANSFORM = {"kind": "transform", "step": 0.2, "corrections": 4}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two teachers, two views of 300 images in six shards, with everything recorded of the views."""
    path = tmp_path_factory.mktemp("source") / "c.zarr"
    return source(path, row_checksums=True, record_parameters=True)


def rows(path: Path, name: str) -> dict[str, Any]:
    """Return the arrays of a teacher's logits by suffix, [V * N, ...], as zarr reads them."""
    group = zarr.open_group(path, mode="r")
    found = {}
    for array, values in group.arrays():
        suffix = array.removeprefix(f"{name}.logits").removeprefix(".")
        if array.startswith(f"{name}.logits") and suffix not in ("commits", "errors") and values.ndim >= 2:
            found[suffix] = values[:].reshape(-1, *values.shape[2:]) if values.shape[1] == COUNT else values[:]
    return found


@pytest.mark.parametrize("shard_rows", [None, 50, 256])
def test_rows_are_what_the_encoding_makes_of_the_stored_logits(
    two: Path, tmp_path: Path, shard_rows: int | None
) -> None:
    made = {name: {"members": {"a": 2}, "logits": entry} for name, entry in PLAIN.items()}
    result = derive(derivation(two, tmp_path / "d", made, shard_rows=shard_rows))
    assert (result.row_views, result.teacher_passes, result.shards_left) == (2 * COUNT, 0, 0)
    assert verified(tmp_path / "d") == ()
    logits = stored(two, "a")
    for name, entry in PLAIN.items():
        expected = ENCODING.validate_python(entry).encode(logits)
        found = rows(tmp_path / "d", name)
        assert found.keys() == expected.keys()
        for suffix, values in expected.items():
            np.testing.assert_array_equal(found[suffix], values.numpy())


@pytest.mark.parametrize("batch", [7, None])
def test_fitted_to_the_same_logits_it_is_what_stage_one_writes(
    tmp_path: Path, batch: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = {"kind": "auto", "max_kl": 0.05, "temperature": 2}
    logits = {"a": TRANSFORM, "b": auto if batch is None else PLAIN["uint8"]}
    made = {name: {"logits": entry} for name, entry in logits.items()}
    if batch is not None:
        monkeypatch.setattr(derive_task, "NUMBERS", batch * CLASSES)
    # Rows of a cache cost nothing, and all are taken; stage one answers fewer for so small a cache.
    monkeypatch.setattr(calibration, "FEWEST", calibration.ROWS)
    derive(derivation(source(tmp_path / "c"), tmp_path / "d", made))
    once = source(tmp_path / "once", {name: teacher(entry) for name, entry in logits.items()}, shard_rows=None)
    (ours, theirs) = (open_cache(tmp_path / "d").manifest.teachers, open_cache(once).manifest.teachers)
    for name in ("a", "b"):
        assert ours[name].stored_logits == theirs[name].stored_logits  # the digests of tables are in it
        assert ours[name].errors == theirs[name].errors
    same = [file for file in contents(once) if file.startswith(("a.", "b.")) and "zarr.json" not in file]
    assert len(same) > 10
    here, there = contents(tmp_path / "d"), contents(once)
    assert [file for file in same if here[file] != there[file]] == []


def test_of_rounded_logits_the_divergence_is_that_of_stage_one_within_rounding(tmp_path: Path) -> None:
    """Of float16 logits: recorded errors are against these, and against the teacher they hardly differ."""
    derive(derivation(source(tmp_path / "c", {"a": teacher(DENSE16)}), tmp_path / "d", {"a": {"logits": TRANSFORM}}))
    once = open_cache(source(tmp_path / "once", {"a": teacher(TRANSFORM)}))
    exact = torch.log_softmax(stored(source(tmp_path / "exact"), "a").double(), dim=1)
    divergence = []
    for cache in (open_cache(tmp_path / "d"), once):
        decoded = log_probs(cache.answers(keys(cache))["a"]).double()
        divergence.append(float((exact.exp() * (exact - decoded)).sum(dim=1).mean()))
    assert divergence[0] == pytest.approx(divergence[1], rel=0.02)
    recorded = open_cache(tmp_path / "d").manifest.teachers["a"].errors_of("logits")[0]
    assert recorded.mean == pytest.approx(divergence[0], rel=0.02)


@pytest.mark.parametrize("kept", [PACKED32, {"kind": "top_k", "k": 4, "storage": "packed"}])
@pytest.mark.parametrize(("average", "temperature"), [("logits", 1.0), ("probabilities", 1.0), ("probabilities", 4.0)])
def test_an_ensemble_is_the_mean_of_the_dense_logits_by_brute_force(
    two: Path, tmp_path: Path, average: str, temperature: float, kept: dict[str, Any]
) -> None:
    options = {} if temperature == 1.0 else {"temperature": temperature}
    made = {"both": {"members": {"b": 3, "a": 1}, "average": average, "logits": kept, **options}}
    derive(derivation(two, tmp_path / "d", made))
    a, b = (stored(two, name).double().numpy() for name in ("a", "b"))
    if average == "logits":
        mean = 0.25 * a + 0.75 * b
    else:
        mean = temperature * np.log(0.25 * softmax(a / temperature) + 0.75 * softmax(b / temperature))
    encoding = ENCODING.validate_python(kept)
    expected = encoding.decode(encoding.encode(torch.from_numpy(mean).float()), CLASSES)
    cache = open_cache(tmp_path / "d")
    found = cache.answers(keys(cache))["both"]
    if found.keeps_logits:
        torch.testing.assert_close(found.logits.double(), torch.from_numpy(mean), atol=2e-5, rtol=1e-5)
        at_temperature = softmax(found.logits.double().numpy() / temperature)
        np.testing.assert_allclose(at_temperature, softmax(mean / temperature), atol=1e-6)
    assert isinstance(found.compact, TopKLogits | Tensor)
    np.testing.assert_allclose(log_probs(found).numpy(), log_probs(expected).numpy(), atol=2e-3)
    assert verified(tmp_path / "d") == ()


def test_what_is_kept_is_copied_byte_for_byte(tmp_path: Path) -> None:
    head = keeping({"kind": "head", "dtype": "float32", "storage": "packed"}, FEATURES)
    run(tmp_path / "c", images(300), Net(), teachers={"t": head}, shard_rows=256)
    whole, derived = tmp_path / "whole", tmp_path / "some"
    derive(derivation(tmp_path / "c", whole, {"t": {"keep": "all"}}))
    before, after = contents(tmp_path / "c"), contents(whole)
    assert {file for file in before if before[file] != after[file]} == {"zarr.json"}
    made = {"n": {"members": {"t": 1}, "logits": PACKED32, "keep": ["projected", "bytes"]}}
    derive(derivation(tmp_path / "c", derived, made))
    found, expected = open_cache(derived), open_cache(tmp_path / "c")
    ours, theirs = (cache.answers(keys(cache)) for cache in (found, expected))
    assert ours["n"].features.keys() == {"projected", "bytes"}
    for name, feature in ours["n"].features.items():
        assert torch.equal(feature, theirs["t"].features[name])
        assert found.manifest.teachers["n"].errors[name] == expected.manifest.teachers["t"].errors[name]
    assert torch.equal(stored(derived, "n"), stored(tmp_path / "c", "t"))
    assert (verified(whole), verified(derived)) == ((), ())
    for table in ("t.logits.weight/c/0/0", "t.projected.basis/c/0/0"):
        flip(whole / table, 5)
        assert derive(derivation(tmp_path / "c", whole, {"t": {"keep": "all"}})).shards_written == 0
        assert contents(whole) == after
    derive(derivation(tmp_path / "c", tmp_path / "features", {"t": {"keep": ["pooled"]}}))
    with pytest.raises(RecipeError, match=r"keeps no logits of 't'. Fix: `keep` its features"):
        derive(derivation(tmp_path / "features", tmp_path / "e", {"t": {"logits": PACKED32}}))


def test_images_views_and_what_proves_them_are_those_of_the_source(two: Path, tmp_path: Path) -> None:
    derive(derivation(two, tmp_path / "d", {"a": {"logits": PLAIN["top_k"]}}, num_views=1))
    ours, theirs = open_cache(tmp_path / "d"), open_cache(two)
    assert (ours.num_views, theirs.num_views) == (1, 2)
    assert ours.manifest.views.model_copy(update={"num_views": 2}) == theirs.manifest.views
    for key in ("fingerprint", "image_shape", "row_checksums", "parameters"):
        assert getattr(ours.manifest, key) == getattr(theirs.manifest, key)
    assert ours.manifest.canaries == tuple(canary for canary in theirs.manifest.canaries if canary.view == 0)
    here = keys(ours)
    np.testing.assert_array_equal(ours.row_checksums(here), theirs.row_checksums(here))
    np.testing.assert_array_equal(ours.parameters(here), theirs.parameters(here))
    np.testing.assert_array_equal(ours.labels, theirs.labels)
    # Every image is rendered here again, and compared.
    for replay in ("planned", "recorded"):
        loader = ours.loader(64, dataset=Pixels(COUNT, CLASSES), replay=replay)  # type: ignore[arg-type]
        assert sum(len(batch) for batch in loader.epoch(0)) == COUNT


def test_it_says_whose_answers_they_are(two: Path, tmp_path: Path) -> None:
    made = {
        "a": {"logits": TRANSFORM},
        "both": {"members": {"a": 1, "b": 1}, "average": "logits", "logits": TRANSFORM},
        "other": {"members": {"a": 1, "b": 2}, "average": "logits", "logits": TRANSFORM},
    }
    derive(derivation(two, tmp_path / "d", made))
    ours, theirs = open_cache(tmp_path / "d").manifest.teachers, open_cache(two).manifest.teachers
    assert ours["a"].weights == theirs["a"].weights
    assert len({entry.weights for entry in (*ours.values(), *theirs.values())}) == 4
    model = ours["both"].model
    assert isinstance(model, dict)
    members: Any = model["members"]
    assert (model["kind"], model["average"], list(members)) == ("derived", "logits", ["a", "b"])
    assert [member["weight"] for member in members.values()] == [0.5, 0.5]
    assert members["b"]["weights"] == theirs["b"].weights


def test_memory_is_bounded_by_shards_whatever_their_number(tmp_path: Path) -> None:
    """Of the same images, whose labels and digests are all held, four shards and sixteen."""
    entries = {name: teacher({**DENSE32, "storage": "packed"}) for name in ("a", "b")}
    views = {"num_views": 8, "augmentations": FLIP_AND_CROP}
    path = source(tmp_path / "c", entries, 1024, shard_rows=512, views=views, batch_size=512)
    made = {"both": {"members": {"a": 1, "b": 1}, "average": "probabilities", "logits": PACKED32}}
    peaks = []
    for number in (1, 2, 8):  # the first also pays for what is imported late
        plan = derivation(path, tmp_path / f"{number}", made, shard_rows=512, num_views=number)
        tracemalloc.start()
        assert derive(plan).shards_written == 2 * number
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 8 * 512 * CLASSES * 4, peaks


def test_a_derived_cache_may_be_derived_from(two: Path, tmp_path: Path) -> None:
    derive(derivation(two, tmp_path / "d", {"a": {"logits": PLAIN["float32"]}}))
    derive(derivation(tmp_path / "d", tmp_path / "e", {"a": {"logits": PLAIN["top_k"]}}))
    derive(derivation(two, tmp_path / "f", {"a": {"logits": PLAIN["top_k"]}}))
    here, there = rows(tmp_path / "e", "a"), rows(tmp_path / "f", "a")
    for suffix, values in there.items():
        np.testing.assert_array_equal(here[suffix], values)
    weights = {open_cache(tmp_path / name).manifest.teachers["a"].weights for name in "def"}
    assert weights == {open_cache(two).manifest.teachers["a"].weights}


def test_linear_targets_stay_those_of_the_images_before_mixing(tmp_path: Path) -> None:
    views = {"num_views": 2, "mixing": [{"kind": "mixup"}], "targets": "linear"}
    path = source(tmp_path / "c", views=views)
    derive(derivation(path, tmp_path / "d", {"a": {"logits": PACKED32}}))
    ours, theirs = open_cache(tmp_path / "d"), open_cache(path)
    some = keys(ours)[:50]
    mixed = [log_probs(cache.rows(some)["a"]) for cache in (ours, theirs)]
    assert torch.equal(*mixed)


def test_a_student_learns_from_it_as_from_its_source(tmp_path: Path) -> None:
    """The images are rendered and compared with the recorded checksums; the logits are the same numbers."""
    path = small.fill(tmp_path / "c", row_checksums=True)
    derive(derivation(path, tmp_path / "d", {"net": {"logits": PACKED32}}))
    losses = []
    for cache in (path, tmp_path / "d"):
        with small.recorded_losses() as found:
            result = train(small.student(tmp_path / f"run.{cache.name}", cache, epochs=1))
        assert result.teacher_passes == 0
        losses.append(found)
    assert losses[0] == losses[1]
    assert small.weights(tmp_path / "run.c") == small.weights(tmp_path / "run.d")


def test_a_signal_stops_it_and_the_same_recipe_continues(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, plan = tmp_path / "whole", derivation(two, tmp_path / "d", {"a": {"logits": PACKED32}}, shard_rows=64)
    derive(plan.model_copy(update={"out": str(whole)}))
    real, begun = derive_task.DeriveTask._fill, []

    def signalled(*given: Any) -> Any:
        begun.append(given)
        if len(begun) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(derive_task.DeriveTask, "_fill", signalled)
    with pytest.raises(Stopped, match="stopped: 3 of the 10 shards that were to do are committed") as error:
        derive(plan)
    assert error.value.exit_code == 75
    assert len(list((tmp_path / "d" / "a.logits").glob("c.*"))) == 3
    assert derive(plan).shards_written == 7
    assert contents(tmp_path / "d") == contents(whole)


def test_a_recipe_of_a_run_that_is_complete_does_nothing(two: Path, tmp_path: Path) -> None:
    plan = derivation(two, tmp_path / "d", {"a": {"logits": TRANSFORM}})
    assert derive(plan).shards_written == 5 * 2
    before = contents(tmp_path / "d")
    assert derive(plan).shards_written == 0
    assert contents(tmp_path / "d") == before


def test_what_is_encoded_anew_is_packed_where_the_shards_of_what_is_kept_do_not_fill_pages(tmp_path: Path) -> None:
    hot = {"kind": "top_k", "k": 3, "storage": "hot"}
    cache = source(tmp_path / "c")
    derive(derivation(cache, tmp_path / "d", {"a": {"keep": "all"}, "b": {"logits": hot}}))
    assert verified(tmp_path / "d") == ()
    made = open_cache(tmp_path / "d").manifest
    forms = [made.teachers[name].stored_logits for name in "ab"]
    assert [form.form.storage for form in forms if form is not None] == ["hot", "packed"]
    expected = ENCODING.validate_python(hot).encode(stored(cache, "b"))
    assert rows(tmp_path / "d", "b").keys() == expected.keys()
    assert derive(derivation(cache, tmp_path / "d", {"a": {"keep": "all"}, "b": {"logits": hot}})).shards_written == 0
