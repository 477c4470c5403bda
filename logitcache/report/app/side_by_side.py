"""Students side by side on one image and, beside them, the teachers of a cache: from its answers, or live."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from logitcache.errors import DataError, LogitCacheError, RecipeError
from logitcache.report.answers import probabilities
from logitcache.report.app.known_images import KnownImages
from logitcache.report.figures.base import Figure
from logitcache.report.figures.picture import picture
from logitcache.report.look import MOST_VIEWS
from logitcache.shipping.predict import open_predictor
from logitcache.store.safe_files import read_bounded
from logitcache.student.evaluation.predict import ImageSource
from logitcache.student.lesson import LiveTargets
from logitcache.teacher.online import live_targets
from logitcache.views.datasets.image_folder import LARGEST
from logitcache.views.keys import ViewKey

TEACHER = "teacher "
"""What the name of a teacher begins with on the page."""


@dataclass(frozen=True)
class Shown:
    """What is shown of an image.

    `note` identifies it, or is the reason why it cannot be read; `pixels` are those of the first student, uint8
    [C, H, W]; `scores` maps models to probabilities by class; `views` are pictures of what the teachers saw of an image
    of the cache.
    """

    note: str
    pixels: NDArray[np.uint8] | None = None
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    views: tuple[Figure, ...] = ()


class SideBySide:
    """Finished runs or files exported from them and, with a cache, its teachers.

    `overrides` change the runs' recipes; those of `dataset` locate the images of the cache. `online` loads the teachers
    too, for images that are not of the cache. Raises as `open_predictor`, `KnownImages` and `live_targets`.
    """

    def __init__(
        self,
        runs: Sequence[str | Path],
        cache: str | None = None,
        overrides: Sequence[str] = (),
        trust: Collection[str] = (),
        *,
        online: bool = False,
        top: int = 5,
    ) -> None:
        of_images = [text for text in overrides if text.partition("=")[0].partition(".")[0] == "dataset"]
        of_runs = [text for text in overrides if text not in of_images]
        if cache is None and (of_images or online):
            raise RecipeError(
                f"{'--online' if online else '--set dataset'} has no effect without a cache. Fix: --cache"
            )
        self.top = top
        granted = [f"trust=[{', '.join(trust)}]"] if trust else []
        folders = [run for run in runs if Path(run).is_dir()]  # exported files have no recipe to change
        changes: dict[bool, Sequence[str]] = {True: [*of_runs, *granted], False: () if folders else of_runs}
        self.students = {str(run): open_predictor(run, changes[run in folders]) for run in runs}
        self._first = next(iter(self.students.values()))
        self.known = None if cache is None else KnownImages(cache, of_images, trust)
        self._live: LiveTargets | None = None
        if cache is not None and online:
            self._live = live_targets(cache, str(self._first.device), trust=trust)

    @property
    def models(self) -> tuple[str, ...]:
        """The names of all models."""
        teachers = () if self.known is None else self.known.cache.manifest.teachers
        return (*self.students, *(TEACHER + name for name in teachers))

    def show_file(self, path: Path) -> Shown:
        """Show an image file, as an image of the cache if it is one. The file is a stranger's."""
        name = path.name
        try:
            content = read_bounded(path, LARGEST)
            index = None if self.known is None else self.known.find(content)
            if index is not None:
                return self._show_known(index)
            scores, pixels = self._ask({run: one.source(content, name) for run, one in self.students.items()})
        except LogitCacheError as error:
            return Shown(str(error))
        note = name
        if self.known is not None:
            note += f": no image of {self.known.cache.location}"
            note += ", whose teachers answer now." if self._live else ", whose teachers did not answer it."
        return Shown(note, pixels, scores | self._ask_live(pixels))

    def show_named(self, text: str) -> Shown:
        """Show an image of the cache by its id or index."""
        assert self.known is not None, "the page asks for names of a cache only if there is one"
        try:
            return self._show_known(self.known.index(text.strip()))
        except LogitCacheError as error:
            return Shown(str(error))

    def _show_known(self, index: int) -> Shown:
        assert self.known is not None
        known = self.known
        answers, source = known.answers(index), known.source(index)
        scores, pixels = self._ask(dict.fromkeys(self.students, source))
        for name, rows in answers.items():
            scores[TEACHER + name] = self._best(zip(known.class_names, rows.mean(axis=0).tolist(), strict=True))
        keys = [ViewKey(view, index) for view in range(min(known.cache.num_views, MOST_VIEWS))]
        views = [
            picture(pixels.numpy(), title=f"view {key.view}", caption="\n".join(known.captions(answers, key.view)))
            for key, pixels in zip(keys, known.views.__getitems__(keys), strict=True)
        ]
        label = ", ".join(known.labels(index)) or "none"
        note = f"Image {index} ({source.name}) of {known.cache.location}, label: {label}. "
        note += f"Its teachers answered {known.cache.num_views} views; their probabilities are means over these."
        return Shown(note, pixels, scores, tuple(views))

    def _ask(self, sources: Mapping[str, ImageSource]) -> tuple[dict[str, Mapping[str, float]], NDArray[np.uint8]]:
        """Return the classes of each student by its name, and the pixels of the first. Raises DataError."""
        scores: dict[str, Mapping[str, float]] = {}
        for run, source in sources.items():
            (found,) = self.students[run].predict([source], self.top)
            if found.error is not None:
                raise DataError(found.error)
            scores[run] = self._best((c.name or str(c.label), c.probability) for c in found.classes)
        first = self._first.transform(next(iter(sources.values())).read())
        return scores, first.numpy()

    def _ask_live(self, pixels: NDArray[np.uint8]) -> dict[str, Mapping[str, float]]:
        """Return the classes of the teachers on the pixels of the first student, if they are loaded."""
        if self._live is None or self.known is None:
            return {}
        labels = torch.full((1, *self.known.cache.labels.shape[1:]), -1, device=self._first.device)
        found = self._live(torch.from_numpy(pixels)[None].to(self._first.device), labels)
        return {
            TEACHER + name: self._best(
                zip(self.known.class_names, probabilities(self.known.cache, targets.to("cpu"))[0].tolist(), strict=True)
            )
            for name, targets in found.items()
        }

    def _best(self, named: Iterable[tuple[str, float]]) -> dict[str, float]:
        """Return the most probable classes by name, best first; equal names are numbered."""
        found: dict[str, float] = {}
        for name, probability in sorted(named, key=lambda pair: -pair[1])[: self.top]:
            same = sum(name == other or other.startswith(f"{name} (") for other in found)
            found[f"{name} ({same + 1})" if name in found else name] = probability
        return found
