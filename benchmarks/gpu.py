"""Do both stages run on this machine's device? One JSON document of what each part did, in minutes.

    python benchmarks/gpu.py [--quick] [--out gpu.json] [--device cuda]

Bundled images and the shipped teacher: stage one in float32, in bfloat16 and with `speed: auto`, each cache compared
with that of the CPU; verification; a student in float32, under autocast, with `torch.compile` (on CUDA), and by
torchrun with one process (NCCL on CUDA, else gloo). The set stays on the device: its views are compared with those of
the CPU, and all students learn from them. It runs on a CPU as well. Exits 1 if a part failed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from logitcache.cache.cache import open_cache
from logitcache.runtime.device import resolve_device
from logitcache.runtime.versions import versions
from logitcache.views.keys import ViewKey
from logitcache.views.resident import ResidentViews, may_stay

RECIPES = Path(__file__).parent.parent / "pipelines" / "fashion_mnist"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")
BOUNDS = {"fp32": 2e-2, "bf16": 1e-1, "fast": 2e-2}
"""Largest difference from the CPU's answers in float32, as a share of their size: TF32 has the digits of float16."""


def run(words: list[str], changes: dict[str, object], launcher: tuple[str, ...] = ()) -> dict[str, Any]:
    """Run a command of logitcache; return its document, its seconds and its exit code."""
    settings = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    started = time.perf_counter()
    command = [sys.executable, *launcher, "-m", "logitcache", *words, *settings, "--json", "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = {"exit_code": done.returncode, "seconds": round(time.perf_counter() - started, 2)}
    if done.returncode:
        return found | {"error": (done.stdout + done.stderr)[-800:]}
    return found | {"result": json.loads(done.stdout)}


def difference(cache: Path, other: Path) -> float:
    """Return the largest difference of the logits in two caches, as a share of the size of those of the second."""
    found = [open_cache(path) for path in (cache, other)]
    keys = [ViewKey(0, index) for index in range(len(found[0]))]
    one, two = (opened.answers(keys)["teacher"].logits.float() for opened in found)
    return float((one - two).abs().max() / two.square().mean().sqrt())


def resident(cache: Path, device: torch.device) -> dict[str, Any]:
    """Compare views that are rendered on the device, where their images stay, with those of the CPU."""
    views, started = open_cache(cache).views(), time.perf_counter()
    keys = [ViewKey(0, index) for index in range(len(views.dataset.ids))]
    (found,) = ResidentViews(views, device).render([keys])
    equal = may_stay(views, device) and found.device.type == device.type
    equal = equal and torch.equal(found.cpu(), views.__getitems__(keys))
    return {"exit_code": int(not equal), "seconds": round(time.perf_counter() - started, 2)}


def parts(folder: Path, device: str, quick: bool) -> dict[str, dict[str, Any]]:
    """Run every part; return what each did, by name."""
    images = {"dataset.num_images": 200 if quick else 5000, "views.num_views": 1 if quick else 4}
    found: dict[str, dict[str, Any]] = {}

    def precompute(name: str, where: str, **changes: object) -> None:
        cache = {"cache": folder / f"{name}.zarr", "device": where, "teachers.teacher.logits.dtype": "float32"}
        found[f"precompute {name}"] = run(["precompute", str(RECIPES / "precompute.yaml")], cache | images | changes)

    precompute("cpu", "cpu")
    precompute("fp32", device)
    precompute("bf16", device, **{"teachers.teacher.precision": "bfloat16"})
    precompute("fast", device, **{"teachers.teacher.speed": "auto"})
    for name, bound in BOUNDS.items():
        if not found[f"precompute {name}"]["exit_code"]:
            share = difference(folder / f"{name}.zarr", folder / "cpu.zarr")
            found[f"answers {name}"] = {"exit_code": int(share > bound), "difference": share, "bound": bound}
    if not found["precompute fp32"]["exit_code"]:
        found["resident views"] = resident(folder / "fp32.zarr", torch.device(device))
    found["verify"] = run(["verify", str(folder / "fp32.zarr")], {})
    test = {"cache": folder / "test.zarr", "device": device, "dataset.num_images": 200}
    found["precompute test"] = run(["precompute", str(RECIPES / "precompute_test.yaml")], test)
    student = {"cache": folder / "fp32.zarr", "validation.cache": folder / "test.zarr", "device": device}
    student |= {"epochs": 1 if quick else 4, "schedule.warmup_epochs": 0}

    def train(name: str, launcher: tuple[str, ...] = (), **changes: object) -> None:
        words = ["train-student", str(RECIPES / "student.yaml")]
        found[f"train {name}"] = run(words, student | {"out": folder / name} | changes, launcher)

    train("float32")
    train("bfloat16", precision="bfloat16", channels_last="true")
    if torch.device(device).type == "cuda":
        train("float16", precision="float16")
        train("compiled", compile="true")
    train("torchrun", TORCHRUN)
    return found


def main() -> int:
    """Parse the arguments, run, and write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, one epoch")
    parser.add_argument("--device", default="auto", help="device to prove; by default the best one")
    parser.add_argument("--out", type=Path, help="file of the document; by default it is printed")
    arguments = parser.parse_args()
    device = resolve_device(arguments.device)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        found = parts(Path(name), str(device), arguments.quick)
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else versions()["cpu"]
    document = {"versions": versions(), "device": str(device), "hardware": hardware}
    document |= {"seconds": round(time.perf_counter() - started, 1), "parts": found}
    text = json.dumps(document, indent=2) + "\n"
    if arguments.out is None:
        print(text, end="")
    else:
        arguments.out.write_text(text)
    return int(any(part["exit_code"] for part in found.values()))


if __name__ == "__main__":
    sys.exit(main())
