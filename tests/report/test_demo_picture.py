"""The demo's picture: a self-contained SVG with the figures of demo.json and the pixels that the teacher saw."""

import base64
import io
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from logitcache.cache.cache import Cache, open_cache
from logitcache.config.recipe import load_recipe
from logitcache.report.demo.demo import DemoResult, DemoStudent, DemoTeacher
from logitcache.report.demo.picture import demo_picture
from logitcache.stage_one.precompute import PrecomputeRecipe, PrecomputeResult, precompute
from logitcache.views.keys import ViewKey

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[PrecomputeResult, Cache]:
    path = tmp_path_factory.mktemp("demo") / "c.zarr"
    recipe = {
        "cache": str(path),
        "dataset": {"kind": "bundled", "num_images": 40},
        "views": {"num_views": 2, "augmentations": [{"kind": "random_crop", "size": 28, "padding": 2}]},
        "teachers": {"teacher": {"model": {"kind": "bundled"}}},
        "num_workers": 0,
    }
    return precompute(load_recipe(recipe, PrecomputeRecipe)), open_cache(path)


def drawn(made: tuple[PrecomputeResult, Cache]) -> tuple[DemoResult, ElementTree.Element, str]:
    written, cache = made
    students = (
        DemoStudent("40 labels", False, 0.783, 0.006, 3, 0, 27.0),
        DemoStudent("from <the cache> & T = 1", True, 0.849, 0.0, 1, 0, 28.0),
    )
    teacher = DemoTeacher("bundled", 112_106, 0.9375)
    result = DemoResult(
        teacher, written, students, 520, 78.4, "demo.json", "demo.svg", "logitcache recipe new --images a"
    )
    text = demo_picture(result, cache)
    return result, ElementTree.fromstring(text), text


def test_it_has_every_figure_and_ends_with_the_next_command(made: tuple[PrecomputeResult, Cache]) -> None:
    result, root, _ = drawn(made)
    words = [element.text for element in root.iter(f"{SVG}text")]
    for shown in ("40 labels", "78.3 ± 0.6 %", "from <the cache> & T = 1", "84.9 %", "80", "600"):
        assert shown in words
    assert words[-1] == result.next
    assert any("93.8 %, 112,106 parameters" in str(word) for word in words)


def test_bars_are_as_long_as_their_numbers(made: tuple[PrecomputeResult, Cache]) -> None:
    _, root, _ = drawn(made)
    widths = {
        kind: [float(r.attrib["width"]) for r in root.iter(f"{SVG}rect") if r.get("class") == kind]
        for kind in ("track", "labels", "cached", "online")
    }
    whole = widths["track"][0]
    assert widths["labels"] == pytest.approx([0.783 * whole], abs=0.1)
    assert widths["cached"] == pytest.approx([0.849 * whole, 80 / 600 * whole], abs=0.1)
    assert widths["online"] == [whole]


def test_its_images_are_the_pixels_and_the_answers_of_the_cache(made: tuple[PrecomputeResult, Cache]) -> None:
    _, root, _ = drawn(made)
    cache = made[1]
    shown = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(image.attrib["href"].partition(",")[2]))))
        for image in root.iter(f"{SVG}image")
    ]
    assert len(shown) == 20
    keys = [ViewKey(view, round(index)) for view in (0, 1) for index in np.linspace(0, 39, 10).astype(int)]
    pixels = cache.views().__getitems__(keys)
    for image, wanted in zip(shown, pixels, strict=True):
        assert np.array_equal(image, wanted[0].numpy())
    chances = cache.rows(keys)["teacher"].logits.softmax(1).max(1)
    percents = [element.text for element in root.iter(f"{SVG}text") if re.fullmatch(r"\d+ %", element.text or "")]
    assert percents[-20:] == [f"{100 * chance:.0f} %" for chance in chances.values.tolist()]


def test_it_asks_no_server_and_has_a_dark_form(made: tuple[PrecomputeResult, Cache]) -> None:
    _, root, text = drawn(made)
    assert {element.attrib["href"][:22] for element in root.iter() if "href" in element.attrib} == {
        "data:image/png;base64,"
    }
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text


def test_the_same_results_give_the_same_bytes(made: tuple[PrecomputeResult, Cache], tmp_path: Path) -> None:
    assert drawn(made)[2] == drawn(made)[2]
