"""Cards: a README for a hub or a shared disk, written from the records of a cache or a run."""

import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from logitcache.cache.format.root import ROOT
from logitcache.config.recipe import read_recipe
from logitcache.errors import RecipeError
from logitcache.models import read_stored
from logitcache.report.inspect import inspect_cache
from logitcache.runtime.tables import as_markdown, format_bytes
from logitcache.store.files import write_atomically
from logitcache.store.remote.client import is_remote
from logitcache.store.safe_files import read_bounded

_MOST_BYTES = 1 << 20
_LONGEST = 300
"""Most characters that are shown of a recorded value."""
_MEASURES = ("top1", "top5", "mean_ap", "f1_macro", "agreement", "num_parameters", "epochs", "loss")
_NO_LICENCE = "not stated"
_IMAGES = "IMAGES"
"""Placeholder for the location of the images on the reader's machine."""
_TEACHER_COLUMNS = ("teacher", "model", "classes", "precision", "accuracy", "licence")


@dataclass(frozen=True)
class CardResult:
    """The file that was written."""

    of: str
    card: str


def write_card(
    path: str, out: Path, licence: str | None = None, teacher_licences: Mapping[str, str] | None = None
) -> CardResult:
    """Write the card of a cache, at a path or a URL, or of a finished run; nothing is overwritten.

    `licence` applies to the cache or run, `teacher_licences` to teachers by name. Raises RecipeError for any other
    folder, and if the file exists.
    """
    if out.exists():
        raise RecipeError(f"{out} exists and is not overwritten. Fix: another --out, or remove it")
    given = teacher_licences or {}
    if is_remote(path) or (Path(path) / ROOT).is_file():
        text = cache_card(inspect_cache(path), licence, given)
    elif (Path(path) / "result.json").is_file():
        if given:
            raise RecipeError("a run has no teachers whose licences it could state. Fix: leave --teacher-licence out")
        text = run_card(Path(path), licence)
    else:
        raise RecipeError(f"'{path}' is neither a cache nor a finished run. Fix: the folder of one, or a cache's URL")
    write_atomically(out, text.encode())
    return CardResult(path, str(out))


def parse_licences(texts: Sequence[str]) -> dict[str, str]:
    """Parse `NAME=LICENCE`. Raises RecipeError."""
    pairs = [text.partition("=") for text in texts]
    wrong = [text for text, (name, _, licence) in zip(texts, pairs, strict=True) if not (name and licence)]
    if wrong:
        raise RecipeError(f"{wrong[0]!r} is not NAME=LICENCE. Fix: --teacher-licence resnet50=bsd-3-clause")
    return {name: licence for name, _, licence in pairs}


def cache_card(found: Mapping[str, Any], licence: str | None, teacher_licences: Mapping[str, str]) -> str:
    """Return the card of a cache from the result of `inspect`. Raises RecipeError for licences of unknown teachers."""
    teachers: Mapping[str, Any] = found["teachers"]
    if unknown := sorted(teacher_licences.keys() - teachers.keys()):
        raise RecipeError(f"the cache has no teacher {unknown[0]!r}. Fix: one of {', '.join(teachers)}")
    name = Path(found["cache"].rstrip("/")).name
    state = (
        "" if found["complete"] else f" It is not finished: {found['shards_committed']} of {found['shards']} shards."
    )
    images = _located(found["dataset"])
    views = f"{found['images']:,} images in {found['views']} views, {_code(found['image_shape'])}"
    lines = [
        *_front(licence),
        f"# {_text(name)}",
        "",
        f"A logitcache: the answers of {len(teachers)} teacher{'s' * (len(teachers) > 1)} to {views}, in "
        f"{format_bytes(found['bytes'])}. The images are not in it.{state}",
        "",
        "## Teachers",
        "",
        *_table(_TEACHER_COLUMNS, _teachers(found, teacher_licences)),
        "Accuracies are of the labelled images as the teacher saw them, after the augmentations of view 0.",
        "",
        "## Views",
        "",
        f"- data set: {_code(found['dataset'])}",
        f"- augmentations: {_code(found['augmentations'])}; mixing: {_code(found['mixing'])}; seed {found['seed']}",
        f"- fingerprint of the images: {_code(found['fingerprint'])}",
        "",
        "## Encodings",
        "",
        *_table(("target", "shape", "kept as", "bytes a row", "errors"), _targets(teachers)),
        "Errors of logits are mean KL divergences (nats) from the teacher's own at a temperature T, those of features",
        "relative squared errors.",
        "",
        *_use(name, teachers, found["image_shape"][0], images),
        "## Verify it",
        "",
        "```bash",
        f"logitcache verify {_shell(name)}" + (f" --set {shlex.quote(f'dataset={images}')}" if images else ""),
        "```",
        "",
        "It compares every byte with its digest, and the images with the fingerprint.",
        f"Identity: {_code(found['identity'])}",
        "",
        f"Made by {_code(found['versions'])}",
    ]
    return "\n".join(lines) + "\n"


