"""Looking at a view: the pixels that the teacher saw, and its answers."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from logitcache.cache.cache import open_cache
from logitcache.cli.app import main
from logitcache.errors import RecipeError
from logitcache.report.look import look
from logitcache.views.keys import ViewKey
from tests.student.small import IMAGES, fill, network


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("look") / "cache", {"a": network(1), "b": network(2)})


def test_a_png_has_the_very_pixels_that_the_teacher_saw(cache: Path, tmp_path: Path) -> None:
    found = look(cache, "1/7", tmp_path / "view.png")
    pixels = open_cache(cache).views()[ViewKey(1, 7)].numpy()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "view.png")), pixels[0])
    opened = open_cache(cache)
    assert found.labels == (opened.manifest.class_names[opened.labels[7]],)  # type: ignore[index]


def test_classes_are_those_of_the_answers(cache: Path, tmp_path: Path) -> None:
    found = look(cache, "0/7", tmp_path / "view.html", top=10)
    opened = open_cache(cache)
    answers = opened.answers([ViewKey(0, 7), ViewKey(1, 7)])
    for name, targets in answers.items():
        p = np.exp(targets.log_probs().numpy())
        rows = [row for row in found.classes if row["teacher"] == name]
        names = opened.manifest.class_names
        assert names is not None
        mean = {row["class"]: row["probability"] for row in rows}
        np.testing.assert_allclose([mean[n] for n in names], p.mean(axis=0), rtol=1e-5)
        assert [row["probability"] for row in rows] == sorted(mean.values(), reverse=True)
        assert sum(row["first_in_views"] for row in rows) == 2
    page = (tmp_path / "view.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert found.labels[0] in page


def test_a_view_is_named_by_index_or_id(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", str(cache), "--view", "0/7", "--json"]) == 0
    by_index = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(cache), "--view", f"0/{by_index['id']}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == by_index
    assert Path(by_index["out"]).exists()


@pytest.mark.parametrize("key", ["2/7", "0", "a/7", "0/200", "0/nothing", "7", "-1/7"])
def test_a_key_that_is_not_there_is_refused_with_one_that_is(key: str, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Fix: ") as refused:
        look(cache, key, tmp_path / "view.html")
    known = str(refused.value).rpartition(" ")[2].strip("'")
    assert look(cache, known if known.startswith("0/") else f"0/{known}", tmp_path / "view.html").view == 0


def test_other_kinds_of_files_and_options_without_effect_are_refused(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(cache), "--view", "0/1", "--out", "a.gif"]) == 2
    assert "Fix: --out a.html" in capsys.readouterr().err
    assert main(["inspect", str(cache), "--out", "a.html"]) == 2
    assert "no effect without --view" in capsys.readouterr().err


def test_a_mixed_view_names_its_partner(tmp_path: Path) -> None:
    mixed = fill(tmp_path / "mixed", images=IMAGES, views={"num_views": 1, "mixing": [{"kind": "mixup"}]})
    found = look(mixed, "0/3", tmp_path / "view.html")
    views = open_cache(mixed).views()
    assert found.mixed_with == views.dataset.ids[views.partners([ViewKey(0, 3)])[0].index]
    assert str(found.mixed_with) in (tmp_path / "view.html").read_text()
