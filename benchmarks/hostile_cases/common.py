"""What is sound, the commands, and what a case of `hostile.py` is."""

import contextlib
import gzip
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import logitcache.cli
from tests.stage_one.apart import ended, forked, import_package

import_package()
_FIGURES = ("matplotlib.figure", "matplotlib.backends.backend_svg", "jinja2", "sklearn.manifold")
_LIBRARIES = {
    "": ("timm", "aiohttp", "s3fs", "torch._dynamo", "torch.utils.flop_counter"),
    "view": _FIGURES,
    "suspects": _FIGURES,
    "page": _FIGURES,
    "run page": _FIGURES,
    "log": ("torch.utils.tensorboard",),
    "export": ("onnxscript", "onnxruntime"),
    "predict file": ("onnxruntime",),
    "quantize": ("onnxscript", "onnxruntime"),
    "app": ("gradio", "onnxruntime"),
}
"""What commands import besides the package, "" any of them."""

OK, USAGE, DAMAGED, OTHER = 0, 2, 3, 4
REQUEST_SECONDS = 0.5
"""Of cases with a server: a request is not retried after three times as long, so that its last attempt ends by four."""

BOMB = gzip.compress(bytes(64 << 20), 1) * 16
ENVIRONMENT = {
    "LOGITCACHE_SHARED_MEMORY": "0",
    "OMP_NUM_THREADS": "1",
    "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "AWS_SESSION_TOKEN": "secret-session-token",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "HF_HUB_OFFLINE": "0",
    "NO_COLOR": "1",
}
COUNT = 24

PRECOMPUTE = """
cache: c.zarr
dataset: {kind: image_folder, root: images}
views: {num_views: 2, augmentations: [{kind: random_crop, size: 8, padding: 1}, {kind: horizontal_flip}]}
teachers:
  t: {model: {kind: run, path: teacher}, logits: {kind: dense}, features: {last: {kind: pooled, tap: "0.8"}}}
  u: {model: {kind: run, path: teacher}, logits: {kind: top_k, k: 2, storage: packed}}
batch_size: 12
num_workers: 0
"""
STUDENT = """
out: run
cache: c.zarr
model: {kind: small_cnn, width: 2, depth: 1}
losses: [{kind: kl_divergence, teacher: t}, {kind: kl_divergence, teacher: u}]
epochs: 1
batch_size: 12
num_workers: 0
validation: {dataset: {kind: image_folder, root: images}}
"""
TEACHER = """
out: teacher
dataset: {kind: image_folder, root: images}
augmentations: []
model: {kind: small_cnn, width: 2, depth: 1}
epochs: 1
batch_size: 12
num_workers: 0
"""
DERIVE = "{cache: c.zarr, out: d.zarr, teachers: {t: {logits: {kind: uint8}}}}\n"
AGAIN = PRECOMPUTE.replace("c.zarr", "again.zarr").replace("path: teacher", "path: run")


def import_libraries(commands: Iterable[str]) -> None:
    """Import what commands need, before anything forks: a large process takes long to fork."""
    for name in {library for command in ("", *commands) for library in _LIBRARIES.get(command, ())}:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


@contextlib.contextmanager
def making_sound(folder: Path) -> Iterator[None]:
    """Make the images, a teacher, a cache and a finished run, in a child: this process keeps no threads."""
    child = forked(lambda: _make(folder))
    yield
    if ended(child):
        raise SystemExit("the sound cache could not be made")


def _make(folder: Path) -> int:
    for number in range(COUNT):
        _write_image(folder, number)
    texts = {"precompute": PRECOMPUTE, "student": STUDENT, "teacher": TEACHER, "derive": DERIVE, "again": AGAIN}
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(text)
    os.chdir(folder)
    os.environ.update({**ENVIRONMENT, "HOME": str(folder / "maker")})
    commands = [
        ["train-teacher", "teacher.yaml"],
        ["precompute", "precompute.yaml"],
        ["train-student", "student.yaml"],
        ["pair", "c.zarr", "pairs", "--dataset", "images"],
        ["export", "run", "model.onnx"],
        COMMANDS["synthesize"](folder, None),
    ]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        if any(logitcache.cli.main([*arguments, "-q"]) for arguments in commands):
            return 1
        (folder / "made").rename(folder / "synthesized")
        if _grow(folder):
            return 1
    shutil.rmtree(folder / "maker", ignore_errors=True)  # a stranger's cache: no memory of having made it
    return 0


