"""Cards of caches and runs: what is recorded is there, and none of it is taken as Markdown."""

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from logitcache.cache.cache import open_cache
from logitcache.cli.app import main
from logitcache.report.card import cache_card
from logitcache.report.inspect import inspect_cache
from logitcache.student.training import train
from tests.cache.made import DENSE32, forge
from tests.report.test_multi_label import fill as fill_marked
from tests.student.small import TEST_IMAGES, fill, student


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    features = {"last": {"kind": "pooled", "tap": "0"}}
    return fill(tmp_path_factory.mktemp("card") / "c.zarr", logits={"kind": "uint8"}, features=features)


def card(path: Path, out: Path, *options: str) -> str:
    assert main(["card", str(path), "--out", str(out), *options]) == 0
    return out.read_text()


def test_a_card_of_a_cache_states_teachers_views_encodings_licences_and_how_to_verify(
    cache: Path, tmp_path: Path
) -> None:
    text = card(cache, tmp_path / "card.md", "--licence", "cc-by-4.0", "--teacher-licence", "net=apache-2.0")
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "cc-by-4.0"
    manifest = open_cache(cache).manifest
    assert manifest.digest() in text
    assert manifest.fingerprint.content in text
    assert "200 images in 2 views" in text
    [teacher] = [line for line in text.splitlines() if line.startswith("| net |")]
    assert "apache-2.0" in teacher
    assert "top1 0." in teacher
    for target in ("logits", "last"):
        [row] = [line for line in text.splitlines() if line.startswith(f"| net.{target} |")]
        shown = manifest.teachers["net"].errors_of(target)
        assert all(f"{one.mean:.2g}" in row for one in shown)
    assert "logitcache verify c.zarr" in text


def test_the_recipe_of_a_card_is_one(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = card(cache, tmp_path / "card.md").split("```yaml\n")[1].split("```")[0]
    (tmp_path / "r.yaml").write_text(recipe)
    monkeypatch.chdir(cache.parent)
    assert main(["recipe", "check", str(tmp_path / "r.yaml")]) == 0


def test_a_card_of_images_of_any_number_of_classes_trains_by_a_loss_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = fill_marked(tmp_path / "marked.zarr", {"a": DENSE32})
    recipe = card(marked, tmp_path / "card.md").split("```yaml\n")[1].split("```")[0]
    (tmp_path / "r.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    assert "multi_label_kl" in recipe
    assert main(["recipe", "check", str(tmp_path / "r.yaml"), "--set", "model={kind: small_cnn}"]) == 0


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ({"kind": "bundled", "split": "train"}, None),
        (None, {"kind": "image_folder", "root": "IMAGES"}),
        ({"kind": "custom", "factory": "my.data:make"}, {"kind": "image_folder", "root": "IMAGES"}),
        (
            {"kind": "image_folder", "root": "/data/x", "mode": "L", "labelled": False},
            {"kind": "image_folder", "root": "IMAGES", "mode": "L", "labelled": False},
        ),
        (
            {"kind": "huggingface", "path": "hf://datasets/a/b", "name": None, "split": "train"},
            {"kind": "huggingface", "path": "IMAGES", "split": "train"},
        ),
        (
            {"kind": "webdataset", "shards": "s3://b/x/{00..99}.tar"},
            {"kind": "webdataset", "shards": "IMAGES/{00..99}.tar"},
        ),
        (
            {"kind": "webdataset", "shards": ["a/0.tar", "b/1.tar"]},
            {"kind": "webdataset", "shards": ["IMAGES/0.tar", "IMAGES/1.tar"]},
        ),
    ],
)
def test_the_images_of_a_card_are_of_the_recorded_kind_at_another_place(
    dataset: dict[str, Any] | None, expected: dict[str, Any] | None, cache: Path
) -> None:
    text = cache_card(inspect_cache(str(cache)) | {"dataset": dataset}, None, {})
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]).get("dataset") == expected
    words = shlex.split(text.split("```bash\n")[1].split("```")[0])
    assert words[:3] == ["logitcache", "verify", "c.zarr"]
    assert (words[3:] == []) == (expected is None)
    assert expected is None or yaml.safe_load(words[4].removeprefix("dataset=")) == expected


def test_a_card_of_a_run_states_what_was_measured(cache: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(student(run, cache, epochs=1, validation={"dataset": TEST_IMAGES}))
    text = card(run, tmp_path / "card.md")
    result = json.loads((run / "result.json").read_text())
    assert f"| top1 | `{result['top1']}` |" in text
    assert "small_cnn" in text
    assert "license" not in text


def test_what_a_manifest_says_is_neither_markdown_nor_html(cache: Path, tmp_path: Path) -> None:
    copy = tmp_path / "c.zarr"

    shutil.copytree(cache, copy)
    evil = "x`|<script>alert(1)</script>\n# Heading"
    forge(copy, lambda manifest: manifest["teachers"]["net"].update(model={"kind": evil}))
    text = card(copy, tmp_path / "card.md", "--teacher-licence", "net=<b>*|")
    assert "\n# Heading" not in text
    [teacher] = [line for line in text.splitlines() if line.startswith("| net |")]
    assert teacher.count("|") - teacher.count("\\|") == 7
    assert teacher.count("`") == 2
    assert "\\<b\\>\\*\\|" in teacher


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--teacher-licence", "other=mit"], "no teacher 'other'"),
        (["--teacher-licence", "mit"], "not NAME=LICENCE"),
    ],
)
def test_wrong_licences_are_refused(
    options: list[str], named: str, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["card", str(cache), "--out", str(tmp_path / "card.md"), *options]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert "Fix:" in error
    assert not (tmp_path / "card.md").exists()


def test_nothing_is_overwritten_and_other_folders_are_refused(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "card.md").write_text("mine")
    assert main(["card", str(cache), "--out", str(tmp_path / "card.md")]) == 2
    assert "not overwritten" in capsys.readouterr().err
    assert main(["card", str(tmp_path), "--out", str(tmp_path / "x.md")]) == 2
    assert "neither a cache nor a finished run" in capsys.readouterr().err
