"""A teacher of more classes than the data set answers as one whose last layer has the classes' outputs alone."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

import logitcache as lc
from logitcache.cache.cache import open_cache
from logitcache.cli import main
from logitcache.errors import CacheError, MismatchError, RecipeError
from logitcache.models import Checkpoint, SmallCNN, save_weights
from logitcache.models.small_cnn import small_cnn
from logitcache.report.beside_teachers import _built
from logitcache.report.inspect import inspect_cache
from logitcache.report.summary import summarize
from logitcache.stage_one.derive.derive import derive
from logitcache.stage_one.precompute import precompute
from logitcache.student.training_recipes import StudentRecipe
from logitcache.targets import feature_values
from logitcache.teacher.online import live_targets
from logitcache.views.keys import ViewKey
from tests.cache.made import (
    DENSE16,
    DENSE32,
    Linear,
    Pixels,
    contents,
    flip,
    forge,
    recipe,
    run,
    shard_files,
    teacher,
    verified,
    write_images,
)
from tests.stage_one.derived import derivation, keys, stored
from tests.teacher.nets import CLASSES, FEATURES, Net, images, keeping

OUTPUTS = 9
CHOSEN = (8, 2, 5, 0, 3)
HEAD = {"kind": "head", "dtype": "float32", "storage": "packed"}
ENCODINGS: dict[str, dict[str, Any]] = {
    "dense": {**DENSE32, "storage": "packed"},
    "top_k": {"kind": "top_k", "k": 3, "storage": "packed"},
    "uint8": {"kind": "uint8", "storage": "packed"},
    "transform": {"kind": "transform", "step": 0.1, "corrections": 2},
    "head": HEAD,
}
VIEW = {"num_views": 1, "seed": 3}
KEPT = {name: feature | {"storage": "packed"} for name, feature in FEATURES.items()}
"""Packed, so that shards may have any rows."""


def wide() -> Net:
    return Net(OUTPUTS)


def narrow() -> Net:
    """Return the network whose last layer has the chosen rows of the other's."""
    net = wide()
    layer = nn.Linear(4, CLASSES).double()
    layer.weight.data, layer.bias.data = net.fc.weight[list(CHOSEN)].clone(), net.fc.bias[list(CHOSEN)].clone()
    net.fc = layer.requires_grad_(False)
    return net


def make(path: Path, module: nn.Module, logits: Any = None, features: Any = None, **source: Any) -> Any:
    entry = keeping(logits, features) | source
    run(path, images(20), module, teachers={"t": entry}, views=VIEW, shard_rows=20)
    return open_cache(path)


@pytest.mark.parametrize("name", ENCODINGS)
def test_chosen_outputs_are_kept_as_those_of_a_teacher_that_has_no_others(name: str, tmp_path: Path) -> None:
    found = make(tmp_path / "wide", wide(), ENCODINGS[name], KEPT, classes=list(CHOSEN))
    wanted = make(tmp_path / "narrow", narrow(), ENCODINGS[name], KEPT)
    entry = found.manifest.teachers["t"]
    assert (entry.num_classes, entry.classes) == (CLASSES, CHOSEN)
    one, two = (cache.rows(keys(cache))["t"] for cache in (found, wanted))
    torch.testing.assert_close(one.log_probs(2.0), two.log_probs(2.0), atol=1e-4, rtol=1e-4)
    for feature in KEPT:
        torch.testing.assert_close(feature_values(one.features[feature]), feature_values(two.features[feature]))
    if name == "head":
        weight, bias = (tensor for tensor in found.head("t"))
        torch.testing.assert_close(
            weight.double(), wide().fc.weight[list(CHOSEN)], check_dtype=False, atol=1e-6, rtol=0
        )
        torch.testing.assert_close(bias.double(), wide().fc.bias[list(CHOSEN)], atol=1e-6, rtol=0)


