"""The page of `logitcache app` in a browser: an image dropped, answers read, no request beyond this machine."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

import logitcache as lc
from logitcache.cache.cache import open_cache
from logitcache.student.training import train
from logitcache.views.datasets import Bundled, open_dataset
from logitcache.views.keys import ViewKey
from tests.student.small import fill, student

pytestmark = pytest.mark.integration
pytest.importorskip("gradio", reason="the page needs the extra app", exc_type=ImportError)
browser = pytest.importorskip("tests.report.browser", reason="the browser is driven through aiohttp")
if browser.PROGRAM is None:
    pytest.skip("no Chromium on this machine", allow_module_level=True)

FILE, NAME, NOTE = "input[type=file]", "textarea:not([disabled])", "document.querySelector('textarea[disabled]')?.value"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    fill(folder / "c.zarr")
    for run in ("a", "b"):
        train(student(folder / run, folder / "c.zarr", epochs=1, seed=ord(run)))
    Image.fromarray(open_dataset(Bundled(num_images=200)).read(17)[0].numpy()).save(folder / "known.png")
    Image.linear_gradient("L").resize((60, 40)).save(folder / "new.jpg")
    (folder / "broken.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def served(world: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The page, on a port of its own: the process and its address."""
    command = [sys.executable, "-m", "logitcache", "app", "a", "b", "--cache", "c.zarr", "--port", "0", "--json"]
    environment = os.environ | {"HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9"}
    (world / "temporary").mkdir()
    environment["TMPDIR"] = str(world / "temporary")
    process = subprocess.Popen(command, cwd=world, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    text = ""
    while not text.endswith("}\n"):
        line = process.stdout.readline()
        assert line, "the page has ended"
        text += line
    document = json.loads(text)
    assert document["runs"] == ["a", "b"]
    yield process, document["url"]
    if process.poll() is None:
        process.kill()
    process.wait()
    process.stdout.close()


def shown(text: str) -> dict[str, float]:
    """Read the classes and percentages of a page's text."""
    return {name: float(number) for name, number in re.findall(r"^(\S.*)\n(\d+)%$", text, re.MULTILINE)}


def top(run: Path, image: Path) -> str:
    (found,) = lc.predict(run, [image])
    return str(found.classes[0].name)


def test_a_browser_drops_images_and_reads_the_answers(
    world: Path, served: tuple[subprocess.Popen[str], str], tmp_path: Path
) -> None:
    process, url = served
    texts: dict[str, str] = {}
    views: dict[str, int] = {}

    async def act(tab: "browser.Tab") -> None:  # type: ignore[name-defined]
        for width, scheme, file, note in (
            (1280, "light", "known.png", "Image 17"),
            (390, "dark", "new.jpg", "no image of"),
            (390, "light", "broken.png", "cannot be read"),
        ):
            await tab.open(url, width, scheme)
            await tab.until(f"document.querySelector('{FILE}') !== null")
            await tab.choose(FILE, world / file)
            await tab.until(f"{NOTE}.includes('{note}')")
            texts[file] = await tab.value("document.body.innerText")
            views[file] = await tab.value("document.querySelectorAll('figure svg').length")
            await tab.measure(width)
        await tab.write(NAME, "3")
        await tab.until(f"{NOTE}.includes('Image 3 (')")
        texts["3"] = await tab.value("document.body.innerText")

    seen = browser.use(act)
    assert seen.errors == []
    assert {urlsplit(request).hostname for request in seen.requests} == {"127.0.0.1"}
    assert all(scrolled <= width for width, scrolled in seen.widths.items())
    for file in ("known.png", "new.jpg"):
        for run in ("a", "b"):
            following = texts[file].split(f"\n{run}\n")[1]
            assert following.split("\n")[0] == top(world / run, world / file)
    cache = open_cache(world / "c.zarr")
    assert cache.manifest.class_names is not None
    for text, index in (("known.png", 17), ("3", 3)):
        answers = cache.answers([ViewKey(0, index), ViewKey(1, index)])["net"].logits.softmax(1).mean(0)
        assert texts[text].split("\nteacher net\n")[1].split("\n")[0] == cache.manifest.class_names[answers.argmax()]
    assert views == {"known.png": 2, "new.jpg": 0, "broken.png": 0}
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    assert process.stdout is not None
    assert process.stdout.read() == ""
    assert list((world / "temporary").iterdir()) == []  # uploads are gone with the page
