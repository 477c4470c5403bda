"""Files of runs that a report and a tracker read."""

from pathlib import Path

import pytest

from logitcache.errors import CacheError
from logitcache.report.page.run_files import read_runs
from logitcache.student.trackers import TrackedRun

DAMAGED = [
    ("metrics.jsonl", b'{"epoch": 0}\n\xff\xfe\x00\n'),
    ("metrics.jsonl", b"[1, 2]\n"),
    ("metrics.jsonl", b'{"epoch": 0, "step": "1"}\n'),
    ("metrics.jsonl", b'{"epoch": 0}\n'),
    ("result.json", b"[" * 100_000),
    ("result.json", b'{"a":' * 100_000),
    ("environment.json", b"\x00"),
]


@pytest.mark.parametrize(("name", "content"), DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("out: x\n")
    (tmp_path / "environment.json").write_text('{"versions": [], "learns_from": {}}')
    (tmp_path / "checkpoint.pt").touch()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CacheError, match=f"{name} is damaged: .* Fix: "):
        read_runs([tmp_path])


@pytest.mark.parametrize("content", [b"\xff", b"[]", b"[" * 100_000], ids=range(3))
def test_a_damaged_note_of_trackers_is_named(content: bytes, tmp_path: Path) -> None:
    run = TrackedRun(tmp_path, "run", {})
    assert run.note() == run.note()
    (tmp_path / "tracking.json").write_bytes(content)
    with pytest.raises(CacheError, match=r"tracking\.json is damaged"):
        run.note()