def test_divergence_and_accuracy_are_those_of_the_chosen_columns(tmp_path: Path) -> None:
    cache = make(tmp_path / "c", wide(), classes=list(CHOSEN))
    pixels = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images(20).images])
    logits = wide()((pixels / 255 - 0.5) / 0.5)[:, list(CHOSEN)]
    labels = torch.arange(20) % CLASSES
    accuracy = float((logits.argmax(dim=1) == labels).double().mean())
    assert inspect_cache(tmp_path / "c")["teachers"]["t"]["top1"] == pytest.approx(accuracy)
    assert vars(summarize(tmp_path / "c").teachers[0])["top1"] == pytest.approx(accuracy)
    student = torch.randn(20, CLASSES)
    targets = cache.rows(keys(cache))["t"]
    log_p, p = torch.log_softmax(student.double() / 4, dim=1), torch.softmax(logits / 4, dim=1)
    wanted = 16 * F.kl_div(log_p, p, reduction="batchmean")
    assert float(lc.losses.kl_divergence(student, targets, 4.0)) == pytest.approx(float(wanted), rel=1e-5)


def live(cache: Any, path: Path, **given: Any) -> Tensor:
    pixels = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images(20).images])
    answers = live_targets(str(path), "cpu", **given)(pixels, torch.as_tensor(cache.labels))
    return answers["t"].logits


def test_the_live_teacher_of_a_cache_and_of_one_derived_from_it_answers_alike(tmp_path: Path) -> None:
    save_weights(tmp_path / "w.safetensors", small_cnn(4, 1, OUTPUTS, 3))
    model = Checkpoint(path=str(tmp_path / "w.safetensors"), model=SmallCNN(width=4), num_classes=OUTPUTS)
    source = keeping() | {"model": model.model_dump(mode="json"), "classes": list(CHOSEN)}
    precompute(recipe(tmp_path / "c", teachers={"t": source}, views=VIEW, shard_rows=20), dataset=images(20))
    cache = open_cache(tmp_path / "c")
    derive(derivation(tmp_path / "c", tmp_path / "d", {"t": {"logits": DENSE16 | {"storage": "packed"}}}))
    wanted = stored(tmp_path / "c", "t")
    assert torch.equal(live(cache, tmp_path / "c"), wanted)
    assert torch.equal(live(cache, tmp_path / "d"), wanted)
    torch.testing.assert_close(stored(tmp_path / "d", "t"), wanted, atol=2e-3, rtol=2e-3)
    # `evaluate` weighs the whole network, whose other outputs cost as much.
    entries = {"cache": str(tmp_path / "c"), "out": "x", "model": {"kind": "small_cnn"}, "epochs": 1, "device": "cpu"}
    student = lc.load_recipe(entries | {"losses": [{"kind": "kl_divergence"}]}, StudentRecipe)
    built = _built("t", cache.manifest, student, None)
    assert sum(p.numel() for p in built.model.parameters()) == sum(
        p.numel() for p in small_cnn(4, 1, OUTPUTS, 3).parameters()
    )


def test_teachers_with_other_outputs_make_one_ensemble(tmp_path: Path) -> None:
    chosen = {"a": [3, 1, 15], "b": [0, 7, 2]}
    modules = {"a": Linear(16), "b": Linear(8, seed=1)}
    entries = {name: teacher(DENSE32 | {"storage": "packed"}, classes=outputs) for name, outputs in chosen.items()}
    precompute(recipe(tmp_path / "c", teachers=entries, views=VIEW), teachers=modules, dataset=Pixels(20, 3))
    both = {"members": {"a": 1.0, "b": 1.0}, "average": "logits", "logits": DENSE32 | {"storage": "packed"}}
    derive(derivation(tmp_path / "c", tmp_path / "d", {"both": both}))
    answers = [stored(tmp_path / "c", name) for name in chosen]
    torch.testing.assert_close(stored(tmp_path / "d", "both"), (answers[0] + answers[1]) / 2)
    assert open_cache(tmp_path / "d").manifest.teachers["both"].classes is None
    pixels = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in Pixels(20, 3).images])
    for answer, (name, outputs) in zip(answers, chosen.items(), strict=True):
        torch.testing.assert_close(answer, modules[name]((pixels / 255 - 0.5) / 0.5)[:, outputs], atol=1e-5, rtol=0)


