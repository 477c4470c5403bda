"""What commands import: `--help` no torch, and commands that read a cache no model."""

import json
import subprocess
import sys
from pathlib import Path

from logitcache.cli.app import main

HEAVY = ("torch", "zarr", "numpy")
UNNEEDED = ("logitcache.models", "zarr", "fsspec", "torchvision", "triton", "torch._dynamo", "torch.utils.flop_counter")
_ALL_HELPS = f"""
import json, sys
from typer.main import get_command
from logitcache.cli.app import main
from logitcache.cli.commands import app

def ask(command, path):
    assert main([*path, "--help"]) == 0
    for name, inner in getattr(command, "commands", {{}}).items():
        ask(inner, [*path, name])

ask(get_command(app), [])
print(json.dumps([name for name in {HEAVY} if name in sys.modules]), file=sys.stderr)
"""
_ONE = f"""
import json, sys
from logitcache.cli.app import main
assert main(sys.argv[1:]) == 0
print(json.dumps([name for name in {UNNEEDED} if name in sys.modules]), file=sys.stderr)
"""


def loaded(code: str, *words: str) -> list[str]:
    """Run code in a process of its own; return which of the modules it imported."""
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stderr.splitlines()[-1])
    return found


def test_no_help_imports_torch() -> None:
    assert loaded(_ALL_HELPS) == []


def test_commands_that_read_a_cache_import_what_they_need(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "pipelines/fashion_mnist/precompute_test.yaml"
    cache = str(tmp_path / "c.zarr")
    changes = (f"cache={cache}", "dataset.num_images=20", "batch_size=20", "device=cpu", "num_workers=0")
    words = [word for change in changes for word in ("--set", change)]
    assert main(["precompute", str(recipe), "--quiet", *words]) == 0
    comparing = {"zarr", "fsspec"}  # metadata, of files that changed a moment ago
    assert set(loaded(_ONE, "inspect", cache)) <= comparing
    assert set(loaded(_ONE, "verify", cache)) <= comparing
