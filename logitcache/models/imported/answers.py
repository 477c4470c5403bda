"""A teacher whose answers come from files: it looks them up by the keys of the views."""

import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Literal, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from logitcache.classifier import Preprocessing
from logitcache.config.recipe import Component, Count
from logitcache.errors import DataError, MismatchError, RecipeError
from logitcache.models.base import BuiltModel
from logitcache.models.imported.answer_files import LOGITS, Answers, code_of, files_of, key_text, read_answers
from logitcache.store.digest_index import SHA256, remembered
from logitcache.store.shards import Shard

_FILES_HELD = 4
"""Files whose answers are in memory at a time; views come in order, as `materialize` writes them."""
_SHOWN = 3


class ImportedAnswers(Component):
    """Outputs of a teacher from another framework, or of a service, in files (NPZ, Parquet, JSON Lines).

    Rows are looked up by their key, `VIEW/IMAGE`. Features are tapped by the names of their columns.
    """

    kind: Literal["answers"] = "answers"
    path: str = Field(description="File of the answers, or folder of several.", examples=["answers.npz"])
    whose: str = Field(
        description="Description of the teacher, recorded in the cache's manifest.",
        examples=["EfficientNetV2-S of Keras 3.15, ImageNet weights"],
        min_length=1,
        max_length=1000,
    )
    pixels: Literal["proven", "trusted"] = Field(
        default="proven",
        description="`proven` compares the CRC-32 of every answer with the pixels of its view; `trusted` accepts "
        "answers without a CRC-32. The manifest records which.",
    )
    num_classes: Count | None = Field(
        default=None, description="Number of classes, if the files hold only the most probable ones.", examples=[1000]
    )

    def build(self, num_classes: int | None, in_channels: int) -> BuiltModel:
        """Index the files. Raises RecipeError for a student, and for answers without a CRC-32 that are to be proven."""
        if num_classes is not None:
            raise RecipeError("answers in files are those of a teacher, and train nothing. Fix: another model")
        module = AnswersByKey(self.path, self.num_classes, self.pixels == "proven")
        return BuiltModel(module, Preprocessing(mean=(0.0,) * in_channels, std=(1.0,) * in_channels))

    def risks(self) -> tuple[str, ...]:
        """Name the files."""
        return (f"the answers '{self.path}'",)

    def architecture(self) -> NoReturn:
        """Raise RecipeError: there is no network."""
        raise RecipeError("answers in files are no network. Fix: another model")


class _Column(nn.Module):
    """Return a column, so that a tap finds it under its name."""

    def forward(self, values: Tensor) -> Tensor:
        return values


def _shapes(answers: Answers) -> dict[str, tuple[int, ...]]:
    """Return the shape of a row by the name of its column."""
    return {name: tuple(column.shape[1:]) for name, column in answers.values.items()}


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))


