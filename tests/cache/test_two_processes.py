"""Two processes, two caches that are replaced, damaged, repaired, grown and deleted: no reader sees foreign rows."""

import contextlib
import multiprocessing
import shutil
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from logitcache.config.recipe import dump_recipe
from logitcache.errors import LogitCacheError
from logitcache.report.verify_and_repair import repair
from logitcache.stage_one.precompute import PrecomputeRecipe, precompute
from logitcache.store.shared_memory import VARIABLE
from tests.cache.made import DENSE16, FLIP_AND_CROP, PACKED, recipe, teacher
from tests.cache.reading import Reader, serve
from tests.warm import start_server

CHANGES = ("replace", "shards", "damage", "repair", "grow", "delete")
CACHES = ("one", "two")
STEPS = [(what, name) for what in (*CHANGES, "open here", "open there", "read here", "read there") for name in CACHES]


class There:
    """A reader in a process of its own."""

    def __init__(self, questions: Connection) -> None:
        self._questions = questions

    def open(self, path: str) -> int | None:
        return self._ask("open", path)

    def read(self, path: str, view: int) -> str | None:
        return self._ask("read", path, view)

    def _ask(self, *question: object) -> Any:
        self._questions.send(question)
        return self._questions.recv()


@pytest.fixture(scope="module")
def there() -> Iterator[There]:
    """A second process for all tests, which shares decoded shards with this one."""
    start_server()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "64M")
        here, other = multiprocessing.Pipe()
        given = (other, {VARIABLE: "64M"})
        process = multiprocessing.get_context("forkserver").Process(target=serve, args=given)
        process.start()
        other.close()
        yield There(here)
        here.send(None)
        process.join(60)
        assert process.exitcode == 0


def plan(path: Path, source: int, num_views: int = 2) -> PrecomputeRecipe:
    """Return the recipe of one of two caches of a hot and a packed teacher, which differ in every row."""
    pixels = {"kind": "custom", "factory": "tests.cache.made:Pixels", "arguments": {"count": 300, "seed": source}}
    entries = {}
    for number, (name, kept) in enumerate({"hot": DENSE16, "packed": PACKED}.items()):
        model = {"kind": "custom", "factory": "tests.cache.made:Linear", "arguments": {"seed": 2 * source + number}}
        entries[name] = teacher(kept, model=model)
    views = {"num_views": num_views, "seed": 3, "augmentations": FLIP_AND_CROP}
    return recipe(path, dataset=pixels, teachers=entries, views=views, shard_rows=128, batch_size=300)


class Sources:
    """Two caches of two views, and the digests of three views each."""

    def __init__(self, folder: Path) -> None:
        self.paths = [folder / "first.zarr", folder / "second.zarr"]
        self.digests = []
        for number, path in enumerate(self.paths):
            precompute(plan(path, number))
            grown = shutil.copytree(path, folder / f"grown{number}.zarr")
            precompute(plan(grown, number, num_views=3))
            reader = Reader()
            assert reader.open(str(grown)) == 3
            self.digests.append([reader.read(str(grown), view) for view in range(3)])
        assert len({digest for digests in self.digests for digest in digests} - {None}) == 6


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("sources"))


class World:
    """Two caches that change and one that does not, and what each of two processes has opened of them."""

    def __init__(self, folder: Path, sources: Sources, there: There) -> None:
        self._folder, self._sources = folder, sources
        self._readers = {"here": Reader(), "there": there}
        self._at: dict[str, int | None] = {"one": 0, "two": 1, "untouched": 0}
        self._opened: dict[tuple[str, str], tuple[int, int]] = {}
        self._looks = 0
        for name, source in self._at.items():
            assert source is not None
            shutil.copytree(sources.paths[source], self._path(name))
            for process in self._readers:
                self.open(name, process)
                assert (process, name) in self._opened

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.zarr"

    def open(self, name: str, process: str) -> None:
        views = self._readers[process].open(str(self._path(name)))
        self._opened.pop((process, name), None)
        if views is not None:
            source = self._at[name]
            assert source is not None
            self._opened[process, name] = source, views

    def read(self, name: str, process: str) -> str | None:
        """Read one view after the other; what is read is of the cache that was opened."""
        if (process, name) not in self._opened:
            return None
        source, views = self._opened[process, name]
        self._looks += 1
        view = self._looks % views
        found = self._readers[process].read(str(self._path(name)), view)
        assert found in (None, self._sources.digests[source][view])
        return found

    def replace(self, name: str) -> None:
        self.delete(name)
        self._at[name] = self._looks % 2
        aside = self._folder / "aside"
        shutil.copytree(self._sources.paths[self._looks % 2], aside)
        aside.rename(self._path(name))

    def shards(self, name: str) -> None:
        """Put the shards of the other cache into the place of its own, without their records."""
        source = self._at[name]
        for file in [] if source is None else self._sources.paths[1 - source].glob("*.logits/c.*"):
            self._put(self._path(name) / file.parent.name / file.name, file.read_bytes())

    def damage(self, name: str) -> None:
        for file in sorted(self._path(name).glob("*.logits/c.*"))[self._looks % 3 :: 3]:
            data = file.read_bytes()
            self._put(file, data[:50] + bytes([data[50] ^ 1]) + data[51:])

    def repair(self, name: str) -> None:
        source = self._at[name]
        if source is not None:
            file = self._folder / "recipe.yaml"
            file.write_text(dump_recipe(plan(self._path(name), source)))
            assert not repair(self._path(name), file).problems

    def grow(self, name: str) -> None:
        source = self._at[name]
        if source is not None:
            with contextlib.suppress(LogitCacheError):  # nothing is added to a cache that is damaged
                precompute(plan(self._path(name), source, num_views=3))

    def delete(self, name: str) -> None:
        shutil.rmtree(self._path(name), ignore_errors=True)
        self._at[name] = None

    def _put(self, file: Path, data: bytes) -> None:
        """Replace a file: what others have mapped stays as it was."""
        new = file.with_name("new")
        new.write_bytes(data)
        new.rename(file)


@settings(max_examples=12, deadline=None)
@example(steps=[("shards", "one"), ("read here", "one")])
@example(steps=[("read here", "one"), ("replace", "one"), ("open there", "one"), ("read here", "one")])
@given(steps=st.lists(st.sampled_from(STEPS), min_size=2, max_size=8))
def test_every_row_read_is_one_of_the_cache_that_was_opened_or_an_error(
    steps: list[tuple[str, str]], sources: Sources, there: There, tmp_path_factory: pytest.TempPathFactory
) -> None:
    world = World(tmp_path_factory.mktemp("world"), sources, there)
    for step, name in steps:
        action, _, process = step.partition(" ")
        getattr(world, action)(name, *filter(None, [process]))
    for process in ("here", "there"):
        for _ in range(2):
            for name in CACHES:
                world.read(name, process)
            assert world.read("untouched", process) is not None