def test_names_indices_and_a_list_are_the_same(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", {"ant": 8, "bee": 8, "7": 8})  # 7, ant, bee in their order
    forms: list[Any] = [[4, 1, 0], {"bee": 0, "ant": 1, "7": 4}, {"2": 0, "1": 1, "0": 4}]
    for number, classes in enumerate(forms):
        entry = teacher(DENSE32 | {"storage": "packed"}, classes=classes)
        data = {"kind": "image_folder", "root": str(folder)}
        run(tmp_path / f"{number}", None, Linear(5), teachers={"t": entry}, views=VIEW, dataset=data)
    first, *others = (contents(tmp_path / f"{number}") for number in range(len(forms)))
    assert all(other == first for other in others)
    assert open_cache(tmp_path / "0").manifest.teachers["t"].classes == (4, 1, 0)


def test_images_without_labels_take_a_list(tmp_path: Path) -> None:
    run(
        tmp_path / "c", Pixels(20), teachers={"t": teacher(DENSE32 | {"storage": "packed"}, classes=[4, 1])}, views=VIEW
    )
    assert stored(tmp_path / "c", "t").shape == (20, 2)
    with pytest.raises(RecipeError, match=r"the images have none.\n  Fix: a list of outputs, (.*)$") as caught:
        run(tmp_path / "d", Pixels(20), teachers={"t": teacher(classes={"a": 4, "b": 1})}, views=VIEW)
    fixed = yaml.safe_load(str(caught.value).rpartition("classes: ")[2])
    again = {"t": teacher(DENSE32 | {"storage": "packed"}, classes=fixed)}
    assert run(tmp_path / "c", Pixels(20), teachers=again, views=VIEW).shards_written == 0


REFUSED: dict[str, tuple[Any, str]] = {
    "missing": ({"ant": 0, "bee": 1}, r"No output for 2 of 4 classes: 'cat', 'dog'\."),
    "surplus, with the nearest": (
        {"ant": 0, "bee": 1, "cta": 2, "dog": 3},
        r"no class 'cta'\. Did you mean 'cat'\?\n  No output for 1 of 4 classes: 'cat'\.\n  Fix: .*ant, bee, cat, dog",
    ),
    "an index beyond": ({"ant": 0, "bee": 1, "cat": 2, "4": 3}, r"no class '4'\.\n  No output for 1 of 4 classes: 'd"),
    "twice": ({"ant": 0, "0": 5, "bee": 1, "cat": 2, "dog": 3}, "'ant' and '0' are the same class"),
    "one output for two": ({"ant": 0, "bee": 0}, "classes' = .*output 0 is that of 'ant' and 'bee'"),
    "an output twice in a list": ([0, 1, 1, 2], r"output 1 is that of 1 and 2"),
    "too few": ([0, 1, 2], r"lists 3 outputs, the data set has 4 classes.\n  Fix: one output .*\(ant, bee, cat, dog\)"),
    "out of range": ([0, 15, 16, 20], "teacher 't' has 16 outputs, .* output 16 and 1 more .*\n  Fix: .* 0 to 15"),
    "negative": ([0, 1, 2, -1], r"classes\.3' = -1"),
    "no outputs": ({"ant": "OUTPUT"}, "must be a whole number"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("four") / "images", {"ant": 5, "bee": 5, "cat": 5, "dog": 5})


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_name_each_class_once_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    classes, message = REFUSED[name]
    data = {"kind": "image_folder", "root": str(folder)}
    with pytest.raises(RecipeError, match=message) as caught:
        run(tmp_path / "c", None, teachers={"t": teacher(classes=classes)}, views=VIEW, dataset=data)
    assert caught.value.exit_code == 2
    assert not (tmp_path / "c").exists()


def test_the_refusal_of_more_classes_prints_the_line_that_chooses_among_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_images(tmp_path / "images", {"a: b": 6, "007": 6, "yes": 6})
    linear = {"kind": "custom", "factory": "tests.cache.made:Linear"}
    entries = {
        "cache": str(tmp_path / "c"),
        "dataset": {"kind": "image_folder", "root": str(folder)},
        "teachers": {"t": teacher(DENSE32 | {"storage": "packed"}, model=linear)},
        "num_workers": 0,
        "device": "cpu",
    }
    file = tmp_path / "precompute.yaml"
    file.write_text(json.dumps(entries))
    assert main(["precompute", str(file), "-q"]) == 4
    line = re.search(r"Fix: (teachers\.t\.classes): (\{.*?\}),", capsys.readouterr().err.replace("\n", " "))
    assert line is not None
    outputs = iter(("9", "3", "12"))
    fixed = f"{line[1]}={re.sub('OUTPUT', lambda _: next(outputs), line[2])}"
    assert main(["recipe", "check", str(file), "--set", fixed]) == 0
    assert main(["precompute", str(file), "-q", "--set", fixed]) == 0
    cache = open_cache(tmp_path / "c")
    assert cache.manifest.teachers["t"].classes == (9, 3, 12)
    views = cache.views()
    assert views.dataset.class_names == ("007", "a: b", "yes")
    logits = Linear()((views.__getitems__([ViewKey(0, 7)]) / 255 - 0.5) / 0.5)[:, [9, 3, 12]]
    torch.testing.assert_close(cache.rows([ViewKey(0, 7)])["t"].logits, logits, atol=1e-5, rtol=0)
    capsys.readouterr()
    assert main(["recipe", "check", str(file), "--set", "teachers.t.classes=[1, 1, 2]"]) == 2
    assert "output 1 is that of" in capsys.readouterr().err


def test_classes_of_features_alone_have_no_effect(tmp_path: Path) -> None:
    features = {"pooled": KEPT["pooled"]}
    with pytest.raises(RecipeError, match=r"teachers\.t has classes, and keeps features alone") as caught:
        make(tmp_path / "c", wide(), False, features, classes=list(CHOSEN))
    assert caught.value.exit_code == 2
    entry = make(tmp_path / "c", wide(), False, features).manifest.teachers["t"]
    assert (entry.num_classes, entry.classes) == (None, None)
    # Maps of Grad-CAM are of a class.
    cam = make(tmp_path / "d", wide(), False, {"cam": KEPT["cam"]}, classes=list(CHOSEN))
    assert cam.manifest.teachers["t"].classes == CHOSEN


def test_a_cache_is_resumed_repaired_and_grown_by_the_same_outputs_alone(tmp_path: Path) -> None:
    entry = keeping(HEAD, {"cam": KEPT["cam"]}) | {"classes": list(CHOSEN)}
    options: dict[str, Any] = {"teachers": {"t": entry}, "shard_rows": 20}
    two = {"num_views": 2, "seed": 3}

    def filled(path: Path, **changes: Any) -> int:
        return run(path, images(60), wide(), **{"views": two, **options, **changes}).shards_written

    assert filled(tmp_path / "whole") == 6
    assert filled(tmp_path / "c", views=VIEW, teachers={"t": entry | {"features": {}}}) == 3
    assert filled(tmp_path / "c", teachers={"t": entry | {"features": {}}}) == 3
    assert filled(tmp_path / "c") == 6  # its maps
    found, wanted = (contents(tmp_path / name) for name in ("c", "whole"))
    for name in ("logits", "penultimate", "cam"):
        rows = [data for key, data in found.items() if key.startswith(f"t.{name}")]
        assert rows == [data for key, data in wanted.items() if key.startswith(f"t.{name}")]
    flip(shard_files(tmp_path / "c", "t.cam")[0], 9)
    flip(tmp_path / "c" / "t.logits.weight" / "c" / "0" / "0", 9)
    assert len(verified(tmp_path / "c")) == 2
    assert filled(tmp_path / "c") == 1
    assert not verified(tmp_path / "c")
    assert contents(tmp_path / "c") == found
    for classes, message in (
        ([8, 2, 5, 0, 4], r"teachers\.t\.classes\[4\]: the cache has 3, the recipe 4"),
        ([2, 8, 5, 0, 3], r"teachers\.t\.classes\[0\]: the cache has 8, the recipe 2"),
    ):
        with pytest.raises(MismatchError, match=message):
            filled(tmp_path / "c", teachers={"t": entry | {"classes": classes}})
    del entry["classes"]
    with pytest.raises(MismatchError, match=r"teachers\.t\.classes: the cache has \[8, 2.*, the recipe None"):
        run(tmp_path / "c", images(60), narrow(), views=two, **options)


def _choose(classes: Any, manifest: dict[str, Any]) -> None:
    manifest["teachers"]["t"]["classes"] = classes


def test_a_manifest_names_an_output_for_each_class_and_only_if_some_are_left_out(tmp_path: Path) -> None:
    plain = make(tmp_path / "plain", narrow())
    assert "classes" not in plain.manifest.model_dump(mode="json")["teachers"]["t"]
    cache = make(tmp_path / "c", wide(), classes=list(CHOSEN))
    assert cache.manifest.model_dump(mode="json")["teachers"]["t"]["classes"] == list(CHOSEN)
    forge(tmp_path / "c", partial(_choose, [0, 1, 2, 3, OUTPUTS]))
    with pytest.raises(RecipeError, match="has 9 outputs, and its `classes` name output 9"):
        live(cache, tmp_path / "c", modules={"t": wide()})
    for wrong in ([0, 1, 2], [0, 1, 2, 3, -1], [0, 1, 2, 3, 2**40], "all"):
        forge(tmp_path / "c", partial(_choose, wrong))
        with pytest.raises(CacheError, match=r"the manifest is not valid: teachers\.t"):
            open_cache(tmp_path / "c")


def test_a_plan_counts_the_chosen_classes(tmp_path: Path) -> None:
    entry = teacher(DENSE32 | {"storage": "packed"}, classes=list(CHOSEN))
    wanted = recipe(tmp_path / "c", teachers={"t": entry}, views=VIEW)
    for probing in (True, False):
        document = lc.plan(wanted, teachers={"t": Linear(OUTPUTS)}, dataset=Pixels(20, CLASSES), probing=probing)
        row = next(array for array in document["arrays"] if array["array"] == "t.logits")
        assert row["row_bytes"] == 4 * CLASSES


def test_the_example_of_the_docs_chooses_its_outputs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "how-to" / "bring-your-teacher.md").read_text()
    section = text[text.index("## A teacher with more classes than the data") :]
    block = section.partition("```yaml\n")[2].partition("```")[0]
    folder = write_images(tmp_path / "images", dict.fromkeys(("n01641577", "n01443537", "n01629819"), 4))
    entry = yaml.safe_load(block)["teachers"]["imagenet"] | teacher(DENSE32 | {"storage": "packed"})
    wanted = recipe(
        tmp_path / "c",
        dataset={"kind": "image_folder", "root": str(folder)},
        teachers={"imagenet": entry},
        views=VIEW,
    )
    precompute(wanted, teachers={"imagenet": Linear(1000)})
    assert open_cache(tmp_path / "c").manifest.teachers["imagenet"].classes == (1, 25, 30)


def test_a_classifier_that_is_given_brings_its_own_outputs(tmp_path: Path) -> None:
    chosen = lc.Classifier(wide(), lc.Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3), CHOSEN)
    found, wanted = make(tmp_path / "c", chosen), make(tmp_path / "d", wide(), classes=list(CHOSEN))
    assert found.manifest.teachers == wanted.manifest.teachers
    assert torch.equal(stored(tmp_path / "c", "t"), stored(tmp_path / "d", "t"))
