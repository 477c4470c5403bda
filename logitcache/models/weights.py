"""Weights: digests, safetensors and weights-only files in, safetensors out."""

import hashlib
import pickle
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from logitcache.errors import RecipeError
from logitcache.runtime.console import logger
from logitcache.store.files import write_atomically

# The attributes under which torch's own wrappers (data parallel, compiled, FSDP, averaged) hold the wrapped module.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_OF_AVERAGES = "n_averaged"  # what torch's AveragedModel counts beside the wrapped module
_COUNTS = "num_batches_tracked"
_NUM_SHOWN = 5

State = dict[str, Tensor]


class CodeInFile(ValueError):
    """A file of weights holds objects that reading it would have to build."""


def weights_digest(module: nn.Module) -> str:
    """Hash every parameter and buffer: hexadecimal sha256 of names, dtypes, shapes and bytes."""
    assert sys.byteorder == "little"
    digest = hashlib.sha256()
    for name, tensor in sorted(_state(module).items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
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

    `key` ("ema.model") selects a group of tensors; without it the file has to hold one. `prefix` keeps the names that
    begin with it, and drops it. Raises RecipeError with the content of the file.
    """
    if not path.is_file():
        raise RecipeError(f"there is no weights file {path}.\n  Fix: correct the path in the recipe.")
    try:
        state = _select(load_file(path) if path.suffix == ".safetensors" else _load_torch(path), key, path)
    except SafetensorError as error:
        fix = "Fix: copy or download it again."
        raise RecipeError(f"{path} cannot be read as safetensors: {error}.\n  {fix}") from error
    if prefix is None:
        return state
    chosen = {n.removeprefix(prefix): value for n, value in state.items() if n.startswith(prefix)}
    if not chosen:
        raise RecipeError(
            f"no name in {path} begins with '{prefix}'; the first are {_listed(state)}.\n"
            "  Fix: correct `prefix`, or leave it out."
        )
    return chosen


def _load_torch(path: Path) -> object:
    with open(path, "rb") as file:
        start = file.read(2)
    if not start.startswith((b"PK", b"\x80")):  # a zip file, or the pickle of older releases
        raise RecipeError(f"{path} is no torch weights file.\n  Fix: point `path` at one, or at safetensors.")
    try:
        return load_plain(path)
    except CodeInFile as error:
        raise RecipeError(
            f"{path} {error}; it was not read.\n"
            "  Fix: ask its author for the weights alone, written where the model is in memory:\n"
            "    safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from None
    except ValueError as error:
        raise RecipeError(
            f"{path} cannot be read as a torch weights file: {error}\n"
            "  Fix: point `path` at what torch.save(model.state_dict()) wrote, or safetensors."
        ) from error


def load_plain(path: Path) -> object:
    """Read tensors and plain values that torch.save wrote, to the CPU; runs nothing that the file holds.

    Raises CodeInFile if it holds anything else, ValueError with a reason if it is damaged.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch's own message recommends to load the file without this guard.
        raise CodeInFile("holds more than tensors and plain values, and reading it could run code") from None
    except Exception as error:  # damage can surface as almost anything in a reader of archives
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from error


def _is_state(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _select(content: Any, key: str | None, path: Path) -> State:
    """Find the named tensors in the content of a file; the user chooses between several."""
    if key is not None:
        for part in key.split("."):
            content = content.get(part) if isinstance(content, Mapping) else None
        if not _is_state(content):
            raise RecipeError(f"{path} holds no weights under '{key}'.\n  Fix: correct `key`, or leave it out.")
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
        "  Fix: select the weights with `key`, dots between the levels."
    )


def _plain(name: str) -> str:
    """Drop the parts of a dotted name that torch's wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _unwrapped(state: Mapping[str, Tensor], own: Collection[str]) -> Mapping[str, Tensor]:
    """Rename tensors whose names differ from the module's only in wrappers, unless two would get one name."""
    names = {_plain(name): name for name in own}
    renamed = {names.get(_plain(name), name): value for name, value in state.items()}
    return renamed if len(names) == len(own) and len(renamed) == len(state) else state


def _computed(module: nn.Module) -> set[str]:
    """Name the buffers that the module computes itself and keeps out of its state."""
    return {
        f"{path}.{name}".lstrip(".")
        for path, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }


def load_weights(module: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Set every parameter and buffer of a module.

    Wrappers in the names are ignored; tensors that the module computes itself are skipped, which is reported. Raises
    RecipeError that lists each missing, surplus or unfit name; `source` is the file that the message names.
    """
    own, computed = _state(module), _computed(module)
    state = _unwrapped(state, own.keys() | computed)
    missing = _without_ties(own, own.keys() - state.keys(), state)
    surplus = state.keys() - own.keys()
    skipped = surplus & {*computed, _OF_AVERAGES}
    surplus -= skipped
    pairs = {name: (state[name], own[name]) for name in own.keys() & state.keys()}
    shapes = [f"{n} is {list(a.shape)}, not {list(b.shape)}" for n, (a, b) in pairs.items() if a.shape != b.shape]
    kinds = [f"{n} is {_kind(a)}, not {_kind(b)}" for n, (a, b) in pairs.items() if not _same_kind(n, a, b)]
    if not (missing or surplus or shapes or kinds):
        if skipped:
            logger.info(
                f"{source}: skipped {_listed(skipped)}, which the model computes itself ({len(skipped)} in all)"
            )
        module.load_state_dict({name: state[name] for name in pairs}, strict=False)
        return
    wrong = {
        "Missing in the file": missing,
        "Not in the model": surplus,
        "Another shape": shapes,
        "Another kind of number": kinds,
    }
    lines = [f"  {what} ({len(names)}): {_listed(names)}.\n" for what, names in wrong.items() if names]
    fix = _mismatch_fix(missing or own, surplus, kinds)
    raise RecipeError(f"{source} does not fit the model.\n{''.join(lines)}  Fix: {fix}")


def _kind(tensor: Tensor) -> str:
    """Name the kind of number that a tensor holds: a conversion between kinds would change or lose values."""
    if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
        return "no plain tensor"
    if tensor.is_complex():
        return "complex"
    return "floating-point" if tensor.is_floating_point() else "integer"


def _same_kind(name: str, found: Tensor, wanted: Tensor) -> bool:
    kinds = {_kind(found), _kind(wanted)}
    # Averages of weights may average the counts of batches too, which no prediction uses.
    return len(kinds) == 1 or (name.endswith(_COUNTS) and kinds == {"floating-point", "integer"})


def _without_ties(own: State, names: Iterable[str], state: Mapping[str, Tensor]) -> list[str]:
    """Leave out names whose memory another name fills: safetensors stores tied weights once.

    Counts of batches seen are left out too: files older than them are complete.
    """
    filled = {(own[n].data_ptr(), own[n].shape) for n in own.keys() & state.keys()}
    return [
        name for name in names if (own[name].data_ptr(), own[name].shape) not in filled and not name.endswith(_COUNTS)
    ]


def _mismatch_fix(names: Iterable[str], surplus: Iterable[str], kinds: Collection[str]) -> str:
    """Guess the fix from the names alone: those to find, and those that were found instead."""
    wanted, prefixes = {_plain(name) for name in names}, Counter[str]()
    for name in surplus:
        parts = name.split(".")
        cuts = (cut for cut in range(1, len(parts)) if _plain(".".join(parts[cut:])) in wanted)
        prefixes.update(".".join(parts[:cut]) + "." for cut in cuts)
    if prefixes:
        prefix = min(prefixes, key=lambda each: (-prefixes[each], each))
        return f"`prefix: {prefix}` takes those names and drops that part."
    if kinds:
        return "take the file before it was quantised or converted: weights are floating-point numbers."
    return "build the architecture, classes and options that these weights were trained in."


def _listed(names: Iterable[object]) -> str:
    """List the first few names, sorted."""
    every = sorted(map(str, names))
    return ", ".join(every[:_NUM_SHOWN]) + (", …" if len(every) > _NUM_SHOWN else "")


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Suggest the nearest known names."""
    near = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else "no known name is near it."
