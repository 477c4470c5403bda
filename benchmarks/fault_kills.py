"""Commands that are killed at any moment of their life, and what must be there when the same command has ended.

One process imports all that commands need; every command is a fork of it, so that a kill costs a fraction of a second.
"""

import itertools
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from logitcache.cache.cache import open_cache
from logitcache.cli import main
from tests.cache.made import DENSE16, FLIP_AND_CROP, TOP2_PACKED, contents, flip, recipe, stamps, teacher
from tests.stage_one.apart import by_two, ended, forked, until
from tests.stage_one.killing import committed, counting
from tests.stage_one.synthesized import network, synthesis

SECONDS = 300.0
"""Within which every command ends, also on a machine that is used by others."""

_PIXELS = {"kind": "custom", "factory": "tests.cache.made:Pixels", "arguments": {"count": 90, "num_classes": 16}}
_MODEL = {"kind": "custom", "factory": "tests.cache.made:Linear"}


def write_recipes(folder: Path) -> None:
    """Write what the commands name; caches lie in the folder in which a command runs."""
    entries = {
        "first": teacher(DENSE16, model=_MODEL),
        "second": teacher(TOP2_PACKED, model=_MODEL | {"arguments": {"num_classes": 16, "seed": 1}}),
    }
    views = {"num_views": 2, "seed": 3, "augmentations": FLIP_AND_CROP}
    recorded = {"row_checksums": True, "record_parameters": True, "shard_rows": 40, "batch_size": 20}
    whole = recipe(Path("c.zarr"), dataset=_PIXELS, teachers=entries, views=views, **recorded)
    less = recipe(
        Path("c.zarr"),
        dataset=_PIXELS,
        teachers={"first": entries["first"]},
        views=views | {"num_views": 1},
        **recorded,
    )
    derived = {"cache": "c.zarr", "out": "d.zarr", "teachers": {"first": {"logits": TOP2_PACKED}}}
    trained = {"epochs": 2, "batch_size": 20, "num_workers": 0}
    student = trained | {"cache": "c.zarr", "dataset": _PIXELS, "out": "run", "model": _MODEL}
    documents = {
        "precompute": whole.model_dump(mode="json", exclude_none=True),
        "less": less.model_dump(mode="json", exclude_none=True),
        "derive": derived | {"shard_rows": 40, "device": "cpu"},
        "synthesize": synthesis().model_dump(mode="json", exclude_none=True),
        "student": student | {"losses": [{"kind": "kl_divergence", "teacher": "first"}], "device": "cpu"},
    }
    for name, document in documents.items():
        (folder / f"{name}.yaml").write_text(json.dumps(document))


def _damage(cache: Path) -> None:
    for name in ("first.logits/c.0.0.0", "second.logits/c.1.1.0", "views.checksum/c.0.1", "label/c/0"):
        for file in cache.glob(f"{name}*"):
            flip(file, 20)


def _litter(cache: Path) -> None:
    names = ("c.1.0.0.77-ab.logitcache-tmp", "c.7.0.0", "c.0.9.0")
    for folder in ("first.logits", "second.logits", "views.commits"):
        for name in names:
            (cache / folder / name).write_bytes(b"of a writer that was killed")


def _derived(folder: Path) -> Mapping[str, bytes]:
    return contents(folder / "d.zarr")


def _weights(folder: Path) -> Mapping[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob("run/*.safetensors")}


@dataclass(frozen=True)
class Command:
    """A command to kill, and `share` of a hundred kills that it gets.

    `before` makes of a folder with the recipes what the command finds there; `result` must be that of a run without
    kills, and `keeps` says that no committed shard is written again. The same command continues, with `again` added.
    """

    name: str
    share: int
    arguments: str
    before: Callable[[Path, Path], object] = lambda sound, folder: None
    result: Callable[[Path], Mapping[str, bytes]] = lambda folder: contents(folder / "c.zarr")
    keeps: bool = False
    again: str = ""
    beside: tuple[str, ...] = ("c.zarr",)


def _from(name: str, change: Callable[[Path], object] = lambda cache: None) -> Callable[[Path, Path], object]:
    """Begin with a copy of a sound cache, changed."""
    return lambda sound, folder: change(shutil.copytree(sound / name, folder / "c.zarr"))


COMMANDS = (
    Command("precompute", 24, "precompute precompute.yaml", keeps=True),
    Command("growth", 20, "precompute precompute.yaml", _from("less.zarr"), keeps=True),
    Command("derive", 14, "derive derive.yaml", _from("precompute.zarr"), _derived, beside=("c.zarr", "d.zarr")),
    Command(
        "synthesize",
        10,
        "synthesize synthesize.yaml made",
        result=lambda folder: contents(folder / "made"),
        beside=("made",),
    ),
    Command("repair", 14, "verify c.zarr --repair precompute.yaml", _from("precompute.zarr", _damage)),
    Command(
        "train-student",
        12,
        "train-student student.yaml",
        _from("precompute.zarr"),
        _weights,
        again="--resume",
        beside=("c.zarr", "run"),
    ),
    Command("gc", 4, "gc c.zarr", _from("precompute.zarr", _litter)),
    Command("workers", 2, "precompute precompute.yaml --workers 1"),
)
"""All that write; their shares make a hundred."""


