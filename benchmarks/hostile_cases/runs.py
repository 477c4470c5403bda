"""The files of a run folder."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from hostile_cases.common import DAMAGED, OK, OTHER, RUNS, USAGE, Bomb, Case, Prepare
from hostile_cases.datasets import fifo, sparse
from hostile_cases.models import plant_weights, timm_model
from hostile_cases.stores import DEEP, linked, written


def run(name: str, prepare: Prepare, commands: tuple[str, ...] = ("evaluate", "teach"), **ends: Any) -> Case:
    """Spoil files of the run."""
    usual = dict.fromkeys(("evaluate", "teach", "start"), (USAGE, DAMAGED, OTHER))
    usual |= dict.fromkeys(("resume", "log", "run page"), (OK, USAGE, DAMAGED, OTHER))
    return Case("run", name, prepare, {**usual, **ends}, commands, RUNS)


def described(change: Callable[[dict[str, Any]], object], plant: Prepare = lambda folder: None) -> Prepare:
    """Change model.json of the run."""

    def prepare(folder: Path) -> None:
        plant(folder)
        file = folder / "run" / "model.json"
        found = json.loads(file.read_bytes())
        change(found)
        file.write_text(json.dumps(found))

    return prepare


def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Prepare:
    """Change the weights of the run."""

    def prepare(folder: Path) -> None:
        from safetensors.numpy import load_file

        file = folder / "run" / "weights.safetensors"
        found = load_file(file)
        change(found)
        save_file(found, file)

    return prepare


def header(text: bytes, size: int | None = None) -> Prepare:
    """Put another header in the place of that of the weights."""
    return lambda folder: (folder / "run/weights.safetensors").write_bytes(
        struct.pack("<Q", len(text) if size is None else size) + text
    )


def checkpoint(make: Callable[[Path], object]) -> Prepare:
    """Put another checkpoint into a run that is not finished."""

    def prepare(folder: Path) -> None:
        (folder / "run" / "result.json").unlink()
        make(folder / "run" / "checkpoint.pt")

    return prepare


def altered(change: Callable[[dict[str, Any]], object]) -> Prepare:
    """Change the state in the checkpoint of a run that is not finished."""

    def make(path: Path) -> None:
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return checkpoint(make)


RESUMED = (USAGE, DAMAGED, OTHER)
ONLY_RESUMED = {**dict.fromkeys(("evaluate", "teach", "start"), (OK, *RESUMED)), "resume": RESUMED}
"""Codes of a file that only --resume reads."""
MAY_START = {"resume": RESUMED, **dict.fromkeys(("teach", "start"), (OK, *RESUMED))}
"""Codes of a file that evaluate and --resume read."""
RUN_FOLDERS = [
    run("a hub's model", described(lambda d: d.update(model=timm_model("hf-hub:somebody/evil", True)))),
    run("timm from a folder", described(lambda d: d.update(model=timm_model("local-dir:evil", True)), plant_weights)),
    run(
        "timm with a checkpoint",
        described(lambda d: d.update(model=timm_model("resnet18", checkpoint_path="evil.pt")), plant_weights),
    ),
    run("a factory", described(lambda d: d.update(model={"kind": "custom", "factory": "os:system", "arguments": {}}))),
    run("a width of 10^7", described(lambda d: d["model"].update(width=10**7))),
    run("a depth of 10^9", described(lambda d: d["model"].update(depth=10**9))),
    run("classes of 10^12", described(lambda d: d.update(num_classes=10**12))),
    run("channels of 10^12", described(lambda d: d.update(in_channels=10**12))),
    run("an input of 10^6", described(lambda d: d["preprocessing"].update(input_size=10**6))),
    run("a mean of 1e308", described(lambda d: d["preprocessing"].update(mean=[1e308] * 3))),
    run(
        "a std of 10^6 channels", described(lambda d: d["preprocessing"].update(mean=[0.5] * 10**6, std=[0.5] * 10**6))
    ),
    run("timm of depths 10^9", described(lambda d: d.update(model=timm_model("convnext_atto", depths=[10**9] * 4)))),
    run("model.json is a pipe", fifo("run/model.json")),
    run("model.json is zero", linked("/dev/zero", "run/model.json")),
    run("model.json nested", written("run/model.json", DEEP)),
    run("model.json of 1 TB", sparse("run/model.json", 1 << 40)),
    run("model.json in UTF-16", written("run/model.json", "{}".encode("utf-16"))),
    run("weights are a pipe", fifo("run/weights.safetensors")),
    run("weights are zero", linked("/dev/zero", "run/weights.safetensors")),
    run("weights of 1 TB", sparse("run/weights.safetensors", 1 << 40)),
    run("weights are a pickle", lambda f: torch.save(Bomb(), f / "run/weights.safetensors")),
    run("a header of 2^63", header(b"{}", 2**63)),
    run("a header that is nested", header(b'{"a":' * 100_000)),
    run("integers for weights", tensors(lambda t: t.update({k: v.astype(np.int32) for k, v in t.items()}))),
    run(
        "weights that are NaN",
        tensors(lambda t: t.update({k: v * np.float32("nan") for k, v in t.items() if v.dtype == np.float32})),
        evaluate=(OK, *RESUMED),
        teach=RESUMED,
        start=(OK, 1, *RESUMED),
    ),
    run(
        "weights of other shapes",
        tensors(lambda t: t.update({k: np.zeros((1, *v.shape), v.dtype) for k, v in t.items()})),
    ),
    run(
        "metrics that are no text",
        written("run/metrics.jsonl", b"\xff\xfe\x00"),
        ("resume", "evaluate"),
        evaluate=(OK, *RESUMED),
        teach=(OK, *RESUMED),
        start=(OK, *RESUMED),
    ),
    run("result.json nested", written("run/result.json", DEEP), ("resume",), **ONLY_RESUMED),
    run(
        "recipe.yaml of an alias bomb",
        written(
            "run/recipe.yaml",
            (
                "a0: &a0 [x,x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1},*a{n - 1},*a{n - 1}]\n" for n in range(1, 30))
            ).encode(),
        ),
        ("evaluate", "resume"),
        **MAY_START,
    ),
    run(
        "recipe.yaml that runs",
        written("run/recipe.yaml", b"!!python/object/apply:os.system ['touch PWNED']"),
        ("evaluate", "resume"),
        **MAY_START,
    ),
    run("recipe.yaml is a pipe", fifo("run/recipe.yaml"), ("evaluate", "resume"), **MAY_START),
    run(
        "environment.json is zero", linked("/dev/zero", "run/environment.json"), ("resume", "evaluate"), **ONLY_RESUMED
    ),
    run("a checkpoint that unpickles", checkpoint(lambda path: torch.save(Bomb(), path)), ("resume",), **ONLY_RESUMED),
    run(
        "a checkpoint that is a pipe",
        checkpoint(lambda path: (path.unlink(), os.mkfifo(path))),
        ("resume",),
        **ONLY_RESUMED,
    ),
    run("a checkpoint of 1 TB", checkpoint(lambda path: os.truncate(path, 1 << 40)), ("resume",), **ONLY_RESUMED),
    run("a checkpoint of texts", altered(lambda s: s.update(dict.fromkeys(s, "x"))), ("resume",), **ONLY_RESUMED),
    run("a checkpoint without keys", altered(lambda s: s.clear()), ("resume",), **ONLY_RESUMED),
    run("a checkpoint of step 10^18", altered(lambda s: s.update(place=[10**18] * 3)), ("resume",), **ONLY_RESUMED),
]
