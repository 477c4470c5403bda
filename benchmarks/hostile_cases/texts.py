"""Texts of a manifest that hold terminal controls."""

from collections.abc import Callable
from typing import Any

from hostile_cases.common import DAMAGED, OK, OTHER, READERS, USAGE, Case, forge

EVIL = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\u2066[red]x[/red]\x9b31m"


def text(name: str, change: Callable[[dict[str, Any]], object]) -> Case:
    """Put terminal controls into a text of the manifest."""
    every = dict.fromkeys(READERS, (OK, USAGE, DAMAGED, OTHER))
    return Case("text", name, lambda folder: forge(folder, change), every, ("inspect", "verify", "summary", "train"))


TEXTS = [
    text("a version", lambda m: m["versions"].update(torch=EVIL)),
    text("a version's name", lambda m: m["versions"].update({EVIL: "1"})),
    text("a root", lambda m: m["dataset"].update(root="images" + EVIL)),
    text("a tap", lambda m: m["teachers"]["t"]["features"]["last"].update(tap=EVIL)),
    text("a model's path", lambda m: m["teachers"]["t"]["model"].update(path=EVIL)),
    text("a teacher's name", lambda m: m["teachers"].update({EVIL: m["teachers"].pop("u")})),
    text("an unknown key", lambda m: m.update({EVIL: 1})),
    text("a kind", lambda m: m["dataset"].update(kind=EVIL)),
]