def _grow(folder: Path) -> int:
    """Append images to copies of the cache: to `grown.zarr` all of `many`, to `growing.zarr` a part."""
    for name in ("grown.zarr", "growing.zarr"):
        shutil.copytree(folder / "c.zarr", folder / name)
    shutil.copytree(folder / "images", folder / "first")
    for number in range(COUNT, COUNT + 6):
        _write_image(folder, number)
    append = ["precompute", "precompute.yaml", "-q", "--set", "new_images=append", "--set"]
    code = logitcache.cli.main([*append, "cache=grown.zarr"])
    logitcache.cli.main([*append, "cache=growing.zarr", "--part", "1/2"])  # ends with the code of a cache that waits
    (folder / "images").rename(folder / "many")
    (folder / "first").rename(folder / "images")
    return code or not (folder / "growing.zarr/digest/growing").exists()


def _write_image(folder: Path, number: int) -> None:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = folder / "images" / "abc"[number % 3] / f"{number:02d}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)


def _cache(folder: Path, case: "Case | None") -> str:
    port = folder / "port"
    location = "c.zarr" if case is None else case.location
    return location.replace("PORT", port.read_text()) if port.exists() else location


COMMANDS: Mapping[str, Callable[[Path, "Case | None"], list[str]]] = {
    "inspect": lambda folder, case: ["inspect", _cache(folder, case)],
    "verify": lambda folder, case: ["verify", _cache(folder, case)],
    "summary": lambda folder, case: ["summary", _cache(folder, case)],
    "gc": lambda folder, case: ["gc", _cache(folder, case), "--dry-run"],
    "train": lambda folder, case: [
        "train-student",
        "student.yaml",
        "--set",
        "out=new",
        "--set",
        f"cache={_cache(folder, case)}",
    ],
    "online": lambda folder, case: [
        *("train-student", "student.yaml", "--online", "--set", "out=live", "--set", f"cache={_cache(folder, case)}")
    ],
    "check": lambda folder, case: ["recipe", "check", "student.yaml", "--set", f"cache={_cache(folder, case)}"],
    "derive": lambda folder, case: ["derive", "derive.yaml", "--set", f"cache={_cache(folder, case)}"],
    "precompute": lambda folder, case: ["precompute", "precompute.yaml", "--set", f"cache={_cache(folder, case)}"],
    "plan": lambda folder, case: [
        "plan",
        "precompute.yaml",
        "--batches",
        "1",
        "--set",
        f"cache={_cache(folder, case)}",
    ],
    "evaluate": lambda folder, case: ["evaluate", "run"],
    "resume": lambda folder, case: ["train-student", "student.yaml", "--resume", "--set", "epochs=1"],
    "synthesize": lambda folder, case: [
        *("synthesize", "run", "made", "--set", "size=8", "--set", "steps=1", "--set", "batch_size=8"),
        *("--set", "num_batches=1"),
    ],
    "teach": lambda folder, case: ["precompute", "again.yaml"],
    "start": lambda folder, case: [
        "train-student",
        "student.yaml",
        "--set",
        "out=new",
        "--set",
        "model={kind: run, path: run}",
    ],
    "card": lambda folder, case: ["card", _cache(folder, case), "--out", "card.md"],
    "view": lambda folder, case: ["inspect", _cache(folder, case), "--view", "1/0"],
    "suspects": lambda folder, case: ["suspects", _cache(folder, case)],
    "sweep": lambda folder, case: ["sweep", "student.yaml", "swept", "--set", f"cache={_cache(folder, case)}"],
    "page": lambda folder, case: ["report", _cache(folder, case), "--points", "20"],
    "predict": lambda folder, case: ["predict", "run", "images/a/00.png"],
    # It opens both and, as no machine has the address, ends there.
    "app": lambda folder, case: ["app", "run", "--cache", _cache(folder, case), "--host", "192.0.2.1"],
    "export": lambda folder, case: ["export", "run", "again.onnx"],
    "quantize": lambda folder, case: [
        *("quantize", "run", "again.int8.onnx", "--images", "4", "--least-agreement", "0")
    ],
    "prune": lambda folder, case: ["prune", "run", "pruned", "--sparsity", "0.5"],
    "pair": lambda folder, case: ["pair", _cache(folder, case), "paired", "--dataset", "images"],
    "verify pairing": lambda folder, case: ["verify", _cache(folder, case), "--pairing", "pairs"],
    "train pairing": lambda folder, case: [
        *("train-student", "student.yaml", "--set", "out=new", "--set", "pairing=pairs"),
        *("--set", f"cache={_cache(folder, case)}"),
    ],
    "predict file": lambda folder, case: ["predict", "model.onnx", "images/a/00.png"],
    "log": lambda folder, case: ["log", "run", "--to", "tensorboard"],
    "run page": lambda folder, case: ["report", "run", "--points", "20"],
}
READERS = ("inspect", "verify", "summary", "gc", "train", "online", "check", "derive", "precompute", "plan")
READERS += ("pair", "card", "view", "suspects", "sweep", "page", "app")
RUNS = ("evaluate", "resume", "teach", "start", "predict", "export", "quantize", "prune", "log", "run page", "app")
RUNS += ("synthesize",)
ALIKE = {
    "suspects": "summary",
    "pair": "train",
    "sweep": "train",
    "view": "verify",
    "page": "inspect",
    "card": "inspect",
    "predict": "evaluate",
}

