"""Weights: digests, safetensors and weights-only files in, safetensors out."""

import hashlib
import pickle
import sys
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from logitcache.errors import RecipeError
from logitcache.files import write_atomically

# What data-parallel and compiled modules put before every name.
_WRAPPERS = ("module.", "_orig_mod.")
_NUM_SHOWN = 5

State = dict[str, Tensor]


def weights_digest(module: nn.Module) -> str:
    """Hash every parameter and buffer: hexadecimal sha256 of names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_state(module).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(_raw(tensor))
    return digest.hexdigest()


def _state(module: nn.Module) -> State:
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise RecipeError(
                f"the model's state '{name}' is a {type(value).__name__}, which cannot be stored.\n"
                "  Fix: keep it out of the state, as a plain attribute that the constructor sets."
            )
    return dict(state)


def _raw(tensor: Tensor) -> memoryview:
    assert sys.byteorder == "little"
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def save_weights(path: Path, module: nn.Module) -> None:
    """Write a module's parameters and buffers as safetensors, whole or not at all."""
    # Clones: safetensors refuses tensors that share memory (tied weights) or are channels-last.
    state = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in _state(module).items()
    }
    write_atomically(path, save(state))


def read_state(path: Path, key: str | None = None, prefix: str | None = None) -> State:
    """Read named tensors from a safetensors or weights-only file, running nothing that it holds.

    `key` ("ema.model") is where in the file they are; without it the one group of tensors is
    taken. `prefix` keeps the names that begin with it, and drops it. Raises RecipeError with what
    the file holds.
    """
    if not path.is_file():
        raise RecipeError(f"there is no weights file {path}.\n  Fix: mend the path in the recipe.")
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
    state = _select(content, key, path)
    if prefix is None:
        return state
    chosen = {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}
    if not chosen:
        raise RecipeError(
            f"no name in {path} begins with '{prefix}'; the first are {_listed(state)}.\n"
            "  Fix: mend `prefix`, or leave it out."
        )
    return chosen


def _load_safetensors(path: Path) -> State:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise RecipeError(
            f"{path} cannot be read as safetensors: {error}.\n  Fix: copy or download it again."
        ) from error


def _load_torch(path: Path) -> object:
    with open(path, "rb") as file:
        start = file.read(2)
    if not start.startswith((b"PK", b"\x80")):  # a zip file, or the pickle of older releases
        raise RecipeError(f"{path} is no torch weights file.\n  Fix: point `path` at one, or at safetensors.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise RecipeError(
            f"{path} holds more than weights, and reading it could run code; it was not read.\n"
            "  Fix: where you trust the file, load it and write its weights alone:\n"
            "    safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from error
    except (RuntimeError, ValueError, EOFError, KeyError, BadZipFile) as error:
        reason = str(error).partition("\n")[0]
        raise RecipeError(
            f"{path} cannot be read as a torch weights file: {reason}\n"
            "  Fix: point `path` at what torch.save(model.state_dict()) wrote, or safetensors."
        ) from error


def _is_state(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _select(content: Any, key: str | None, path: Path) -> State:
    """Find the named tensors in what a file holds; the choice between several is the user's."""
    if key is not None:
        for part in key.split("."):
            content = content.get(part) if isinstance(content, Mapping) else None
        if not _is_state(content):
            raise RecipeError(f"{path} holds no weights under '{key}'.\n  Fix: mend `key`, or leave it out.")
        return dict(content)
    if _is_state(content):
        return dict(content)
    groups = content if isinstance(content, Mapping) else {}
    found = [str(name) for name, value in groups.items() if _is_state(value)]
    if len(found) == 1:
        return dict(groups[found[0]])
    if found:
        raise RecipeError(
            f"{path} holds several sets of weights: {', '.join(found)}.\n  Fix: choose one, as in key: {found[0]}."
        )
    raise RecipeError(
        f"{path} holds no named tensors, but {_listed(groups) or type(content).__name__}.\n"
        "  Fix: say with `key` where the weights are, dots between the levels."
    )


def _unwrapped(state: Mapping[str, Tensor], own: State) -> Mapping[str, Tensor]:
    """Drop what torch's own wrappers put before every name, unless the module has it too."""
    for wrapper in _WRAPPERS:
        if all(n.startswith(wrapper) for n in state) and not any(n.startswith(wrapper) for n in own):
            return {name.removeprefix(wrapper): state[name] for name in state}
    return state


def load_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Set every parameter and buffer of a module.

    Raises RecipeError that lists each missing, surplus or misshapen name; `source` is the file
    that the message names.
    """
    own = _state(module)
    state = _unwrapped(state, own)
    missing = _without_ties(own, own.keys() - state.keys(), state)
    surplus = state.keys() - own.keys()
    shapes = {n: (list(state[n].shape), list(own[n].shape)) for n in own.keys() & state.keys()}
    wrong = [f"{n} is {there}, not {here}" for n, (there, here) in shapes.items() if there != here]
    if not (missing or surplus or wrong):
        module.load_state_dict(dict(state), strict=False)
        return
    lines = [f"{source} does not fit the model."]
    lines += [f"  Missing in the file ({len(missing)}): {_listed(missing)}."] if missing else []
    lines += [f"  Not in the model ({len(surplus)}): {_listed(surplus)}."] if surplus else []
    lines += [f"  Another shape ({len(wrong)}): {_listed(wrong)}."] if wrong else []
    raise RecipeError("\n".join([*lines, f"  Fix: {_mismatch_fix(missing, surplus)}"]))


def _without_ties(own: State, names: Iterable[str], state: Mapping[str, Tensor]) -> list[str]:
    """Leave out names whose memory another name fills: safetensors stores tied weights once.

    Counts of batches seen are left out too: files older than them are complete.
    """
    filled = {(own[n].data_ptr(), own[n].shape) for n in own.keys() & state.keys()}
    return [
        name
        for name in names
        if (own[name].data_ptr(), own[name].shape) not in filled and not name.endswith("num_batches_tracked")
    ]


def _mismatch_fix(missing: Iterable[str], surplus: Iterable[str]) -> str:
    """Guess what went wrong from the names alone."""
    for name in sorted(missing):
        for other in sorted(surplus):
            if other.endswith("." + name):
                return f"`prefix: {other.removesuffix(name)}` takes those names and drops that part."
    return "build the architecture, classes and options that these weights were trained in."


def _listed(names: Iterable[object]) -> str:
    """List the first few names, sorted."""
    every = sorted(map(str, names))
    return ", ".join(every[:_NUM_SHOWN]) + (", …" if len(every) > _NUM_SHOWN else "")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Word a correction from the nearest known names."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else "no known name is near it."