class AnswersByKey(nn.Module):
    """Pixels uint8 [B, C, H, W] and their keys to logits [B, K]; other columns pass through a module of their name.

    Its state is the digest of all files: what stands for the weights of a network.
    """

    def __init__(self, path: str, num_classes: int | None, is_proven: bool) -> None:
        super().__init__()
        self._path, self._files = path, files_of(path)
        digests = remembered(self._files, SHA256, what="file of answers")
        # The order of files and how rows are divided among them are theirs.
        self.register_buffer("content", torch.from_numpy(digests.copy()))
        self._read = functools.lru_cache(_FILES_HELD)(lambda number: read_answers(self._files[number], num_classes))
        self.shapes = _shapes(self._read(0))
        codes, places = [], []
        for number, file in enumerate(self._files):
            answers: Answers = self._read(number)
            if is_proven and answers.crc32 is None:
                raise RecipeError(
                    f"'{file}' has no column crc32 that proves which pixels were answered.\n"
                    "  Fix: write it (materialize gives it with each view), or pixels: trusted"
                )
            if (shapes := _shapes(answers)) != self.shapes:
                raise RecipeError(
                    f"'{file}' answers {_listed(shapes)}, and '{self._files[0]}' {_listed(self.shapes)}.\n"
                    "  Fix: the same columns of the same shapes in every file"
                )
            codes.append(answers.codes)
            places.append(np.stack([np.full(len(answers.codes), number), np.arange(len(answers.codes))], axis=1))
        order = np.argsort(every := np.concatenate(codes), kind="stable")
        self._codes, self._places = every[order], np.concatenate(places)[order]
        twice = self._codes[1:][self._codes[1:] == self._codes[:-1]]
        if len(twice):
            raise RecipeError(f"'{path}' answers {key_text(int(twice[0]))} twice. Fix: leave one of the answers out")
        for name in self.shapes.keys() - {LOGITS}:
            try:
                self.add_module(name, _Column())
            except KeyError as error:  # a dot, or a name that a module of torch has already
                raise RecipeError(
                    f"'{path}' has a column {name!r}, which cannot be tapped by this name.\n  Fix: another name, of "
                    "letters, digits and _"
                ) from error

    def require_kept(self, who: str, logits: bool, gradients: bool) -> None:
        """Raise RecipeError if logits are to be kept and the files have none, or what takes gradients of a network."""
        if gradients:
            raise RecipeError(f"{who}: kind: grad_cam takes a network, and answers lie in files. Fix: leave it out")
        if logits and LOGITS not in self.shapes:
            raise RecipeError(
                f"{who}: '{self._path}' answers {', '.join(self.shapes)}, and no logits.\n"
                "  Fix: a column logits, or classes and log_probabilities; or logits: null, to keep features alone"
            )

    def require_answers(self, shards: Sequence[Shard]) -> None:
        """Raise DataError for views of shards that are not answered."""
        if shards:
            self._places_of(np.concatenate([code_of(one.view, 0) + np.arange(one.start, one.stop) for one in shards]))

    def forward(self, pixels: Tensor, keys: Sequence[tuple[int, int]]) -> Tensor:
        """Look answers up. Raises DataError for a view that is not answered, MismatchError for other pixels."""
        found = self._places_of(np.array([code_of(view, image) for view, image in keys], np.int64))
        values: dict[str, Tensor] = {}
        files = self._places[found, 0]
        for number in np.unique(files).tolist():
            here = np.flatnonzero(files == number)
            answers, rows = self._read(number), self._places[found[here], 1]
            if answers.crc32 is not None:
                self._require_pixels(pixels, keys, here, answers.crc32[rows])
            for name, column in answers.values.items():
                if name not in values:
                    values[name] = torch.empty((len(keys), *column.shape[1:]), device=pixels.device)
                values[name][torch.from_numpy(here)] = torch.from_numpy(column[rows]).to(pixels.device)
        for name in values.keys() - {LOGITS}:
            self.get_submodule(name)(values[name])
        # Without logits nobody reads what is returned.
        return values.get(LOGITS, pixels.new_zeros((len(keys), 0)))

    def _places_of(self, wanted: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.searchsorted(self._codes, wanted).clip(max=len(self._codes) - 1)
        missing = wanted[self._codes[found] != wanted]
        if len(missing):
            some = ", ".join(key_text(int(code)) for code in missing[:_SHOWN])
            raise DataError(
                f"'{self._path}' has no answer to {len(missing)} of {len(wanted)} views: {some}"
                f"{', …' if len(missing) > _SHOWN else ''} (it has {len(self._codes)} in all).\n"
                "  Fix: answer them too, keyed VIEW/IMAGE from 0; those that encodings are tried on are spread over all"
            )
        return found.astype(np.int64)

    def _require_pixels(
        self, pixels: Tensor, keys: Sequence[tuple[int, int]], here: NDArray[np.intp], stated: NDArray[np.uint32]
    ) -> None:
        for place, wanted in zip(here.tolist(), stated.tolist(), strict=True):
            found = zlib.crc32(np.ascontiguousarray(pixels[place].cpu().numpy()).data)
            if found != wanted:
                view, image = keys[place]
                raise MismatchError(
                    f"the answer {view}/{image} in '{self._path}' is to other pixels: those of the view have the "
                    f"CRC-32 {found:08x}, the answer's is {wanted:08x}.\n"
                    "  Fix: answer the views that `materialize` writes by this very recipe"
                )