ALIKE |= {"synthesize": "teach", "export": "evaluate", "quantize": "evaluate", "prune": "evaluate"}
"""Commands that read the same as others, and end with the same codes where a case does not say otherwise."""

Prepare = Callable[[Path], Any]


@dataclass(frozen=True)
class Case:
    """One spoilt thing; `ends` has the exit codes by command, and those of "else".

    `commands` are what it is about; `location` is where the cache is, for those on a server, which may take `seconds`
    more. `prepare` may return an environment, or start what `prepared` stops: it yields (environment, ports).
    """

    group: str
    name: str
    prepare: Prepare
    ends: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    commands: tuple[str, ...] = ("verify", "train")
    every: tuple[str, ...] = READERS
    location: str = "c.zarr"
    seconds: float = 0.0

    def codes(self, command: str) -> frozenset[int]:
        """Return the exit codes with which a command may end."""
        named = (self.ends[name] for name in (command, ALIKE.get(command), "else") if name in self.ends)
        codes = frozenset(next(named, (USAGE, DAMAGED, OTHER)))
        # The app ends at an address that no machine has; `pair` decodes no answer.
        return codes | {"app": {USAGE}, "pair": {OK}}.get(command, set())

    @contextlib.contextmanager
    def prepared(self, folder: Path) -> Iterator[tuple[Mapping[str, str], frozenset[int]]]:
        """Spoil a copy of what is sound; yields the environment and the ports that a command may connect to."""
        found = self.prepare(folder)
        if hasattr(found, "__enter__"):
            with found as (environment, ports):
                yield environment, frozenset(ports)
        else:
            yield (found if isinstance(found, dict) else {}), frozenset()


def forge(folder: Path, change: Callable[[dict[str, Any]], object], cache: str = "c.zarr") -> None:
    """Change the manifest and sign it again, as an attacker would."""
    file = folder / cache / "zarr.json"
    found = json.loads(file.read_bytes())
    entry = found["attributes"]["logitcache"]
    change(entry["manifest"])
    entry["sha256"] = hashlib.sha256(json.dumps(entry["manifest"], sort_keys=True).encode()).hexdigest()
    file.write_text(json.dumps(found))


class Bomb:
    """What leaves a trace in the working directory where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("PWNED-by-pickle", "w"))
