"""A folder of transformers: where it lies, its settings, and that its weights are safetensors."""

import json
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from logitcache.errors import LogitCacheError, RecipeError, needs_extra
from logitcache.store.hub import hub_name, local_folder
from logitcache.store.safe_files import read_bounded

CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_FETCHED = ("*.json", "*.safetensors", "*.model", "merges.txt", "vocab.txt")
"""Settings, weights and tokenizers; nothing that runs and nothing pickled."""
_MOST_BYTES = 1 << 23
_DROPPED = frozenset(
    {
        *("auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation", "use_kernels"),
        *("dtype", "torch_dtype", "_name_or_path", "transformers_version", "id2label", "label2id", "num_labels"),
    }
)
"""Settings that name code or kernels to load, and those that every build decides anew."""


def library() -> Any:
    """Import transformers. Raises MissingExtraError."""
    with needs_extra("a model of kind transformers", "hf"):
        import transformers
    return transformers


def folder_of(path: str, revision: str | None) -> Path:
    """Return the folder of a model, downloaded if it is on the Hub. Raises RecipeError, or LogitCacheError."""
    name = hub_name(path)
    if name is None:
        return local_folder(path, revision)
    library()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(_FETCHED)))
    except (OSError, ValueError) as error:
        raise LogitCacheError(
            f"'{path}' of revision {revision or 'main'} could not be downloaded: {str(error).strip()}.\n"
            "  Fix: run once on a machine with a network and bring its HF_HOME along, or give a folder"
        ) from error


def settings_of(folder: Path) -> dict[str, JsonValue]:
    """Read `config.json` without what names code. Raises RecipeError."""
    file = folder / CONFIG
    try:
        settings = json.loads(read_bounded(file, _MOST_BYTES))
    except FileNotFoundError:
        raise RecipeError(
            f"'{folder}' is no folder of transformers: it has no {CONFIG}. Fix: give what save_pretrained wrote"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"{file} cannot be read: {error}. Fix: copy or download it again") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("model_type"), str):
        raise RecipeError(f"{file} names no `model_type`. Fix: give what save_pretrained of transformers wrote")
    if "quantization_config" in settings:
        raise RecipeError(f"{file} is of quantised weights. Fix: give the weights before they were quantised")
    return plain_settings(settings)


def plain_settings(settings: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Leave out, at every level, settings that name code, kernels, types or labels."""
    return {
        name: plain_settings(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in _DROPPED
    }


def num_labels(folder: Path) -> int:
    """Return for how many classes the weights of a folder were trained; transformers' own default is two."""
    settings = json.loads(read_bounded(folder / CONFIG, _MOST_BYTES))
    labels = settings.get("id2label")
    return len(labels) if isinstance(labels, dict) else int(settings.get("num_labels", 2))


def require_safetensors(folder: Path) -> None:
    """Raise RecipeError for a folder whose weights are pickled, missing, or differences from another model's."""
    if (folder / "adapter_config.json").exists():
        raise RecipeError(
            f"'{folder}' holds an adapter, which is a part of another model.\n"
            "  Fix: merge it into that model (merge_and_unload) and save_pretrained the whole"
        )
    if any((folder / name).is_file() for name in _WEIGHTS):
        return
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    found = f"holds {', '.join(pickled)}, which is pickled and could run code" if pickled else "holds no weights"
    raise RecipeError(
        f"'{folder}' {found}; a model of kind transformers is read from {_WEIGHTS[0]} alone.\n"
        "  Fix: where you trust the file, load it with transformers and write it again with save_pretrained, "
        "or take a revision with safetensors"
    )