class Kills:
    """What commands do without kills, once; and what they leave after one or two."""

    def __init__(self, folder: Path) -> None:
        torch.set_num_threads(1)
        self._folder, self._sound = folder, folder / "sound"
        self._sound.mkdir()
        write_recipes(self._sound)
        network()  # the teacher of synthesize is trained once: a factory of the same process returns a copy
        assert by_two(("less", "precompute"), self._make) == [0, 0]
        timed = [command for command in COMMANDS if command.name != "workers"]
        measured = {command.name: found for command, found in zip(timed, by_two(timed, self._measure), strict=True)}
        self._seconds = {name: seconds for name, (seconds, _) in measured.items()}
        self._calls = {name: calls for name, (_, calls) in measured.items()}
        self._results = {command.name: command.result(self._folder / command.name) for command in timed}
        self._results["workers"] = self._results["precompute"]
        assert all(self._results.values())

    def wrong(self, number: int) -> list[str]:
        """Kill a command, which the number decides as it decides when, and run it again; returns what is wrong."""
        command = _command(number)
        generator, folder = random.Random(number), self._fresh(command, str(number))
        for _ in range(_times(number)):
            self._kill(command, folder, generator)
        found = self._state(command, folder)
        shutil.rmtree(folder)
        return [f"{command.name} {number}: {text}" for text in found]

    def _fresh(self, command: Command, name: str) -> Path:
        folder = self._folder / name
        folder.mkdir()
        write_recipes(folder)
        command.before(self._sound, folder)
        return folder

    def _make(self, name: str) -> int:
        """Make a sound cache of a recipe."""
        return ended(self._started(self._sound, f"precompute {name}.yaml --set cache={name}.zarr"), SECONDS)

    def _measure(self, command: Command) -> tuple[float, int]:
        """Run a command without a kill: returns how long it takes, and how often it changes files."""
        folder, calls = self._fresh(command, command.name), self._folder / f"{command.name}.calls"
        began = time.monotonic()
        code = ended(self._started(folder, command.arguments, None, calls), SECONDS)
        assert code == 0, f"{command.name}: {self._log(folder)}"
        return time.monotonic() - began, int(calls.read_text())

    def _kill(self, command: Command, folder: Path, generator: random.Random) -> None:
        """Kill a command and all that it started: at a change of a file, at a time, or once so many files are there."""
        arguments, point = self._continued(command, folder), None
        if command.name == "workers":  # which take seconds to start
            files = generator.randrange(len(self._results["workers"]))
        elif generator.random() < 0.6:
            point = generator.randrange(self._calls[command.name])
        child = self._started(folder, arguments, point)
        if command.name == "workers":
            until(lambda: _num_files(folder / "c.zarr") >= files or _has_ended(child), seconds=SECONDS)
        elif point is None:
            time.sleep(generator.uniform(0, self._seconds[command.name]))
        if point is None:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        ended(child, SECONDS)

    def _state(self, command: Command, folder: Path) -> list[str]:
        """Say what is wrong after a kill, and after the command that continues."""
        cache = folder / "c.zarr"
        kept = committed(cache) if command.keeps and cache.exists() else []
        before = stamps(cache) if kept else {}
        wrong = []
        if command.name == "growth" and ended(forked(lambda: _views(cache)), SECONDS) not in (1, 2):
            wrong.append("the cache does not open")
        try:
            code = ended(self._started(folder, self._continued(command, folder)), SECONDS)
        except AssertionError as error:
            return [str(error)]
        if code:
            wrong.append(f"exit code {code}: {self._log(folder)[-500:]}")
        elif command.result(folder) != self._results[command.name]:
            wrong.append("another result than without kills")
        after = stamps(cache) if kept else {}
        wrong += [f"{name} was written again" for name in kept if after.get(name) != before[name]]
        others = {path.name for path in folder.iterdir() if path.suffix not in (".yaml", ".txt")}
        return wrong + [f"{name} is left" for name in sorted(others - set(command.beside))]

    def _continued(self, command: Command, folder: Path) -> str:
        return f"{command.arguments} {command.again if (folder / 'run').exists() else ''}"

    def _started(self, folder: Path, arguments: str, point: int | None = None, calls: Path | None = None) -> int:
        def action() -> int:
            os.setpgid(0, 0)
            os.chdir(folder)
            output = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            return counting(point, calls, lambda: main([*arguments.split(), "--quiet"]))

        child = forked(action)
        with suppress(OSError):  # it has done so itself, or has ended
            os.setpgid(child, child)
        return child

    def _log(self, folder: Path) -> str:
        return (folder / "log.txt").read_text(errors="replace")


def _command(number: int) -> Command:
    """Return the command of a kill: each hundred has its shares, spread evenly."""
    place = number * 37 % 100
    for command in COMMANDS:
        if place < command.share:
            return command
        place -= command.share
    raise AssertionError("shares make a hundred")


def numbers(count: int) -> range:
    """Return the first numbers whose commands are killed so many times in all."""
    kills = itertools.accumulate(map(_times, itertools.count()))
    return range(1 + sum(1 for _ in itertools.takewhile(lambda done: done < count, kills)))


def _times(number: int) -> int:
    """Return how often a command is killed before it may end."""
    return random.Random(number).choice((1, 1, 2))


def _num_files(folder: Path) -> int:
    return sum(file.is_file() for file in folder.rglob("*"))


def _has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _views(path: Path) -> int:
    cache: Any = open_cache(path)
    return int(cache.num_views)
