"""Files of runs that a report and a tracker read."""

from pathlib import Path

import pytest

from logitcache.errors import CacheError
from logitcache.report.page.run_files import read_runs

DAMAGED = [
    ("metrics.jsonl", b'{"epoch": 0}\n\xff\xfe\x00\n'),
    ("metrics.jsonl", b"[1, 2]\n"),
    ("result.json", b"[" * 100_000),
    ("result.json", b'{"a":' * 100_000),
    ("environment.json", b"\x00"),
]


@pytest.mark.parametrize(("name", "content"), DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_file_is_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("out: x\n")
    (tmp_path / "environment.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CacheError, match=f"{name} is damaged: .* Fix: "):
        read_runs([tmp_path])