def run_card(run: Path, licence: str | None) -> str:
    """Return the card of a finished run. Raises RecipeError if its files cannot be read."""
    stored = read_stored(run / "model.json")
    try:
        result = json.loads(read_bounded(run / "result.json", _MOST_BYTES))
        measured = {key: result[key] for key in _MEASURES if result.get(key) is not None}
    except (OSError, ValueError, AttributeError) as error:
        raise RecipeError(f"{run / 'result.json'} cannot be read: {error}. Fix: copy the run again") from error
    recipe = read_recipe(run / "recipe.yaml")
    name = run.resolve().name
    lines = [
        *_front(licence),
        f"# {_text(name)}",
        "",
        f"A model trained by logitcache: {stored.num_classes} classes, {stored.in_channels} channels.",
        "",
        "## Measured",
        "",
        *_table(("measure", "value"), [(key, _code(value)) for key, value in measured.items()]),
        "Of the validation images; agreement is with the teacher's answers.",
        "",
        "## How it was made",
        "",
        f"- model: {_code(None if stored.model is None else stored.model.model_dump(mode='json'))}",
        f"- normalisation: {_code(stored.preprocessing.model_dump(mode='json'))}",
        *(f"- {key}: {_code(recipe[key])}" for key in ("cache", "dataset", "losses", "epochs") if recipe.get(key)),
        "",
        "## Use it",
        "",
        "```bash",
        f"logitcache predict {_shell(name)} photo.jpg",
        f"logitcache export {_shell(name)} model.onnx",
        "```",
        "",
        "Weights are safetensors; opening the run executes none of its files.",
    ]
    return "\n".join(lines) + "\n"


def _front(licence: str | None) -> list[str]:
    """Return the YAML front matter that hubs read."""
    entries = [f"license: {json.dumps(licence)}"] if licence else []
    return ["---", *entries, "tags: [logitcache, knowledge-distillation]", "---", ""]


def _teachers(found: Mapping[str, Any], licences: Mapping[str, str]) -> Iterator[Sequence[str]]:
    for name, entry in found["teachers"].items():
        accuracy = next((f"{key} {entry[key]:.4f}" for key in ("top1", "mean_ap") if entry.get(key) is not None), "–")
        licence = _text(licences.get(name, _NO_LICENCE))
        yield name, _code(entry["model"]), str(entry["classes"] or "–"), entry["precision"], accuracy, licence


def _targets(teachers: Mapping[str, Any]) -> Iterator[Sequence[str]]:
    for name, entry in teachers.items():
        for target in entry["targets"]:
            errors = [one for one in entry["errors"] if one["target"] == target["target"]]
            shown = ", ".join(
                f"{one['mean']:.2g}" + (f" at T = {one['temperature']:g}" if one.get("temperature") else "")
                for one in errors
            )
            kept = _code(target["form"] or target["kept"])
            size = f"{target['bytes_per_row']:g}" if target["bytes_per_row"] else "–"
            yield f"{name}.{target['target']}", _code(target["shape"]), kept, size, shown or target["errors"]


def _located(dataset: Mapping[str, Any] | None) -> str | None:
    """Return the data set's entry with a placeholder for its location, as one line of YAML; None for bundled images.

    A data set of the user's own code becomes a folder of images.
    """
    kept = {key: value for key, value in (dataset or {}).items() if value is not None}
    if kept.get("kind") == "bundled":
        return None
    if kept.get("kind") in (None, "custom"):
        kept = {"kind": "image_folder", "root": _IMAGES}
    place = next((key for key in ("root", "path", "shards") if key in kept), None)
    if place is None:
        return json.dumps(kept)
    patterns = [kept["shards"]] if isinstance(kept.get("shards"), str) else kept.get("shards", ())
    moved = [f"{_IMAGES}/{str(pattern).rpartition('/')[2]}" for pattern in patterns]
    return json.dumps(kept | {place: _IMAGES if place != "shards" else moved[0] if len(moved) == 1 else moved})


def _use(name: str, teachers: Mapping[str, Any], channels: int, images: str | None) -> list[str]:
    teacher, entry = next(iter(teachers.items()))
    loss = "multi_label_kl" if "mean_ap" in entry else "kl_divergence"
    model = "{kind: torchvision, name: mobilenet_v3_small, weights: null}" if channels == 3 else "{kind: small_cnn}"
    return [
        "## Use it",
        "",
        "```yaml",
        f"cache: {json.dumps(name)}",
        "out: runs/student",
        *([f"dataset: {images}  # the images that were answered, wherever they are now"] if images else []),
        f"model: {model}",
        f"losses: [{{kind: {loss}, teacher: {teacher}}}]",
        "epochs: 30",
        "```",
        "",
        "`logitcache train-student` trains a student by it; `logitcache.open_cache` opens the cache in Python.",
        "",
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return as_markdown([dict(zip(head, row, strict=True)) for row in rows]).splitlines()


def _plain(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _code(value: object) -> str:
    """Format a recorded value as code, without active Markdown or HTML."""
    return f"`{_plain(value).replace('`', chr(39)).replace('|', '¦')}`" if value not in (None, [], "") else "–"


def _text(value: str) -> str:
    """Escape Markdown and HTML in a user's text."""
    return "".join(f"\\{one}" if one in "\\`*_[]<>#|&" else one for one in _plain(value))


def _shell(name: str) -> str:
    return shlex.quote(_plain(name))
