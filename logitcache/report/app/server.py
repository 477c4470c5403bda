"""Serve a page on which models answer to an image (extra `app`: Gradio). It asks no other server for anything."""

import errno
import os
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from logitcache.errors import RecipeError, needs_extra
from logitcache.report.app.side_by_side import Shown, SideBySide
from logitcache.report.figures.picture import as_image
from logitcache.runtime.stopping import stop_flag
from logitcache.views.datasets.image_folder import LARGEST

if TYPE_CHECKING:
    from gradio import Blocks

_SIDE = 240
"""Pixels that the shorter side of a small picture is enlarged to."""
_STYLE = """
figure { display: inline-block; vertical-align: top; width: 150px; margin: 0 12px 12px 0; }
figcaption { font-size: 12px; line-height: 1.35; white-space: pre-line; overflow-wrap: anywhere; }
"""
_FIRST_PORT, _PORTS = 7860, 100
_QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}


class Page:
    """The page of some models at `url`, from when it is made; `serve` answers until SIGTERM or Ctrl-C.

    Raises MissingExtraError, RecipeError if it cannot listen, and as `SideBySide`.
    """

    def __init__(
        self, runs: Sequence[str | Path], cache: str | None, host: str, port: int | None, **options: Any
    ) -> None:
        models = SideBySide(runs, cache, **options)
        with ExitStack() as opened:
            uploads = opened.enter_context(tempfile.TemporaryDirectory(prefix="logitcache-app-"))
            opened.enter_context(_environment(uploads))
            with needs_extra("a page of models", "app"):
                from fastapi import FastAPI
                from gradio import mount_gradio_app
            self._listening = opened.enter_context(_listen(host, port))
            self._app = mount_gradio_app(
                FastAPI(openapi_url=None),
                _blocks(models),
                "/",
                css=_STYLE,
                footer_links=[],
                max_file_size=LARGEST,
                run_history=False,
                show_error=False,
                ssr_mode=False,
                enable_monitoring=False,
                mcp_server=False,
                pwa=False,
            )
            self._opened = opened.pop_all()
        number = self._listening.getsockname()[1]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{number}/"

    def serve(self) -> int:
        """Serve until a signal; return its exit code."""
        import uvicorn

        server = uvicorn.Server(uvicorn.Config(self._app, log_level="warning", timeout_graceful_shutdown=1))
        with self._opened, stop_flag() as stop:
            server.run(sockets=[self._listening])
        return stop.stopped("the page is closed").exit_code if stop else 0


def _listen(host: str, port: int | None) -> socket.socket:
    """Listen on a port, 0 for any; by default on the first free one from 7860."""
    tried = range(_FIRST_PORT, _FIRST_PORT + _PORTS) if port is None else [port]
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in tried:
        try:
            return socket.create_server((host, number), family=family)
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno != errno.EADDRINUSE:
                break
    ports = f"port {tried[0]}" if len(tried) == 1 else f"ports {tried[0]} to {tried[-1]}"
    raise RecipeError(f"the page cannot listen on {host}, {ports}: {reason}. Fix: another --port or --host")


@contextmanager
def _environment(uploads: str) -> Iterator[None]:
    """Keep uploads in a folder, and Gradio from telling its makers of them: it reads both from the environment."""
    before = dict(os.environ)
    os.environ.update(_QUIET | {"GRADIO_TEMP_DIR": uploads})
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _blocks(models: SideBySide) -> "Blocks":
    import gradio as gr

    has_cache = models.known is not None
    with gr.Blocks(title="logitcache", analytics_enabled=False) as page:
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                upload = gr.File(label="Drop an image", file_types=["image"], height=130)
                name = gr.Textbox(
                    label="Or an image of the cache", placeholder="its index or id, then Enter", visible=has_cache
                )
                note = gr.Textbox(label="Image", interactive=False, lines=2)
                seen = gr.Image(label="As the first student gets it", interactive=False, buttons=[], height=280)
            with gr.Column(scale=2, min_width=280):
                answers = _labels(models)
        views = gr.HTML(visible=has_cache)
        outputs = [note, seen, *answers, views]
        hidden: dict[str, Any] = {"api_visibility": "private"}
        upload.upload(lambda path: _values(models, models.show_file(Path(path))), upload, outputs, **hidden)
        name.submit(lambda text: _values(models, models.show_named(text)), name, outputs, **hidden)
    return page


def _labels(models: SideBySide) -> list[Any]:
    """Return a list of classes for each model, two beside one another."""
    import gradio as gr

    found = []
    for start in range(0, len(models.models), 2):
        with gr.Row():
            for model in models.models[start : start + 2]:
                found.append(gr.Label(label=model, num_top_classes=models.top, show_heading=False, min_width=260))
    return found


def _values(models: SideBySide, shown: Shown) -> list[Any]:
    """Return what the outputs of the page show."""
    seen = None if shown.pixels is None else _enlarged(as_image(shown.pixels))
    views = ["<p>Views as the teachers saw them</p>"] if shown.views else []
    views += [f"<figure>{view.svg}<figcaption>{escape(view.caption)}</figcaption></figure>" for view in shown.views]
    return [shown.note, seen, *(dict(shown.scores.get(model, {})) for model in models.models), "".join(views)]


def _enlarged(image: Image.Image) -> Image.Image:
    """Repeat the pixels of a small image, which a browser would blur."""
    times = max(1, _SIDE // min(image.size))
    return image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)
