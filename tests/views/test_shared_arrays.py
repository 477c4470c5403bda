"""Shared arrays: workers share the memory of large arrays, and are otherwise sent what pickle sends."""

import contextlib
import gc
import multiprocessing
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from logitcache.errors import LogitCacheError
from logitcache.views.keys import ViewKey
from logitcache.views.loader import ViewLoader
from logitcache.views.shared_arrays import SharedArrays
from logitcache.views.spec import Views, ViewSpec
from tests.views.images import Images, textured

WORDS = 1 << 18


def mapped_files() -> dict[range, str]:
    """Return the addresses of this process that are those of files, and which these are."""
    found = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, inode, name = [*line.split(None, 5), ""][:6]
        if inode != "0":
            found[range(*(int(address, 16) for address in addresses.split("-")))] = name
    return found


def open_files() -> list[str]:
    """Return what this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the folder itself was open while it was listed
            found.append(os.readlink(link))
    return found


def is_of_a_file(array: np.ndarray) -> bool:
    return any(array.ctypes.data in addresses for addresses in mapped_files())


class Large(Images):
    """Images that say of themselves, in two pixels, whether their arrays lie in files; the last image writes to one."""

    def __init__(self) -> None:
        super().__init__(textured(4, 2, 2))
        self.words, self.few, self.fixed = np.arange(WORDS), np.arange(100), np.arange(WORDS)
        self.fixed.setflags(write=False)

    def read(self, index: int) -> torch.Tensor:
        if index == 3:
            self.words[5] = 77
        facts = (is_of_a_file(self.words), is_of_a_file(self.few), self.fixed.flags.writeable, self.words[5])
        return torch.tensor(facts).to(torch.uint8).reshape(1, 2, 2)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at /proc")
def test_workers_share_large_arrays_until_they_write_to_them():
    images = Large()
    loader = ViewLoader(Views(images, ViewSpec()), 2)
    pixels = [batch.flatten().tolist() for batch in loader.render([[ViewKey(0, index)] for index in (3, 1, 3, 1)])]
    assert pixels == [[1, 0, 0, 77], [1, 0, 0, 5]] * 2  # batches take turns among the two workers
    assert images.words[5] == 5
    loader.close()


def send(queue, value: object) -> None:
    queue.put(repr(value))


def test_what_arrives_is_what_was_sent_by_any_number_of_processes():
    context = multiprocessing.get_context("forkserver")
    large = np.random.default_rng(0).integers(0, 9, WORDS)
    for value in ({"a": [1, "two"]}, [large, {"again": large, "odd": np.ones((1 << 20) + 1, np.int8)}, torch.ones(3)]):
        handover, queue = SharedArrays(value), context.Queue()
        for _ in range(2):
            process = context.Process(target=send, args=(queue, handover))
            process.start()
            assert queue.get(timeout=60) == repr(value)
            process.join()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="looks at /proc")
def test_nothing_is_left_of_what_was_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loader = ViewLoader(Views(Large(), ViewSpec()), 1, "spawn")
    [pixels] = loader.render([[ViewKey(0, 0)]])
    assert pixels.flatten().tolist() == [1, 0, 0, 5]
    assert list(tmp_path.iterdir()) == []
    assert any(str(tmp_path) in target for target in open_files())
    loader.close()
    del loader
    gc.collect()
    assert not any(str(tmp_path) in target for target in open_files())


def test_a_folder_that_takes_no_file_is_named_with_a_fix(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    loader = ViewLoader(Views(Large(), ViewSpec()), 1, "forkserver")
    with pytest.raises(LogitCacheError, match=r"4194304 bytes .* '.*gone': No such file.*\n  Fix: .*TMPDIR"):
        next(loader.render([[ViewKey(0, 0)]]))
