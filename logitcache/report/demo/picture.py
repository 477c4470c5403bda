"""The demo's picture: accuracy, the teacher's views and the cost, as one SVG that loads nothing else."""

import base64
import io
import textwrap
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from logitcache.cache.cache import Cache
from logitcache.report.figures.picture import as_image
from logitcache.runtime.tables import format_bytes
from logitcache.views.keys import ViewKey

if TYPE_CHECKING:
    from logitcache.report.demo.demo import DemoResult

_WIDTH, _LEFT, _COLUMN, _BAR, _SIDE = 760, 24, 325, 280, 56
_NUM_SEEN = 10
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1d2125 }
.title { font-size: 19px; font-weight: 600 } .head { font-weight: 600 } .note { fill: #5c656e; font-size: 12px }
.mono { font-family: ui-monospace, monospace; font-size: 12px }
.paper { fill: #fff } .track { fill: #e6e9ec }
.labels { fill: #8c8c8c } .cached { fill: #2e9e6b } .online { fill: #dd7a34 }
@media (prefers-color-scheme: dark) {
  text { fill: #e4e7ea } .note { fill: #a2abb3 } .paper { fill: #15181b } .track { fill: #2b3136 }
}
"""


def demo_picture(result: "DemoResult", cache: Cache) -> str:
    """Draw the demo's results; `cache` is the demo's cache."""
    lines = [*_accuracies(result), *_seen(cache), *_costs(result, cache)]
    *firsts, last = textwrap.wrap(result.next, 90, break_long_words=False, break_on_hyphens=False)
    lines += [("head", "Your own folder"), *(("mono", f"{line} \\") for line in firsts), ("mono", last)]
    body, top = [f'<text class="title" x="{_LEFT}" y="36">One teacher, run once; students from its cache</text>'], 48
    for kind, content in lines:
        if kind == "raw":
            height, _, markup = content.partition("|")
            body.append(f'<g transform="translate({_LEFT} {top})">{markup}</g>')
            top += int(height)
        else:
            top += 34 if kind == "head" else 20
            body.append(f'<text class="{kind}" x="{_LEFT}" y="{top - 6}">{escape(content)}</text>')
    top += 16
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {top}" width="{_WIDTH}" height="{top}" '
        f'role="img" aria-label="Results of logitcache demo"><style>{_STYLE}</style>'
        f'<rect class="paper" width="{_WIDTH}" height="{top}" rx="8"/>{"".join(body)}</svg>\n'
    )


def _bar(text: str, value: str, fraction: float, kind: str) -> tuple[str, str]:
    """Draw a bar of a chart, with its name and its value."""
    bars = "".join(
        f'<rect class="{name}" x="{_COLUMN}" y="4" width="{part * _BAR:.1f}" height="14"/>'
        for name, part in (("track", 1.0), (kind, fraction))
    )
    names = f'<text x="0" y="15">{escape(text)}</text><text x="{_COLUMN + _BAR + 10}" y="15">{escape(value)}</text>'
    return "raw", f"24|{names}{bars}"


def _accuracies(result: "DemoResult") -> Iterator[tuple[str, str]]:
    yield "head", "Top-1 accuracy of a small student on 2,000 test images"
    for student in result.students:
        spread = f" ± {100 * student.top1_std:.1f}" if student.seeds > 1 else ""
        kind = "cached" if student.from_cache else "labels"
        yield _bar(student.name, f"{100 * student.top1_mean:.1f}{spread} %", student.top1_mean, kind)
    teacher = result.teacher
    yield "note", f"The teacher: {100 * teacher.top1:.1f} %, {teacher.num_parameters:,} parameters."


def _seen(cache: Cache) -> Iterator[tuple[str, str]]:
    """Draw views as the teacher saw them, each with its most probable class."""
    yield "head", "What the teacher saw, and answered; the students see the same pixels"
    views, names = cache.views(), cache.manifest.class_names
    indices: Sequence[int] = np.linspace(0, len(cache) - 1, _NUM_SEEN).astype(int).tolist()
    for view in range(min(2, cache.num_views)):
        keys = [ViewKey(view, index) for index in indices]
        pixels = views.__getitems__(keys).numpy()
        found = next(iter(cache.rows(keys).values())).log_probs().exp().max(dim=1)
        markup = []
        for number, (image, chance, label) in enumerate(
            zip(pixels, found.values.tolist(), found.indices.tolist(), strict=True)
        ):
            file = io.BytesIO()
            as_image(image).save(file, "png")
            data = base64.b64encode(file.getvalue()).decode()
            name = str(label) if names is None else names[label]
            at = number * 71
            markup.append(
                f'<image x="{at}" y="6" width="{_SIDE}" height="{_SIDE}" style="image-rendering: pixelated" '
                f'href="data:image/png;base64,{data}"/><text class="note" x="{at}" y="{_SIDE + 20}">'
                f'{escape(name[:9])}</text><text class="note" x="{at}" y="{_SIDE + 34}">{100 * chance:.0f} %</text>'
            )
        yield "raw", f"{_SIDE + 42}|{''.join(markup)}"


def _costs(result: "DemoResult", cache: Cache) -> Iterator[tuple[str, str]]:
    yield "head", "Images that the teacher answered"
    once = cache.num_views * len(cache)
    online = once + result.passes_saved
    most = max(once, online)
    yield _bar("once, into the cache", f"{once:,}", once / most, "cached")
    yield _bar("online, in every student's loop", f"{online:,}", online / most, "online")
    yield (
        "note",
        f"The cache: {format_bytes(result.cache.bytes)}, written in {result.cache.seconds:.1f} s. "
        f"All of the demo: {result.seconds:.0f} s.",
    )
